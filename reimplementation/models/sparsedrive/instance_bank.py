"""The instances of a head: those that every frame starts from, and those that one frame hands to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.deformable import SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator

from .config import BankConfig
from .geometry import between_frames


class TemporalState(NamedTuple):
    """What a head remembers of a frame; every tensor is detached.

    feature      (bs, num_temp_instances, embed_dims)
    anchor       (bs, num_temp_instances, anchor_dims), in that frame's coordinates
    confidence   (bs, num_temp_instances), in [0, 1]
    instance_id  (bs, num_temp_instances) int64; -1: none yet
    next_id      (bs,) int64, the id that the sample's next new instance gets
    timestamp    (bs,) float64, seconds; minus infinity: there was no frame
    T_global     (bs, 4, 4) float64, from that frame's coordinates to the global ones
    """

    feature: Tensor
    anchor: Tensor
    confidence: Tensor
    instance_id: Tensor
    next_id: Tensor
    timestamp: Tensor
    T_global: Tensor


class Recalled(NamedTuple):
    """A state as a later frame sees it.

    feature        (bs, num_temp_instances, embed_dims)
    anchor         (bs, num_temp_instances, anchor_dims), moved to this frame's time and coordinates
    confidence     (bs, num_temp_instances); 0 where the sample starts anew
    instance_id    (bs, num_temp_instances); -1 where the sample starts anew
    next_id        (bs,)
    goes_on        (bs,) bool; False: too much time has passed, and the sample starts anew
    time_interval  (bs,) seconds since that frame
    """

    feature: Tensor
    anchor: Tensor
    confidence: Tensor
    instance_id: Tensor
    next_id: Tensor
    goes_on: Tensor
    time_interval: Tensor


class InstanceBank(nn.Module):
    """Anchors and features to start from, and the hand-over from frame to frame (Sparse4Dv2, arXiv 2305.14018).

    Nothing is kept here between calls: a state comes in, and the next one goes out. Nothing waits for the GPU either.

    Args:
        config: how many instances, and how long they are remembered.
        anchor: (num_anchors, anchor_dims), where the anchors start.
        embed_dims: channels of an instance.
        anchor_handler: a key point generator, whose ``anchor_projection`` moves anchors between frames.
        learns_feature: whether the features to start from are trained; otherwise they stay zero.
    """

    def __init__(
        self,
        config: BankConfig,
        anchor: Tensor,
        embed_dims: int,
        anchor_handler: SparseBox3DKeyPointsGenerator | SparsePoint3DKeyPointsGenerator,
        learns_feature: bool = False,
    ):
        super().__init__()
        self.config = config
        self.anchor = nn.Parameter(anchor)
        self.instance_feature = nn.Parameter(torch.zeros(len(anchor), embed_dims), requires_grad=learns_feature)
        if learns_feature:
            nn.init.xavier_uniform_(self.instance_feature)
        self.anchor_handler = anchor_handler

    def start(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """What a frame starts from: features (bs, num_anchors, embed_dims), anchors (bs, num_anchors, anchor_dims)."""
        return self.instance_feature.expand(batch_size, -1, -1), self.anchor.expand(batch_size, -1, -1)

    def initial_state(self, batch_size: int) -> TemporalState:
        """The state before any frame: given to a call, every sample starts anew."""
        kept, device = self.config.num_temp_instances, self.anchor.device
        return TemporalState(
            feature=self.instance_feature.new_zeros(batch_size, kept, self.instance_feature.shape[-1]),
            anchor=self.anchor.detach()[:kept].repeat(batch_size, 1, 1),
            confidence=torch.zeros(batch_size, kept, dtype=self.anchor.dtype, device=device),
            instance_id=torch.full((batch_size, kept), -1, device=device),
            next_id=torch.zeros(batch_size, dtype=torch.int64, device=device),
            timestamp=torch.full((batch_size,), -torch.inf, dtype=torch.float64, device=device),
            T_global=torch.eye(4, dtype=torch.float64, device=device).repeat(batch_size, 1, 1),
        )

    def recall(self, state: TemporalState, timestamp: Tensor, T_global: Tensor) -> Recalled:
        """The state, moved to a frame: by the ego motion, and by each box's velocity.

        Args:
            state: of the last frame.
            timestamp: (bs,) float64, seconds.
            T_global: (bs, 4, 4) float64, from this frame's coordinates to the global ones.
        """
        passed = timestamp - state.timestamp
        goes_on = passed.abs() <= self.config.max_time_interval
        (anchor,) = self.anchor_handler.anchor_projection(
            state.anchor,
            [between_frames(state.T_global, T_global)],
            time_intervals=[-torch.where(goes_on, passed, 0)],
        )
        interval = torch.where(goes_on & (passed != 0), passed, self.config.default_time_interval)
        return Recalled(
            feature=state.feature,
            anchor=anchor,
            confidence=torch.where(goes_on[:, None], state.confidence, 0),
            instance_id=torch.where(goes_on[:, None], state.instance_id, -1),
            next_id=state.next_id,
            goes_on=goes_on,
            time_interval=interval.to(anchor.dtype),
        )

    def merge(self, recalled: Recalled, feature: Tensor, anchor: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The recalled instances, then the best of the frame's own in place of the rest.

        Args:
            feature, anchor, logits: (bs, num_anchors, …), the frame's own instances and their class logits.

        Returns:
            Features and anchors, of the same shapes; unchanged where a sample starts anew.
        """
        free = self.config.num_anchors - self.config.num_temp_instances
        best = logits.amax(dim=-1).topk(free, dim=1).indices
        goes_on = recalled.goes_on[:, None, None]
        merged = []
        for old, new in ((recalled.feature, feature), (recalled.anchor, anchor)):
            joined = torch.cat([old.to(new.dtype), _rows(new, best)], dim=1)
            merged.append(torch.where(goes_on, joined, new))
        return merged[0], merged[1]

    def keep(
        self,
        recalled: Recalled | None,
        feature: Tensor,
        anchor: Tensor,
        logits: Tensor,
        timestamp: Tensor,
        T_global: Tensor,
    ) -> tuple[Tensor, TemporalState]:
        """Give every instance an id, and keep the best for the next frame.

        A recalled instance keeps its id, and it is worth at least its decayed confidence, so that a box which is hidden
        for a moment is not forgotten.

        Args:
            recalled: what this frame recalled; None: nothing.
            feature, anchor, logits: (bs, num_anchors, …), the last layer's instances and their class logits.
            timestamp, T_global: of this frame, as for `recall`.

        Returns:
            Ids (bs, num_anchors) int64, and the state.
        """
        score = logits.detach().amax(dim=-1).to(anchor.dtype).sigmoid()
        if recalled is None:
            confidence = score
            known = torch.full_like(score, -1, dtype=torch.int64)
            next_id = known.new_zeros(len(score))
        else:
            kept = recalled.confidence.shape[1]
            decayed = recalled.confidence * self.config.confidence_decay
            confidence = torch.cat([torch.maximum(decayed, score[:, :kept]), score[:, kept:]], dim=1)
            known = F.pad(recalled.instance_id, (0, score.shape[1] - kept), value=-1)
            next_id = recalled.next_id

        is_new = known < 0
        if self.config.min_score_for_id is not None:
            is_new = is_new & (score >= self.config.min_score_for_id)
        count = is_new.cumsum(dim=1)
        instance_id = torch.where(is_new, next_id[:, None] + count - 1, known)

        confidence, best = confidence.topk(self.config.num_temp_instances, dim=1)
        state = TemporalState(
            feature=_rows(feature.detach(), best),
            anchor=_rows(anchor.detach(), best),
            confidence=confidence,
            instance_id=instance_id.gather(1, best),
            next_id=next_id + count[:, -1],
            timestamp=timestamp,
            T_global=T_global,
        )
        return instance_id, state


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (bs, k, d) of x (bs, n, d), by index (bs, k)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
