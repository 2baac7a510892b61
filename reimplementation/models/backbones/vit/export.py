"""A model as an AOTInductor package: a `.pt2` file that runs without Python, for any batch of one size of images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from .config import ViTConfig
from .vit import ViT

EXAMPLE_BATCH = 2  # an exporter takes a batch of 1 for a constant
ANY_BATCH = {"aot_inductor.check_lowerbound": False}  # else a package that checks its inputs refuses a batch of 1
CHECKED_BATCHES = (2, 1, 3)
LARGEST_ERRORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class DenseFeatures(nn.Module):
    """A model that returns its dense features, (B, N, C), as a plain tensor."""

    def __init__(self, model: ViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).dense_features


def export_package(model: ViT, path: Path) -> None:
    """Compile a model for images of its ``config.img_size`` and any batch, and write the package.

    The package takes images of ``config.dtype``, the weights' dtype, on their device, and returns the dense features.

    Args:
        model: in evaluation.
        path: the file to write, NAME.pt2.

    Raises:
        ValueError: the name has another ending, or the model is in training.
    """
    if path.suffix != ".pt2":
        raise ValueError(f"the name of a package ends in .pt2; got {path}")
    if model.training:
        raise ValueError("a package holds a model in evaluation: call eval() first")
    images = random_images(model.config, EXAMPLE_BATCH, model.stem.patch.weight.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's exporter warns of its own future
        program = torch.export.export(DenseFeatures(model), (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=ANY_BATCH)


@torch.inference_mode()
def check_package(model: ViT, package: Callable[[Tensor], Tensor]) -> dict[int, float]:
    """Compare a package with its model on random images; returns the relative L2 error of each batch size tried.

    Raises:
        RuntimeError: an error is too large for the dtype: the package computes something else.
    """
    errors = {}
    for batch in CHECKED_BATCHES:
        images = random_images(model.config, batch, model.stem.patch.weight.device)
        expected = model(images).dense_features
        errors[batch] = error = ((package(images) - expected).norm() / expected.norm()).item()
        if not error <= LARGEST_ERRORS[expected.dtype]:
            raise RuntimeError(f"the package does not compute what the model does: relative L2 error {error:.1e}")
    return errors


def random_images(config: ViTConfig, batch: int, device: torch.device) -> Tensor:
    """(batch, C_in, *img_size) of the model's dtype, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, config.in_channels, *config.img_size, generator=generator)
    return images.to(device, config.dtype)


def load_package(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images to dense features; RuntimeError from it where images are not as `export_package` says.

    From here on, packages of this process check their inputs: they would read beyond the ends of smaller ones.

    Raises:
        ValueError: there is no such file.
        RuntimeError: it is no package.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no package {path}; write it with: python -m reimplementation vit export CONFIG {path}"
        )
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: package(images)
