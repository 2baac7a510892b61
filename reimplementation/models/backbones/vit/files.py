"""Files that a model reads and writes: weights, inputs, outputs. None of them can run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ViTConfig
from .dinov3 import from_dinov3, is_dinov3
from .vit import ViT


def load_weights(model: ViT, path: Path) -> None:
    """Fill a model from a state dict that `torch.save` wrote, its own or DINOv3's.

    Every name must be there and none be left over; only heads may be missing from DINOv3's.

    Raises:
        ValueError: the file is no state dict, or another model's.
        OSError: it cannot be read.
    """
    state_dict = _load(path)
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} must hold a state dict, tensors by name; got {type(state_dict).__name__}")
    try:
        if is_dinov3(state_dict):
            heads = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("heads.")}
            state_dict = {**heads, **from_dinov3(state_dict, model.config)}
        model.load_state_dict(state_dict)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} holds the weights of another model: {' '.join(str(error).split())}") from None


def read_images(path: Path, config: ViTConfig, any_size: bool = True) -> Tensor:
    """(B, C_in, ...) images from a file, in the dtype of the model.

    Args:
        path: see `read_tensor`.
        config: of the model.
        any_size: False: the sides must be those of ``config.img_size``.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    images = read_tensor(path)
    sides = ", ".join(map(str, config.img_size))
    fits = images.dim() == len(config.img_size) + 2 and images.shape[0] and images.shape[1] == config.in_channels
    if not (fits and images.is_floating_point()):
        raise ValueError(
            f"{path} must hold floating-point images, such as (B, {config.in_channels}, {sides}); "
            f"got {tuple(images.shape)} of {images.dtype}"
        )
    if not any_size and tuple(images.shape[2:]) != tuple(config.img_size):
        raise ValueError(f"a package takes images of its own size, ({sides}); got {tuple(images.shape[2:])} in {path}")
    return images.to(config.dtype)


def read_tensor(path: Path) -> Tensor:
    """The array in a ``.npy`` file, or the tensor in a ``.pt`` file.

    Raises:
        ValueError: the file holds something else, or has another ending.
        OSError: it cannot be read.
    """
    if path.suffix == ".npy":
        with path.open("rb") as file:
            try:
                array = np.load(file, allow_pickle=False)
                return torch.from_numpy(array)
            except (ValueError, TypeError, EOFError) as error:
                raise ValueError(f"{path} is no .npy file of numbers: {error}") from None
    if path.suffix == ".pt":
        tensor = _load(path)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path} must hold a tensor; got {type(tensor).__name__}")
        return tensor
    raise ValueError(f"the name of a tensor's file ends in .npy or .pt; got {path}")


def write_tensor(path: Path, tensor: Tensor) -> None:
    """Write a ``.npy`` file, where bfloat16 becomes float32, which NumPy knows; or a ``.pt`` file.

    Raises:
        ValueError: the name has another ending.
        OSError: it cannot be written.
    """
    tensor = tensor.detach().cpu()
    if path.suffix == ".npy":
        np.save(path, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    elif path.suffix == ".pt":
        with path.open("wb") as file:
            torch.save(tensor.contiguous(), file)
    else:
        raise ValueError(f"the name of a tensor's file ends in .npy or .pt; got {path}")


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()) or "it is empty"
            raise ValueError(f"{path} is no file of tensors from torch.save: {reason:.200}") from None
