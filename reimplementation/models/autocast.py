"""Casts under autocast: how often they happen is up to PyTorch, and to where a tensor goes.

Autocast casts what a linear layer reads at each call, its input and its weights. PyTorch remembers a cast of a weight that
requires a gradient, until the outermost autocast context ends. So a weight is cast once in a context, however often its
layer is called there, and once more in the next context. Weights that require no gradient, and inputs, are cast at each
call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reimplementation.ops.dtypes import as_dtype


def cast_for_linears(features: Tensor) -> Tensor:
    """Features as linear layers are going to read them: for several layers that read the same, one cast instead of many.

    Without autocast, or where it would cast nothing, the features themselves.
    """
    device_type = features.device.type
    if features.dtype == torch.float64 or not features.is_floating_point() or device_type == "meta":
        return features
    if not torch.is_autocast_enabled(device_type):
        return features
    return as_dtype(features, torch.get_autocast_dtype(device_type))
