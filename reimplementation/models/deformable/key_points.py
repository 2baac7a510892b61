"""Key points of an anchor: the 3D points at which a query looks into the images.

Both generators also say where the key points were in earlier frames, and move anchors between frames. The
parameters keep the names they have in SparseDrive (arXiv:2405.19620) and Sparse4D (arXiv:2211.10581), whose
checkpoints load; those of Sparse4D v3 need a generator of their own where anchors move between frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.models.checks import check_positive, check_tensors
from reimplementation.ops.box_key_points import CENTRE, LOG_SIZE, SIN_COS_YAW, VELOCITY, check_box_anchor
from reimplementation.ops.checks import check_shape
from reimplementation.ops.dtypes import at_least_float32
from reimplementation.ops.transforms import transform

from .transforms import displacement, in_3d, rotate, with_past_frames


class SparseBox3DKeyPointsGenerator(nn.Module):
    """Key points on and in a 3D box: some at fixed places, some placed by the query's feature.

    A box anchor holds (x, y, z, log w, log l, log h, sin yaw, cos yaw) and up to three components of
    velocity. The first of the three sizes is the extent along the heading.

    Args:
        embed_dims: channels of the instance feature.
        num_learnable_pts: key points placed by a linear layer on the instance feature, anywhere in the box.
        fix_scale: (num_fixed, 3) places of the fixed key points in units of the box's sizes, from its centre:
            0.5 is on a face. Default: the centre alone.

    Attributes:
        num_pts: ``num_fixed + num_learnable_pts``.

    Raises:
        ValueError: ``fix_scale`` is not (num_fixed, 3), or a number is out of its range.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_learnable_pts: int = 0,
        fix_scale: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__()
        check_positive(embed_dims=embed_dims)
        _check_learnable(num_learnable_pts)
        self.embed_dims = embed_dims
        self.num_learnable_pts = num_learnable_pts
        self._configured_fix_scale = ((0.0, 0.0, 0.0),) if fix_scale is None else fix_scale
        fixed = torch.as_tensor(self._configured_fix_scale, dtype=torch.get_default_dtype()).clone()
        check_shape("fix_scale", fixed, ("num_fixed", 3), {})
        self.fix_scale = nn.Parameter(fixed, requires_grad=False)
        self.num_pts = len(fixed) + num_learnable_pts
        if num_learnable_pts > 0:
            self.learnable_fc = nn.Linear(embed_dims, num_learnable_pts * 3)

    def init_weight(self) -> None:
        """Xavier weights and no bias for the linear layer; the fixed places as configured.

        A head that fills every matrix among its parameters with random numbers, as SparseDrive's does before
        it calls this, has overwritten ``fix_scale`` too.
        """
        self._reset_fix_scale()
        if self.num_learnable_pts > 0:
            nn.init.xavier_uniform_(self.learnable_fc.weight)
            nn.init.zeros_(self.learnable_fc.bias)

    @torch.no_grad()
    def _reset_fix_scale(self) -> None:
        self.fix_scale.copy_(torch.as_tensor(self._configured_fix_scale, device=self.fix_scale.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        # SparseDrive's checkpoints leave the fixed places to the configuration, Sparse4D's store them.
        if prefix + "fix_scale" in missing_keys:
            missing_keys.remove(prefix + "fix_scale")
            if strict:  # which promises every value, also to a module that was built on the meta device
                self._reset_fix_scale()

    def forward(
        self,
        anchor: Tensor,
        instance_feature: Tensor | None = None,
        T_cur2temp_list: Sequence[Tensor] | None = None,
        cur_timestamp: Tensor | None = None,
        temp_timestamps: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Place the key points.

        Args:
            anchor: (bs, num_anchor, 8 to 11), any floating dtype.
            instance_feature: (bs, num_anchor, embed_dims). Without it there are no learnable points.
            T_cur2temp_list: per earlier frame (bs, 4, 4), from the current frame to that one.
            cur_timestamp: (bs,), seconds.
            temp_timestamps: per earlier frame (bs,), seconds.

        Returns:
            (bs, num_anchor, num_pts, 3), metres, in the dtype of ``anchor`` but at least float32. When the
            three temporal arguments are given and there is an earlier frame: that, and a list of the same
            shape per earlier frame, where the boxes have moved back at their velocity.

        Raises:
            ValueError: an argument has the wrong shape.
            TypeError: an argument has the wrong type.
        """
        check_tensors({"anchor": anchor})
        check_box_anchor(anchor)
        logits = None
        if self.num_learnable_pts > 0 and instance_feature is not None:
            _check_feature(instance_feature, anchor, self.embed_dims)
            logits = self.learnable_fc(instance_feature)
        key_points = ops.box_key_points(anchor, self.fix_scale, logits)
        velocity = None if temp_timestamps is None else at_least_float32(anchor[..., VELOCITY])
        return with_past_frames(key_points, velocity, T_cur2temp_list, cur_timestamp, temp_timestamps)

    @staticmethod
    def anchor_projection(
        anchor: Tensor,
        T_src2dst_list: Sequence[Tensor],
        src_timestamp: Tensor | None = None,
        dst_timestamps: Sequence[Tensor] | None = None,
        time_intervals: Sequence[Tensor | float] | None = None,
    ) -> list[Tensor]:
        """Boxes in the coordinates, and at the time, of other frames.

        Args:
            anchor: (bs, num_anchor, 8 to 11), any floating dtype.
            T_src2dst_list: per target frame (bs, 4, 4), from the anchors' frame to that one.
            src_timestamp: (bs,), seconds.
            dst_timestamps: per target frame (bs,), seconds.
            time_intervals: per target frame (bs,) or a scalar: source time minus target time, seconds; goes
                before the timestamps. With neither the boxes do not move.

        Returns:
            Per target frame the anchors, shape and dtype of ``anchor``. Heading and velocity turn with the
            frame.

        Raises:
            ValueError: ``anchor`` has the wrong shape.
            TypeError: ``anchor`` is no tensor.
        """
        check_tensors({"anchor": anchor})
        check_box_anchor(anchor)
        source = at_least_float32(anchor)
        velocity = source[..., VELOCITY]
        heading = source[..., SIN_COS_YAW].flip(-1)
        anchors = []
        for frame, T_src2dst in enumerate(T_src2dst_list):
            matrix = T_src2dst.to(source.dtype)[:, None]
            centre = source[..., CENTRE]
            if time_intervals is not None:
                centre = centre - displacement(velocity, time_intervals[frame])
            elif src_timestamp is not None and dst_timestamps is not None:
                centre = centre - displacement(velocity, src_timestamp - dst_timestamps[frame])
            parts = [
                transform(centre, matrix[..., :3, :]),
                source[..., LOG_SIZE],
                rotate(heading, matrix[..., :2, :2]).flip(-1),
                rotate(in_3d(velocity), matrix[..., :3, :3])[..., : velocity.shape[-1]],
            ]
            anchors.append(torch.cat(parts, dim=-1).to(anchor.dtype))
        return anchors

    @staticmethod
    def distance(anchor: Tensor) -> Tensor:
        """Distance (...) of anchors (..., d >= 2) from the origin in the ground plane, metres."""
        return torch.linalg.vector_norm(anchor[..., :2], dim=-1)

    def extra_repr(self) -> str:
        return f"embed_dims={self.embed_dims}, num_fixed={len(self.fix_scale)}, num_pts={self.num_pts}"


class Sparse4DBox3DKeyPointsGenerator(SparseBox3DKeyPointsGenerator):
    """`SparseBox3DKeyPointsGenerator` for checkpoints of Sparse4D v3 (arXiv:2311.11722).

    Sparse4D turns the heading of an anchor as (cos yaw, sin yaw), and leaves it in that order where (sin yaw, cos yaw)
    was; SparseDrive puts it back. A model that was trained on anchors of earlier frames in the one order computes
    something else with the other, so these checkpoints need this class where the instance bank projects its cached
    anchors (its ``anchor_handler``). Key points, parameters and everything else are the same.
    """

    @staticmethod
    def anchor_projection(
        anchor: Tensor,
        T_src2dst_list: Sequence[Tensor],
        src_timestamp: Tensor | None = None,
        dst_timestamps: Sequence[Tensor] | None = None,
        time_intervals: Sequence[Tensor | float] | None = None,
    ) -> list[Tensor]:
        """`SparseBox3DKeyPointsGenerator.anchor_projection`, with the headings of its results in swapped order.

        The arguments are the same; so is what it returns, but that (cos yaw, sin yaw) stands in components 6 and 7.
        """
        projected = SparseBox3DKeyPointsGenerator.anchor_projection(
            anchor, T_src2dst_list, src_timestamp, dst_timestamps, time_intervals
        )
        # Slices, for an index would be copied to a GPU at each call.
        before, heading, after = slice(SIN_COS_YAW.start), SIN_COS_YAW, slice(SIN_COS_YAW.stop, None)
        return [torch.cat([f[..., before], f[..., heading].flip(-1), f[..., after]], dim=-1) for f in projected]


class SparsePoint3DKeyPointsGenerator(nn.Module):
    """Key points around the points of a polyline on the ground: a map element.

    An anchor holds the (x, y) of ``num_sample`` points. Around each of them, at each height, a linear layer
    on the query's feature places ``num_learnable_pts`` key points.

    Args:
        embed_dims: channels of the instance feature.
        num_sample: points of a polyline.
        num_learnable_pts: key points per polyline point and height; at least 1 to be called.
        fix_height: heights above the ground, metres.
        ground_height: z of the ground, metres.

    Attributes:
        num_pts: ``num_sample * len(fix_height) * num_learnable_pts``.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_sample: int = 20,
        num_learnable_pts: int = 0,
        fix_height: Sequence[float] = (0,),
        ground_height: float = 0,
    ):
        super().__init__()
        check_positive(embed_dims=embed_dims, num_sample=num_sample)
        _check_learnable(num_learnable_pts)
        self.embed_dims = embed_dims
        self.num_sample = num_sample
        self.num_learnable_pts = num_learnable_pts
        self.num_pts = num_sample * len(fix_height) * num_learnable_pts
        self.ground_height = ground_height
        # Numbers, no buffer: a module built on the meta device would never get back a buffer that no checkpoint has.
        self.fix_height = tuple(fix_height)
        if num_learnable_pts > 0:
            self.learnable_fc = nn.Linear(embed_dims, self.num_pts * 2)

    def init_weight(self) -> None:
        """Xavier weights and no bias for the linear layer."""
        if self.num_learnable_pts > 0:
            nn.init.xavier_uniform_(self.learnable_fc.weight)
            nn.init.zeros_(self.learnable_fc.bias)

    def forward(
        self,
        anchor: Tensor,
        instance_feature: Tensor | None = None,
        T_cur2temp_list: Sequence[Tensor] | None = None,
        cur_timestamp: Tensor | None = None,
        temp_timestamps: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Place the key points.

        Args:
            anchor: (bs, num_anchor, num_sample * 2), any floating dtype.
            instance_feature: (bs, num_anchor, embed_dims).
            T_cur2temp_list: per earlier frame (bs, 4, 4), from the current frame to that one.
            cur_timestamp: (bs,), seconds.
            temp_timestamps: per earlier frame (bs,), seconds.

        Returns:
            (bs, num_anchor, num_pts, 3), metres, in the dtype of ``anchor`` but at least float32; polyline
            points outermost, then heights. When the three temporal arguments are given and there is an
            earlier frame: that, and a list of the same shape per earlier frame. A map stands still.

        Raises:
            ValueError: there are no learnable points or no instance feature, or a shape is wrong.
            TypeError: ``anchor`` or ``instance_feature`` is no tensor.
        """
        if self.num_learnable_pts <= 0 or instance_feature is None:
            raise ValueError(
                "SparsePoint3DKeyPointsGenerator needs num_learnable_pts >= 1 and an instance_feature; "
                f"got num_learnable_pts={self.num_learnable_pts} and "
                f"{'no' if instance_feature is None else 'an'} instance_feature"
            )
        points = self._polyline(anchor)[:, :, :, None, None]
        _check_feature(instance_feature, anchor, self.embed_dims)
        places = (self.num_sample, len(self.fix_height), self.num_learnable_pts, 2)
        xy = points + self.learnable_fc(instance_feature).to(points.dtype).unflatten(-1, places)
        ground = torch.full_like(xy[:, :, :, :1, :, :1], self.ground_height)
        z = torch.cat([ground + height for height in self.fix_height], dim=3)
        key_points = torch.cat([xy, z], dim=-1).flatten(2, 4)

        return with_past_frames(key_points, None, T_cur2temp_list, cur_timestamp, temp_timestamps)

    def anchor_projection(
        self,
        anchor: Tensor,
        T_src2dst_list: Sequence[Tensor],
        src_timestamp: Tensor | None = None,
        dst_timestamps: Sequence[Tensor] | None = None,
        time_intervals: Sequence[Tensor | float] | None = None,
    ) -> list[Tensor]:
        """Polylines in the coordinates of other frames, seen from above.

        Args:
            anchor: (bs, num_anchor, num_sample * 2), any floating dtype.
            T_src2dst_list: per target frame (bs, 4, 4), from the anchors' frame to that one.
            src_timestamp, dst_timestamps, time_intervals: taken so that both generators are called alike; a
                map stands still.

        Returns:
            Per target frame the anchors, shape and dtype of ``anchor``.

        Raises:
            ValueError: ``anchor`` has the wrong shape.
            TypeError: ``anchor`` is no tensor.
        """
        points = self._polyline(anchor)
        anchors = []
        for T_src2dst in T_src2dst_list:
            matrix = T_src2dst.to(points.dtype)[:, None, None]
            on_ground = torch.cat([matrix[..., :2, :2], matrix[..., :2, 3:]], dim=-1)
            anchors.append(transform(points, on_ground).flatten(2).to(anchor.dtype))
        return anchors

    def extra_repr(self) -> str:
        return f"embed_dims={self.embed_dims}, num_sample={self.num_sample}, num_pts={self.num_pts}"

    def _polyline(self, anchor: Tensor) -> Tensor:
        """The points (bs, num_anchor, num_sample, 2) of the anchors, in at least float32."""
        check_tensors({"anchor": anchor})
        check_shape("anchor", anchor, ("bs", "num_anchor", self.num_sample * 2), {})
        return at_least_float32(anchor).unflatten(-1, (self.num_sample, 2))


def check_key_points(key_points: Tensor, instance_feature: Tensor, num_pts: int) -> None:
    """Raise ValueError unless every instance feature (bs, num_anchor, ...) has that many key points."""
    sizes = {"bs": instance_feature.shape[0], "num_anchor": instance_feature.shape[1]}
    check_shape("key_points", key_points, ("bs", "num_anchor", num_pts, 3), sizes)


def _check_learnable(num_learnable_pts: int) -> None:
    if num_learnable_pts < 0:
        raise ValueError(f"num_learnable_pts must be at least 0; got {num_learnable_pts}")


def _check_feature(instance_feature: Tensor, anchor: Tensor, embed_dims: int) -> None:
    check_tensors({"instance_feature": instance_feature})
    sizes = {"bs": anchor.shape[0], "num_anchor": anchor.shape[1]}
    check_shape("instance_feature", instance_feature, ("bs", "num_anchor", embed_dims), sizes)
