"""Casts under autocast: how often they happen is up to PyTorch, and to who asks for them.

Autocast casts what a linear layer reads, its input and its weights, at each call. Of a weight that requires a gradient,
PyTorch keeps the cast one until the outermost autocast context ends: so a weight is cast once in a context, however
often its layer is called there, and again in the next context. Inputs, and weights that require no gradient, are cast
at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reimplementation.ops.dtypes import as_dtype


def cast_for_linears(features: Tensor) -> Tensor:
    """Features as linear layers will read them: one cast for several layers that read the same.

    Without autocast, or where that would cast nothing, the features themselves.
    """
    device_type = features.device.type
    if features.dtype == torch.float64 or not features.is_floating_point() or device_type == "meta":
        return features
    if not torch.is_autocast_enabled(device_type):
        return features
    return as_dtype(features, torch.get_autocast_dtype(device_type))
