"""Multi-scale deformable attention as a module: offsets, weights and values from queries and features, then the op."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.models.autocast import cast_for_linears
from reimplementation.models.checks import check_positive, check_tensors
from reimplementation.ops.checks import check_dtype, check_shape
from reimplementation.ops.dtypes import INTEGER, at_least_float32


class MSDeformAttn(nn.Module):
    """Attention of queries to a few points of every level of a feature pyramid.

    Each query predicts, for every head and level, sampling offsets from its reference point and one softmax over the
    points of all levels; the heads' weighted samples are projected together. This is the module of Deformable DETR
    (arXiv 2010.04159, section 4.1), which Mask2Former, DINO and DINOv3's segmentation head share; arguments, parameter
    names and initialisation are theirs.

    Args:
        d_model: channels of queries, features and output; a multiple of ``n_heads``.
        n_levels: levels of the pyramid.
        n_heads: attention heads.
        n_points: points that a head samples in each level.
        ratio: channels of the projected value, over ``d_model``. ``int(d_model * ratio)`` is a multiple of ``n_heads``.
            (ViT-Adapter and DINOv3 set it below 1.)

    Raises:
        ValueError: a setting is less than 1, or the channels do not divide among the heads.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, ratio: float = 1.0):
        super().__init__()
        check_positive(d_model=d_model, n_levels=n_levels, n_heads=n_heads, n_points=n_points)
        value_channels = int(d_model * ratio)
        for name, channels in (("d_model", d_model), ("int(d_model * ratio)", value_channels)):
            if channels % n_heads != 0 or channels < 1:
                raise ValueError(f"{name} must be a multiple of n_heads={n_heads}; got {channels}")
        head_channels = value_channels // n_heads
        if head_channels & (head_channels - 1):
            warnings.warn(
                f"MSDeformAttn is fastest where a head's channels are a power of two; got {value_channels} channels "
                f"for {n_heads} heads, {head_channels} each",
                stacklevel=2,
            )
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.ratio = ratio

        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, value_channels)
        self.output_proj = nn.Linear(value_channels, d_model)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Initialise. Deformable DETR's transformer calls this name on its modules."""
        offsets = initial_offsets(self.n_heads, self.n_points)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets[:, None].expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (N, Lq, d_model).
            reference_points: (N, Lq, n_levels, 2), (x, y) normalised to [0, 1]: offsets are then pixels of the level;
                or (N, Lq, n_levels, 4), centre and size (x, y, w, h) of a box: offsets are then multiples of half its
                size, divided by ``n_points``. N and n_levels may be 1 for points that all share.
            input_flatten: (N, S, d_model), the rows of all levels.
            input_spatial_shapes: (n_levels, 2) integer (H, W), on the CPU or the input's device.
            input_level_start_index: (n_levels,) integer, the first row of each level; likewise.
            input_padding_mask: (N, S) bool, True where the input is padding and counts as zero.

        Returns:
            (N, Lq, d_model). Sampling locations are computed in float32, also from half-precision offsets: half
            precision cannot address a pixel.

        Raises:
            ValueError: a shape does not fit, or shapes on the CPU do not add up to S. (Shapes on a GPU are not read,
                that would wait for it; a level that reaches beyond the input contributes nothing.)
            TypeError: an argument has the wrong type.
        """
        check_tensors({"query": query, "reference_points": reference_points, "input_flatten": input_flatten})
        check_dtype("input_spatial_shapes", input_spatial_shapes, INTEGER)
        check_dtype("input_level_start_index", input_level_start_index, INTEGER)
        sizes: dict[str, int] = {"d_model": self.d_model, "n_levels": self.n_levels}
        check_shape("query", query, ("N", "Lq", "d_model"), sizes)
        check_shape("input_flatten", input_flatten, ("N", "S", "d_model"), sizes)
        check_shape("input_spatial_shapes", input_spatial_shapes, ("n_levels", 2), sizes)
        check_shape("input_level_start_index", input_level_start_index, ("n_levels",), sizes)
        if input_padding_mask is not None:
            check_dtype("input_padding_mask", input_padding_mask, (torch.bool,))
            check_shape("input_padding_mask", input_padding_mask, ("N", "S"), sizes)
        _check_reference_points(reference_points, sizes)
        _check_total(input_spatial_shapes, sizes["S"])

        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        query = cast_for_linears(query)  # once for both
        samples = (self.n_heads, self.n_levels, self.n_points)
        output = ops.ms_deform_attn_from_offsets(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            input_level_start_index,
            at_least_float32(reference_points).expand(sizes["N"], -1, -1, -1),
            self.sampling_offsets(query).unflatten(-1, (*samples, 2)),
            self.attention_weights(query).unflatten(-1, samples),
        )
        return self.output_proj(output)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}, "
            f"ratio={self.ratio}"
        )


def initial_offsets(n_heads: int, n_points: int) -> Tensor:
    """(n_heads, n_points, 2) pixels: heads look in directions all around, their points 1, 2, ... pixels away.

    The distance is that of the larger coordinate, so that with 8 heads the points lie at the centres of pixels.
    """
    angles = torch.arange(n_heads, dtype=torch.float32) * (2 * math.pi / n_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return directions[:, None] * torch.arange(1, n_points + 1, dtype=torch.float32)[:, None]


def _check_reference_points(points: Tensor, sizes: dict[str, int]) -> None:
    # Dynamo, in some versions, does not find a symbolic size in a tuple: so each is compared.
    fits = points.dim() == 4 and points.shape[-1] in (2, 4) and points.shape[1] == sizes["Lq"]
    fits = fits and (points.shape[0] == 1 or points.shape[0] == sizes["N"])
    if not (fits and (points.shape[2] == 1 or points.shape[2] == sizes["n_levels"])):
        given = ", ".join(f"{name}={sizes[name]}" for name in ("N", "Lq", "n_levels"))
        raise ValueError(
            f"reference_points must be (N, Lq, n_levels, 2 or 4) with {given}, N and n_levels may be 1; "
            f"got {tuple(points.shape)}"
        )


def _check_total(spatial_shapes: Tensor, num_values: int) -> None:
    """Compare the pixels of all levels with the input's rows, where reading them does not wait for a GPU."""
    if spatial_shapes.device.type != "cpu" or torch.compiler.is_compiling():
        return
    total = sum(height * width for height, width in spatial_shapes.tolist())
    if total != num_values:
        raise ValueError(
            f"input_spatial_shapes {spatial_shapes.tolist()} add up to {total} pixels, but input_flatten has "
            f"S={num_values} rows: they must be equal"
        )
