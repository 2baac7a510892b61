"""Key points on and in 3D boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import EXTENSION_AVAILABLE
from .checks import FEATURE_DTYPES, check_device, check_dtype, check_shape
from .pointwise import PointwiseOp, check_as_kernels_read, check_gradient, run
from .registration import register
from .transforms import at_least_float32

__all__ = ["CENTRE", "LOG_SIZE", "SIN_COS_YAW", "VELOCITY", "box_key_points", "check_box_anchor"]

NAMES = ("anchor", "fix_scale", "logits")

# A box anchor: x, y, z, log w, log l, log h, sin yaw, cos yaw, vx, vy, vz (metres, metres per second).
CENTRE = slice(0, 3)
LOG_SIZE = slice(3, 6)
SIN_COS_YAW = slice(6, 8)
VELOCITY = slice(8, 11)


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
    return run(_OP, anchor, fix_scale, logits)


def check_box_anchor(anchor: Tensor) -> None:
    """Raise ValueError unless these are box anchors by their shape."""
    if anchor.dim() != 3 or not VELOCITY.start <= anchor.shape[-1] <= VELOCITY.stop:
        raise ValueError(
            "anchor must be (bs, num_anchor, 8 to 11): x, y, z, log w, log l, log h, sin yaw, cos yaw "
            f"and 0 to 3 of velocity; got {tuple(anchor.shape)}"
        )


def _check(anchor: Tensor, fix_scale: Tensor, logits: Tensor | None) -> None:
    check_dtype("anchor", anchor, FEATURE_DTYPES)
    check_box_anchor(anchor)
    check_dtype("fix_scale", fix_scale, FEATURE_DTYPES)
    check_shape("fix_scale", fix_scale, ("num_fixed", 3), {})
    check_device("fix_scale", fix_scale, anchor.device)
    if logits is not None:
        sizes = {"bs": anchor.shape[0], "num_anchor": anchor.shape[1]}
        check_dtype("logits", logits, FEATURE_DTYPES)
        check_shape("logits", logits, ("bs", "num_anchor", "num_learnable * 3"), sizes)
        if logits.shape[-1] % 3 != 0:
            raise ValueError(f"logits must be (bs, num_anchor, num_learnable * 3); got {tuple(logits.shape)}")
        check_device("logits", logits, anchor.device)


def _formula(anchor: Tensor, fix_scale: Tensor, logits: Tensor | None) -> Tensor:
    anchor = at_least_float32(anchor)
    place = fix_scale.to(anchor.dtype)
    if logits is not None:
        learned = logits.to(anchor.dtype).unflatten(-1, (logits.shape[-1] // 3, 3)).sigmoid() - 0.5
        place = torch.cat([place.expand(*anchor.shape[:2], -1, -1), learned], dim=-2)
    offset = place * anchor[..., None, LOG_SIZE].exp()

    sin, cos = anchor[..., SIN_COS_YAW].split(1, dim=-1)
    x, y, z = offset.unbind(-1)
    turned = [torch.addcmul(cos * x, sin, y, value=-1), torch.addcmul(sin * x, cos, y), z]
    return torch.stack(turned, dim=-1) + anchor[..., None, CENTRE]


def _fake(anchor, fix_scale, logits):
    _check(anchor, fix_scale, logits)
    check_as_kernels_read(NAMES, (anchor, fix_scale, logits))
    num_learnable = 0 if logits is None else logits.shape[-1] // 3
    return anchor.new_empty(*anchor.shape[:2], fix_scale.shape[0] + num_learnable, 3)


def _fake_backward(grad_output, anchor, fix_scale, logits):
    check_gradient(grad_output, _fake(anchor, fix_scale, logits))
    return anchor.new_empty(anchor.shape), anchor.new_empty(0 if logits is None else logits.shape)


_OP = PointwiseOp(
    title="Placing key points",
    check=_check,
    formula=_formula,
    kernel=register("box_key_points", _fake, _fake_backward, differentiable=(0, 2), formula=_formula)
    if EXTENSION_AVAILABLE
    else None,
)
