"""From a detector to its form for inference."""

from __future__ import annotations

import copy

import torch

from reimplementation.models.backbones.resnet import ResNet
from reimplementation.models.sparsedrive.detector import Heads, SparseDrive
from reimplementation.models.sparsedrive.head import SparseHead
from reimplementation.ops.dtypes import FLOATING, name_of

from .head import InferenceHead


def for_inference(model: SparseDrive, dtype: torch.dtype = torch.float32) -> SparseDrive:
    """A detector that computes what ``model`` does, called in the same way, from far fewer kernels.

    Normalisations are folded into convolutions, activations and factors into the products before them, and what
    several small networks do alike is one product. Half precision needs no autocast, which casts every weight in every
    frame: features and weights have the dtype, while anchors, times and poses stay in float32 or wider.

    The form is a copy; later changes of the model's parameters do not reach it. Its parameters have names of their own,
    need no gradient, and it does not train.

    Args:
        model: in evaluation, with its checkpoint loaded.
        dtype: of the features.

    Raises:
        RuntimeError: the model is in training.
        TypeError: the dtype is no floating one.
    """
    if model.training:
        raise RuntimeError("for_inference takes a model in evaluation; call eval() first")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be one of {', '.join(map(name_of, FLOATING))}; got {dtype}")
    form = copy.deepcopy(model).requires_grad_(False)
    form.reset()
    if isinstance(form.img_backbone, ResNet):  # a ViT's norms stand before its layers, and cannot be folded
        form.img_backbone.fold_norms()
    for part in (form.img_backbone, form.img_neck):
        part.to(dtype)
    if isinstance(form.head, Heads):
        for name, head in list(form.head.named_children()):
            setattr(form.head, name, _converted(head, dtype))
    else:
        form.head = _converted(form.head, dtype)
    return form


def _converted(head: torch.nn.Module, dtype: torch.dtype) -> InferenceHead:
    assert isinstance(head, SparseHead)
    return InferenceHead(head, dtype)
