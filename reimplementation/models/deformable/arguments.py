"""What `DeformableFeatureAggregation` is called with: tensors that fit one another, and formatted maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from reimplementation import ops
from reimplementation.models.checks import check_tensors
from reimplementation.ops.checks import check_device, check_shape


class Sizes(NamedTuple):
    """What a module was built for."""

    embed_dims: int
    num_cams: int
    num_levels: int


class Arguments(NamedTuple):
    """The arguments of a call, as the module's ``forward`` describes them."""

    instance_feature: Tensor
    anchor: Tensor
    anchor_embed: Tensor
    feature_maps: Sequence[Tensor]
    projection_mat: Tensor
    image_wh: Tensor | None


def cameras(metas: Mapping) -> tuple[Tensor, Tensor | None]:
    """The projection matrices and the images' sizes.

    Raises:
        KeyError: there are no matrices.
        TypeError: the metas are no dict.
    """
    expected = "'projection_mat' (bs, num_cams, 4, 4), and may hold 'image_wh'"
    if not isinstance(metas, Mapping):
        raise TypeError(f"metas must be a dict that holds {expected}; got {type(metas).__name__}")
    if "projection_mat" not in metas:
        raise KeyError(f"metas must hold {expected}; got the keys {list(metas)}")
    return metas["projection_mat"], metas.get("image_wh")


def checked(arguments: Arguments, sizes: Sizes) -> Arguments:
    """The arguments, their maps formatted.

    Raises:
        ValueError: an argument has the wrong shape, or is on another device.
        TypeError: an argument has the wrong type.
    """
    return arguments if _fit(arguments, sizes) else _checked_one_by_one(arguments, sizes)


def _fit(arguments: Arguments, sizes: Sizes) -> bool:
    """Whether these are formatted maps, and tensors of the right sizes: to check them one by one takes longer."""
    feature, _, embed, maps, projection_mat, _ = arguments
    if not _is_formatted(maps):
        return False
    rows, shapes, _ = maps
    return (
        all([type(tensor) is Tensor for tensor in (*arguments[:3], projection_mat, rows)])
        and feature.dim() == rows.dim() == 3
        and feature.shape[2] == rows.shape[2] == sizes.embed_dims
        and feature.shape == embed.shape
        and feature.shape[0] == rows.shape[0]
        and projection_mat.shape == (feature.shape[0], sizes.num_cams, 4, 4)
        and shapes.shape == (sizes.num_cams, sizes.num_levels, 2)
        and feature.device == rows.device
    )


def _checked_one_by_one(arguments: Arguments, sizes: Sizes) -> Arguments:
    feature, anchor, embed, maps, projection_mat, _ = arguments
    check_tensors(
        {
            "instance_feature": feature,
            "anchor": anchor,
            "anchor_embed": embed,
            "metas['projection_mat']": projection_mat,
        }
    )
    known = sizes._asdict()
    check_shape("instance_feature", feature, ("bs", "num_anchor", "embed_dims"), known)
    check_shape("metas['projection_mat']", projection_mat, ("bs", "num_cams", 4, 4), known)
    _check_embed(embed, feature)
    formatted = _formatted(maps, known)
    check_device("feature_maps", formatted[0], feature.device)
    return arguments._replace(feature_maps=formatted)


def _check_embed(anchor_embed: Tensor, instance_feature: Tensor) -> None:
    """Raise ValueError unless the embedding has the feature's shape, or broadcasts to it."""
    shape, wanted = anchor_embed.shape, instance_feature.shape
    if shape == wanted:
        return
    if len(shape) > len(wanted) or any(a != 1 and a != b for a, b in zip(reversed(shape), reversed(wanted))):
        raise ValueError(
            "anchor_embed must be (bs, num_anchor, embed_dims), or broadcast to it, "
            f"with bs={wanted[0]}, num_anchor={wanted[1]}, embed_dims={wanted[2]}; got {tuple(shape)}"
        )


def _formatted(feature_maps: Sequence, sizes: dict[str, int]) -> Sequence[Tensor]:
    """What `ops.feature_maps_format` makes of the maps, if it has not yet; errors speak of what the caller gave."""
    if _is_formatted(feature_maps):
        check_tensors({"feature_maps[0]": feature_maps[0]})
        check_shape("feature_maps[0]", feature_maps[0], ("bs", "num_feat", "embed_dims"), sizes)
        check_shape("feature_maps[1]", feature_maps[1], ("num_cams", "num_levels", 2), sizes)
        return feature_maps
    formatted = ops.feature_maps_format(feature_maps)
    (bs, _, channels), (num_cams, num_levels, _) = formatted[0].shape, formatted[1].shape
    got = {"num_levels": num_levels, "bs": bs, "num_cams": num_cams, "embed_dims": channels}
    if any(got[name] != sizes[name] for name in got):
        expected, came = (", ".join(f"{name}={known[name]}" for name in got) for known in (sizes, got))
        raise ValueError(
            f"feature_maps must be num_levels maps of (bs, num_cams, embed_dims, H, W) with {expected}; got {came}"
        )
    return formatted


def _is_formatted(feature_maps: Sequence) -> bool:
    """Whether this is [col_feats, spatial_shape, scale_start_index]: integers in second place, no level."""
    return (
        isinstance(feature_maps, (list, tuple))
        and len(feature_maps) == 3
        and isinstance(feature_maps[1], Tensor)
        and not feature_maps[1].is_floating_point()
    )
