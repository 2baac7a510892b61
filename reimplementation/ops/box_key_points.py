"""Key points on and in 3D boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._call import call
from ._register import define
from ._spec import REAL, Operand, Spec

__all__ = ["CENTRE", "LOG_SIZE", "SIN_COS_YAW", "VELOCITY", "box_key_points", "check_box_anchor"]

# A box anchor: x, y, z, log w, log l, log h, sin yaw, cos yaw, vx, vy, vz (metres, metres per second).
CENTRE = slice(0, 3)
LOG_SIZE = slice(3, 6)
SIN_COS_YAW = slice(6, 8)
VELOCITY = slice(8, 11)
_ANCHOR_DIMS, _LEARNED_DIMS = "8 to 11", "num_learnable * 3"
_ANCHOR = (
    f"anchor must be (bs, num_anchor, {_ANCHOR_DIMS}): x, y, z, log w, log l, log h, sin yaw, cos yaw "
    "and 0 to 3 of velocity"
)


def box_key_points(anchor: Tensor, fix_scale: Tensor, logits: Tensor | None = None) -> Tensor:
    """Place key points on and in boxes: some at fixed places, some at places of each box's own.

    ``key_point = turn(yaw) @ (place * size) + centre`` with ``place`` a row of ``fix_scale``, or
    ``sigmoid(logits) - 0.5``, which is anywhere in the box. These are the key points of Sparse4D (arXiv 2211.10581)
    and SparseDrive (arXiv 2405.19620).

    Args:
        anchor: (bs, num_anchor, 8 to 11) boxes (x, y, z, log w, log l, log h, sin yaw, cos yaw) and up to three
            components of velocity, on which nothing depends; any floating dtype. The first of the three sizes
            is the extent along the heading. Sine and cosine are taken as they are, whatever their length.
        fix_scale: (num_fixed, 3) places in units of the box's sizes, from its centre: 0.5 is on a face; any
            floating dtype.
        logits: (bs, num_anchor, num_learnable * 3), any floating dtype; None: there are no learnable points.

    Returns:
        (bs, num_anchor, num_fixed + num_learnable, 3), the fixed points first, in the dtype of ``anchor`` but at
        least float32; autocast changes nothing.

    Gradients of any order flow to all three. Where ``fix_scale`` needs one the formula runs, plain PyTorch, as it does
    where PyTorch traces the call.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    return call(_OP, anchor, fix_scale, logits)


def check_box_anchor(anchor: Tensor) -> None:
    """Raise ValueError unless these are box anchors by their shape."""
    if anchor.dim() != 3 or not VELOCITY.start <= anchor.shape[-1] <= VELOCITY.stop:
        raise ValueError(f"{_ANCHOR}; got {tuple(anchor.shape)}")


def _formula(anchor: Tensor, fix_scale: Tensor, logits: Tensor | None) -> Tensor:
    place = fix_scale
    if logits is not None:
        learned = logits.unflatten(-1, (logits.shape[-1] // 3, 3)).sigmoid() - 0.5
        place = torch.cat([place.expand(*anchor.shape[:2], -1, -1), learned], dim=-2)
    offset = place * anchor[..., None, LOG_SIZE].exp()

    sin, cos = anchor[..., SIN_COS_YAW].split(1, dim=-1)
    x, y, z = offset.unbind(-1)
    turned = [torch.addcmul(cos * x, sin, y, value=-1), torch.addcmul(sin * x, cos, y), z]
    return torch.stack(turned, dim=-1) + anchor[..., None, CENTRE]


def _check_sizes(sizes: Mapping[str, int]) -> None:
    shape = (sizes["bs"], sizes["num_anchor"])
    if not VELOCITY.start <= sizes[_ANCHOR_DIMS] <= VELOCITY.stop:
        raise ValueError(f"{_ANCHOR}; got {(*shape, sizes[_ANCHOR_DIMS])}")
    if sizes.get(_LEARNED_DIMS, 0) % 3 != 0:
        raise ValueError(f"logits must be (bs, num_anchor, {_LEARNED_DIMS}); got {(*shape, sizes[_LEARNED_DIMS])}")


SPEC = Spec(
    name="box_key_points",
    title="Placing key points",
    operands=(
        Operand("anchor", ("bs", "num_anchor", _ANCHOR_DIMS), REAL, torch.contiguous_format),
        Operand("fix_scale", ("num_fixed", 3), REAL),
        Operand("logits", ("bs", "num_anchor", _LEARNED_DIMS), REAL, torch.contiguous_format, optional=True),
    ),
    output=lambda sizes: (sizes["bs"], sizes["num_anchor"], sizes["num_fixed"] + sizes.get(_LEARNED_DIMS, 0) // 3, 3),
    check_sizes=_check_sizes,
    is_pointwise=True,
)
_OP = define(SPEC, _formula)
