"""What both ops take: features, shapes and first rows of their levels, sampling locations, weights. Their types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import FEATURE_DTYPES, INTEGER_DTYPES, check_device, check_dtype

HALF_DTYPES = (torch.float16, torch.bfloat16)


def compute_dtype(features: Tensor) -> torch.dtype:
    """The dtype of locations and sums."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as a small kernel's launch to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_operands(names: Sequence[str], operands: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError where one of the five operands has a dtype or device that the ops do not take."""
    features, shapes, starts, locations, weights = operands
    features_name, shapes_name, starts_name, locations_name, weights_name = names
    check_dtype(features_name, features, FEATURE_DTYPES)
    check_dtype(shapes_name, shapes, INTEGER_DTYPES)
    check_dtype(starts_name, starts, INTEGER_DTYPES)
    check_dtype(
        locations_name,
        locations,
        (torch.float32, torch.float64),
        ": half precision cannot address a pixel, compute locations in float32",
    )
    check_dtype(weights_name, weights, tuple({features.dtype: None, torch.float32: None}))

    check_device(shapes_name, shapes, features.device, or_cpu=True)
    check_device(starts_name, starts, features.device, or_cpu=True)
    check_device(locations_name, locations, features.device)
    check_device(weights_name, weights, features.device)


def is_autocast_enabled(features: Tensor) -> bool:
    """Whether autocast is on for the features' device; what is no tensor, or on meta, is left to the checks."""
    return (
        torch._C._is_any_autocast_enabled()  # answers most calls, and sooner than asking for a device's type
        and isinstance(features, Tensor)
        and features.device.type != "meta"
        and torch.is_autocast_enabled(features.device.type)
    )


def under_autocast(features: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and weights in dtypes that the ops take beside these features, whatever autocast made of them."""
    if isinstance(locations, Tensor) and locations.dtype in HALF_DTYPES:
        locations = locations.float()
    taken = (features.dtype, torch.float32)
    if isinstance(weights, Tensor) and weights.dtype in FEATURE_DTYPES and weights.dtype not in taken:
        weights = weights.to(features.dtype)
    return locations, weights


def are_as_kernels_read(features: Tensor, locations: Tensor, weights: Tensor) -> bool:
    """Whether `as_kernels_read` would return what it got."""
    wide = compute_dtype(features)
    return locations.dtype == wide and (wide == torch.float32 or weights.dtype == wide)


def as_kernels_read(features: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and weights that passed the checks, in the dtypes that the kernels know beside these features."""
    wide = compute_dtype(features)
    return as_dtype(locations, wide), as_dtype(weights, wide) if wide == torch.float64 else weights
