"""The table of ops: one row an op, and every test that holds for all of them runs it.

A new op needs its formula in `tests.reference`, a factory of random operands in `tests.ops.inputs`, and a row of `OPS`.
What it promises beyond the others is tested in a file of its own, `tests/ops/test_NAME.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.ops.backends import triton
from tests import reference
from tests.ops import inputs
from tests.ops.feature_aggregation_inputs import ATTN_DROP, random_feature_aggregation

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def any_floating(first: torch.dtype) -> tuple[torch.dtype, ...]:
    return FLOATING


def any_number(first: torch.dtype) -> tuple[torch.dtype, ...]:
    return FLOATING + INTEGER


def any_integer(first: torch.dtype) -> tuple[torch.dtype, ...]:
    return INTEGER


def wide(first: torch.dtype) -> tuple[torch.dtype, ...]:
    """Half precision cannot address a pixel."""
    return torch.float32, torch.float64


def flags(first: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.bool,)


def as_the_first(first: torch.dtype) -> tuple[torch.dtype, ...]:
    return first, torch.float32


@dataclass(frozen=True)
class Operand:
    """An argument of an op: its name, the dtypes that it may have beside a first operand of some dtype, and the places
    of those dimensions whose sizes other operands, or the op, fix."""

    name: str
    tied: tuple[int, ...]
    dtypes: Callable[[torch.dtype], tuple[torch.dtype, ...]] = any_floating
    differentiable: bool = False  # whether the kernel has its gradient
    optional: bool = False  # whether it may be None
    any_device: bool = False  # whether it may be on the CPU where the others are not
    in_float32: bool = False  # whether kernels that read others in half precision read it in float32
    also: tuple[type | torch.dtype, ...] = ()  # what the function takes besides, and its operator does not

    def in_dtype(self, operand: Tensor, dtype: torch.dtype) -> Tensor:
        """The operand as it is beside others of ``dtype``: in that dtype, or in float32 where it may not have it."""
        if not operand.is_floating_point():
            return operand
        is_read = dtype in self.dtypes(dtype) and not (self.in_float32 and dtype in HALF)
        return operand.to(dtype if is_read else torch.float32)


@dataclass(frozen=True)
class Op:
    """A row: an op of the extension, and what tests need to know of it.

    ``random(seed, **sizes)`` draws operands, float64 on the CPU; ``batch_size`` and ``num_queries`` are sizes of all.
    ``geometries`` are operands that are compared with the formula, by name; ``small`` are so few that a test may
    perturb every number, in places where the derivative exists; ``empty`` are sizes with which there is nothing to do.
    """

    name: str  # of the operator; that of its gradients is ``NAME_backward``
    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    random: Callable[..., Sequence[Tensor | None]]
    small: Callable[[], Sequence[Tensor | None]]
    geometries: dict[str, Callable[[], Sequence[Tensor | None]]]
    empty: dict[str, dict]
    kernel_dtypes: tuple[torch.dtype, ...]  # of the first operand; in others it is computed in float32
    many: dict[str, int]  # sizes at which threads share the work
    lean: dict  # sizes with which a tracer has least to see: one level
    sizes: tuple[str, ...]  # what else ``random`` takes, beside a seed: numbers of things
    is_pointwise: bool
    """Arithmetic alone: compilers and exporters see its formula, which has derivatives of any order, and its results
    are the same bits however it runs. Another op samples: its gradients are sums over what queries share, in no
    certain order unless one asks for it, and their operator is told which of them are needed."""
    has_products: bool = False  # whether it is made of PyTorch's matrix products, too: the same bits but for rounding
    settings: tuple = ()  # what the operator takes behind the operands
    keeps: bool = False  # whether the operator returns, beside its output, what its backward takes behind the operands

    def runs_formula(self, backend: str) -> bool:
        """Whether a backend has no kernels of this op; what the formula calls may have some."""
        return backend == "grid_sample" or (backend == "triton" and self.name not in triton.OPS)

    def __str__(self) -> str:
        return self.name

    @property
    def forward(self):
        return getattr(torch.ops.reimplementation, self.name)

    @property
    def backward(self):
        return getattr(torch.ops.reimplementation, f"{self.name}_backward")

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The places of the operands that the kernel has gradients of."""
        return tuple(i for i, operand in enumerate(self.operands) if operand.differentiable)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(operand.name for operand in self.operands)

    def output_dtype(self, first: torch.dtype) -> torch.dtype:
        return first if first in self.kernel_dtypes else torch.float32

    def on(self, device, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes) -> list[Tensor | None]:
        """Random operands, the first in ``dtype`` and the others in one that it may have beside them."""
        return self.moved(self.random(seed, **sizes), device, dtype)

    def moved(self, operands: Sequence[Tensor | None], device, dtype: torch.dtype) -> list[Tensor | None]:
        return [
            operand if operand is None else about.in_dtype(operand, dtype).to(device)
            for about, operand in zip(self.operands, operands, strict=True)
        ]

    def forward_arguments(self, operands: Sequence[Tensor | None]) -> tuple:
        return (*operands, *self.settings)

    def forward_call(self, operands: Sequence[Tensor | None]) -> Tensor:
        """The operator's output."""
        returned = self.forward(*self.forward_arguments(operands))
        return returned[0] if self.keeps else returned

    def kept(self, operands: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """What the operator returns for its backward."""
        return tuple(self.forward(*self.forward_arguments(operands))[1:]) if self.keeps else ()

    def backward_arguments(
        self, grad_output: Tensor, operands: Sequence, needs: Sequence[bool] = (), kept=None
    ) -> tuple:
        """For the operator of the gradients; all of them are needed unless ``needs`` says less."""
        kept = self.kept(operands) if kept is None else kept
        flags = () if self.is_pointwise else needs or [True] * len(self.differentiable)
        return (grad_output, *operands, *kept, *self.settings, *flags)

    def backward_call(self, *arguments, **kept):
        """The operator of the gradients, with `backward_arguments`."""
        return self.backward(*self.backward_arguments(*arguments, **kept))


def without_optional(op: Op, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None wherever that is allowed."""
    return [None if about.optional else operand for about, operand in zip(op.operands, operands)]


def off_the_edges(features, shapes, starts, locations, weights) -> list[Tensor]:
    """Half a step away from the edges of pixels, where the derivative does not exist."""
    return [features, shapes, starts, locations + inputs.STEP / 2, weights]


SAMPLING = {"kernel_dtypes": FLOATING, "is_pointwise": False}
POINTWISE = {"kernel_dtypes": (torch.float64, torch.float32), "is_pointwise": True}

AGGREGATION = Op(
    "deformable_aggregation",
    ops.deformable_aggregation_function,
    reference.deformable_aggregation,
    operands=(
        Operand("feature_maps", (0,), differentiable=True),
        Operand("spatial_shape", (0, 1, 2), any_integer, any_device=True),
        Operand("scale_start_index", (0, 1), any_integer, any_device=True),
        Operand("sampling_location", (0, 1, 2, 3, 4), wide, differentiable=True),
        Operand("weights", (0, 1, 2, 3, 4), as_the_first, differentiable=True),
    ),
    random=inputs.random_inputs,
    small=lambda: off_the_edges(
        *inputs.random_inputs(
            13,
            batch_size=1,
            num_queries=2,
            num_points=2,
            channels=4,
            num_groups=2,
            shapes=(((3, 4), (2, 3)), ((3, 2), (1, 2))),
        )
    ),
    geometries={
        "random": inputs.random_inputs,
        "rig": inputs.rig_inputs,
        "border": inputs.border_inputs,
        "few queries": partial(inputs.random_inputs, num_queries=2, num_points=150),  # which blocks of a GPU share
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "points": {"num_points": 0},
        "rows": {"shapes": [[(0, 0), (0, 3)]] * 2},
        "cameras": {"shapes": torch.empty(0, 1, 2, dtype=torch.int64), "spare_rows": 20},
        "levels": {"shapes": torch.empty(2, 0, 2, dtype=torch.int64), "spare_rows": 20},
        "channels": {"channels": 0, "num_groups": 1},
    },
    many={"num_queries": 400, "channels": 128},
    lean={"shapes": [[(9, 14)], [(5, 7)]]},
    sizes=("batch_size", "num_queries", "num_points", "channels", "num_groups"),
    **SAMPLING,
)

ATTENTION = Op(
    "ms_deform_attn",
    ops.ms_deform_attn,
    reference.ms_deform_attn,
    operands=(
        Operand("value", (0, 2), differentiable=True, also=(list,)),
        Operand("spatial_shapes", (0, 1), any_integer, any_device=True, also=(list,)),
        Operand("level_start_index", (0,), any_integer, any_device=True, also=(type(None),)),
        Operand("sampling_locations", (0, 1, 2, 3, 4, 5), wide, differentiable=True, also=HALF),
        Operand("attention_weights", (0, 1, 2, 3, 4), as_the_first, differentiable=True),
    ),
    random=inputs.random_attention_inputs,
    small=lambda: off_the_edges(
        *inputs.random_attention_inputs(
            13, batch_size=1, num_queries=2, num_heads=2, channels=4, num_points=2, shapes=((3, 4), (2, 1))
        )
    ),
    geometries={
        "random": inputs.random_attention_inputs,
        "encoder": inputs.encoder_inputs,
        "border": inputs.attention_border_inputs,
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "heads": {"num_heads": 0},
        "points": {"num_points": 0},
        "rows": {"shapes": ((0, 0), (0, 3))},
        "levels": {"shapes": (), "spare_rows": 20},
        "channels": {"channels": 0},
    },
    many={"num_queries": 400, "channels": 128},
    lean={"shapes": [(9, 14)]},
    sizes=("batch_size", "num_queries", "num_heads", "num_points", "channels"),
    **SAMPLING,
)


def apart_from_edges(*operands: Tensor | None) -> list[Tensor | None]:
    """As `off_the_edges`, of what becomes locations."""
    return [*operands[:3], operands[3] + inputs.STEP / 2, *operands[4:]]


FEATURE_AGGREGATION = Op(
    "deformable_feature_aggregation",
    partial(ops.deformable_feature_aggregation, attn_drop=ATTN_DROP),
    partial(reference.deformable_feature_aggregation, attn_drop=ATTN_DROP),
    operands=(
        Operand("feature_maps", (0,), differentiable=True),
        Operand("spatial_shape", (0, 1, 2), any_integer, any_device=True),
        Operand("scale_start_index", (0, 1), any_integer, any_device=True),
        Operand("key_points", (0, 1, 3), differentiable=True, in_float32=True),
        Operand("projection_mat", (0, 1, 2, 3), in_float32=True),
        Operand("image_wh", (0, 1, 2), any_number, optional=True, in_float32=True),
        Operand("logits", (0, 1, 2), as_the_first, differentiable=True),
        Operand("camera_logits", (0, 1, 2), as_the_first, differentiable=True, optional=True),
        Operand("keep", (0, 1, 2, 3), flags, optional=True),
    ),
    random=random_feature_aggregation,
    small=lambda: apart_from_edges(
        *random_feature_aggregation(
            13,
            batch_size=1,
            num_queries=2,
            num_points=2,
            channels=2,
            num_groups=2,
            shapes=(((3, 4),), ((3, 2),)),
        )
    ),
    geometries={
        "random": random_feature_aggregation,
        "one camera": partial(random_feature_aggregation, shapes=[[(9, 14), (5, 7)]]),
        "many points": partial(random_feature_aggregation, num_points=40, num_queries=3),
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "points": {"num_points": 0},
        "rows": {"shapes": [[(0, 0), (0, 3)]] * 2},
        "cameras": {"shapes": torch.empty(0, 1, 2, dtype=torch.int64), "spare_rows": 20},
        "levels": {"shapes": torch.empty(2, 0, 2, dtype=torch.int64), "spare_rows": 20},
        "channels": {"channels": 0, "num_groups": 1},
    },
    many={"num_queries": 400, "channels": 126},
    lean={"shapes": [[(9, 14)], [(5, 7)]]},
    sizes=("batch_size", "num_queries", "num_points", "channels", "num_groups"),
    settings=(ATTN_DROP, False),
    keeps=True,
    **SAMPLING,
)

ATTENTION_FROM_OFFSETS = Op(
    "ms_deform_attn_from_offsets",
    ops.ms_deform_attn_from_offsets,
    reference.ms_deform_attn_from_offsets,
    operands=(
        Operand("value", (0, 2), differentiable=True),
        Operand("spatial_shapes", (0, 1), any_integer, any_device=True),
        Operand("level_start_index", (0,), any_integer, any_device=True),
        Operand("reference_points", (0, 1, 3), wide, differentiable=True),
        Operand("sampling_offsets", (0, 1, 2, 3, 4, 5), as_the_first, differentiable=True),
        Operand("attention_logits", (0, 1, 2, 3, 4), as_the_first, differentiable=True),
        Operand("offset_scale", (0,), wide, optional=True),
    ),
    random=inputs.random_offset_inputs,
    small=lambda: inputs.from_offsets(
        inputs.AttentionInputs(
            *off_the_edges(
                *inputs.random_attention_inputs(
                    13, batch_size=1, num_queries=2, num_heads=2, channels=4, num_points=2, shapes=((3, 4), (2, 1))
                )
            )
        ),
        boxes=True,
        scale=(0.5, 0.25),
    ),
    geometries={
        "boxes": inputs.random_offset_inputs,
        "points": partial(inputs.random_offset_inputs, boxes=False),
        "shared boxes": partial(inputs.random_offset_inputs, shared=True),
        "shared points": partial(inputs.random_offset_inputs, boxes=False, shared=True),
        "many points": partial(inputs.random_offset_inputs, num_points=70, num_queries=3),
        "encoder": lambda: inputs.from_offsets(inputs.encoder_inputs()),
        "border": lambda: inputs.from_offsets(inputs.attention_border_inputs()),
        "border boxes": lambda: inputs.from_offsets(inputs.attention_border_inputs(), boxes=True, shared=True),
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "heads": {"num_heads": 0},
        "points": {"num_points": 0},
        "points of boxes": {"num_points": 0, "scaled": False},
        "rows": {"shapes": ((0, 0), (0, 3))},
        "levels": {"shapes": (), "spare_rows": 20, "shared": True},
        "channels": {"channels": 0},
    },
    many={"num_queries": 400, "channels": 128},
    lean={"shapes": [(9, 14)]},
    sizes=("batch_size", "num_queries", "num_heads", "num_points", "channels"),
    **SAMPLING,
)

PROJECTION = Op(
    "project_points",
    ops.project_points,
    reference.project_points,
    operands=(
        Operand("key_points", (0, 3), differentiable=True),
        Operand("projection_mat", (0, 1, 2, 3)),
        Operand("image_wh", (0, 1, 2), any_number, optional=True),
    ),
    random=inputs.random_projection,
    # Ahead of the cameras: behind them slopes are too steep to measure.
    small=partial(inputs.random_projection, 13, batch_size=1, num_queries=2, num_points=2, num_cams=2),
    geometries={
        "random": inputs.random_projection,
        "ahead": partial(inputs.random_projection, depths=(20.0, 30.0)),
        "in pixels": partial(inputs.random_projection, with_image_size=False),
        "many cameras": partial(inputs.random_projection, batch_size=1, num_queries=2, num_cams=70),
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "points": {"num_points": 0},
        "cameras": {"num_cams": 0},
    },
    many={"num_queries": 1000},
    lean={},
    sizes=("batch_size", "num_queries", "num_points", "num_cams"),
    **POINTWISE,
)

BOXES = Op(
    "box_key_points",
    ops.box_key_points,
    reference.box_key_points,
    operands=(
        Operand("anchor", (0, 1), differentiable=True),
        Operand("fix_scale", (1,)),
        Operand("logits", (0, 1), differentiable=True, optional=True),
    ),
    random=inputs.random_boxes,
    small=partial(inputs.random_boxes, 13, batch_size=1, num_queries=2, num_fixed=2, num_learnable=1),
    geometries={
        "random": inputs.random_boxes,
        "8 columns": partial(inputs.random_boxes, columns=8),
        "fixed alone": partial(inputs.random_boxes, columns=9, num_learnable=None),
        "learnable alone": partial(inputs.random_boxes, columns=10, num_fixed=0),
        "no logits": partial(inputs.random_boxes, num_learnable=0),
        "one": partial(inputs.random_boxes, num_fixed=1, num_learnable=None),
        "many": partial(inputs.random_boxes, columns=10, num_fixed=40, num_learnable=70),
    },
    empty={
        "batch": {"batch_size": 0},
        "queries": {"num_queries": 0},
        "points": {"num_fixed": 0, "num_learnable": 0},
        "fixed alone": {"num_fixed": 0, "num_learnable": None},
    },
    many={"num_queries": 1000},
    lean={},
    sizes=("batch_size", "num_queries", "num_fixed", "num_learnable"),
    **POINTWISE,
)

LAYER = Op(
    "linear_relu_norm",
    ops.linear_relu_norm,
    reference.linear_relu_norm,
    operands=(
        Operand("feature", (2,), differentiable=True),
        Operand("weight", (0, 1), differentiable=True),
        Operand("bias", (0,), differentiable=True),
        Operand("norm_weight", (0,), differentiable=True),
        Operand("norm_bias", (0,), differentiable=True),
    ),
    random=inputs.random_layer,
    small=partial(inputs.random_layer, 13, batch_size=1, num_queries=2, in_features=3, out_features=4),
    geometries={
        "random": inputs.random_layer,
        "an encoder's": partial(inputs.random_layer, num_queries=3, in_features=128, out_features=256),
        "many rows": partial(inputs.random_layer, num_queries=700, in_features=12, out_features=40),
        "one feature": partial(inputs.random_layer, in_features=1, out_features=33),
        "no features": partial(inputs.random_layer, in_features=0),
    },
    empty={"batch": {"batch_size": 0}, "queries": {"num_queries": 0}},
    many={"num_queries": 1000},
    lean={},
    sizes=("batch_size", "num_queries", "in_features"),
    has_products=True,
    settings=(1e-5,),
    **POINTWISE,
)

OPS = (AGGREGATION, FEATURE_AGGREGATION, ATTENTION, ATTENTION_FROM_OFFSETS, PROJECTION, BOXES, LAYER)
SAMPLING_OPS = (AGGREGATION, ATTENTION)  # of features, shapes and first rows of levels, locations, weights
FORMS = [(op, True) for op in OPS] + [(op, False) for op in OPS if any(about.optional for about in op.operands)]
"""Every op with its optional operands, and those that have some without."""
