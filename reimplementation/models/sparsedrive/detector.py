"""The whole detector: images to boxes and map lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from reimplementation.models.backbones.resnet import ResNet
from reimplementation.models.backbones.vit.feature_map import ViTFeatureMap
from reimplementation.models.checks import check_tensors
from reimplementation.models.necks.fpn import FPN
from reimplementation.models.necks.simple_pyramid import SimpleFeaturePyramid
from reimplementation.ops.checks import check_shape

from .box_loss import box_losses
from .branch import Branch
from .config import SparseDriveConfig
from .decoding import decode_detections, decode_lines
from .denoising import Denoising, DenoisingState, draw_queries, go_on, known_boxes
from .depth import DepthBranch, depth_loss
from .feature_rows import feature_rows
from .head import SparseHead, box_head, line_head
from .instance_bank import TemporalState
from .line_loss import line_losses
from .targets import pad_boxes, pad_lines

State = dict[str, TemporalState | DenoisingState]
SCALES = (4.0, 2.0, 1.0, 0.5)  # of a pyramid's levels, times a ViT's map
METAS = ("projection_mat", "image_wh", "timestamp", "T_global")


class Heads(nn.Module):
    """SparseDrive's two heads, held together for their parameters' names."""

    def __init__(self, config: SparseDriveConfig):
        super().__init__()
        self.det_head = box_head(config)
        if config.map is not None:
            self.map_head = line_head(config)


class SparseDrive(nn.Module):
    """SparseDrive's perception (arXiv 2405.19620): boxes and map lines from cameras around a car, frame by frame.

    A ResNet and an FPN make feature maps; two sparse heads look into them at the key points of 900 boxes and 100 lines.
    The best boxes of a frame are handed to the next (Sparse4Dv3, arXiv 2311.11722). A configuration of the family
    "sparse4d" is that paper's detector. Parameters have the names of the public checkpoints.

    Args:
        config: what to build; default: SparseDrive-S.
    """

    def __init__(self, config: SparseDriveConfig | None = None):
        super().__init__()
        self.config = config = SparseDriveConfig() if config is None else config
        self.img_backbone, self.img_neck = _image_network(config)
        self.head = Heads(config) if config.family == "sparsedrive" else box_head(config)
        if config.num_depth_levels > 0:
            self.depth_branch = DepthBranch(config.embed_dims, config.num_depth_levels)
        # The aggregation reads a pixel's channels side by side: where convolutions write them so, no one transposes.
        for part in (self.img_backbone, self.img_neck):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._state: State | None = None

    @property
    def heads(self) -> dict[str, SparseHead]:
        """The heads by their names in the outputs, ``det`` and maybe ``map``."""
        if isinstance(self.head, SparseHead):
            return {"det": self.head}
        heads = ((name.removesuffix("_head"), head) for name, head in self.head.named_children())
        return {name: head for name, head in heads if isinstance(head, SparseHead)}

    def forward(
        self,
        images: Tensor,
        metas: Mapping[str, Tensor],
        state: State | None = None,
        targets: Mapping[str, Sequence[Tensor]] | None = None,
        every_layer: bool = True,
    ) -> dict | tuple[dict, State]:
        """Detect in one frame of each sample.

        Args:
            images: (bs, num_cams, 3, H, W), normalised.
            metas: ``projection_mat`` (bs, num_cams, 4, 4), from the lidar's frame to pixels; ``image_wh`` (bs,
                num_cams, 2) in pixels; ``timestamp`` (bs,) in seconds; ``T_global`` (bs, 4, 4), rigid, from the lidar's
                frame to the global one. The last two had better be float64: float32 tells the seconds of today's clocks
                apart only by minutes. For the depth branch in training also ``focal`` (bs, num_cams) in pixels.
            state: of the last frame, as this function or `initial_state` returned it. None: the model keeps its own,
                which `reset` forgets, and which is forgotten where the batch has another size than before.
            targets: in training, the ground truth for denoising, as `loss` takes it; only read if the configuration has
                denoising groups.
            every_layer: False leaves out classes and quality of the layers from which nothing follows.

        Returns:
            ``outputs``: for each head, ``outputs["det"]`` and ``outputs["map"]``, the lists ``classification``,
            ``prediction`` and ``quality``, an entry a decoder layer: class logits (bs, n, num_classes); boxes (bs, n,
            11) as x, y, z, three log sizes, sine and cosine of the yaw, vx, vy, vz, or lines (bs, n, 2 * num_points),
            metres; logits (bs, n, 2) of centerness and yawness, or None. ``outputs["det"]["instance_id"]`` (bs, n)
            int64. ``outputs["depth"]`` in training. With ``state``: ``(outputs, new state)``.

        Raises:
            KeyError: ``metas`` lacks an entry.
            ValueError: a shape is wrong.
            TypeError: something is no tensor.
        """
        if state is not None:
            return self.step(images, metas, state, targets, every_layer)
        kept = self._state
        if kept and len(next(iter(kept.values())).feature) != len(images):
            kept = None
        outputs, self._state = self.step(images, metas, kept, targets, every_layer)
        return outputs

    def step(
        self,
        images: Tensor,
        metas: Mapping[str, Tensor],
        state: State | None,
        targets: Mapping[str, Sequence[Tensor]] | None = None,
        every_layer: bool = True,
    ) -> tuple[dict, State]:
        """`forward` as a function: nothing is kept, and ``state=None`` means that there was no frame before."""
        metas = self._checked(images, metas)
        state = {} if state is None else state
        for remembered in state.values():
            if len(remembered.feature) != len(images):
                raise ValueError(f"state is of {len(remembered.feature)} samples, and images of {len(images)}")
        levels = self.image_features(images)
        feature_maps = feature_rows(levels, self.config.num_cams)
        outputs: dict = {}
        new_state: State = {}
        branch = Branch(images.device)
        for name, head in self.heads.items():
            denoising = self._denoising(metas, state, targets) if name == "det" else None
            with nullcontext() if name == "det" else branch:
                outputs[name], remembered = head(feature_maps, metas, state.get(name), denoising, every_layer)
            if remembered is not None:
                new_state[name] = remembered
            if denoising is not None:
                new_state["denoising"] = denoising.keep(outputs["det"]["denoising"], self.config.det.denoising)
        branch.join()
        if self.training and self.config.num_depth_levels > 0 and "focal" in metas:
            outputs["depth"] = self.depth_branch(levels, metas["focal"])
        return outputs, new_state

    def image_features(self, images: Tensor) -> list[Tensor]:
        """The pyramid [(bs * num_cams, embed_dims, H_i, W_i)], finest first, in channels-last memory."""
        flat = images.flatten(0, 1).to(next(self.img_backbone.parameters()).dtype, memory_format=torch.channels_last)
        return self.img_neck(self.img_backbone(flat)[: self.config.num_levels])

    def initial_state(self, batch_size: int) -> State:
        """The state before the first frame, for `forward`."""
        return {
            name: head.instance_bank.initial_state(batch_size)
            for name, head in self.heads.items()
            if head.instance_bank.config.num_temp_instances > 0
        }

    def reset(self) -> None:
        """Forget the instances of earlier frames that the model keeps itself."""
        self._state = None

    def decode(self, outputs: Mapping) -> list[dict[str, Tensor]]:
        """Boxes and lines of each sample, best first.

        Returns:
            Per sample ``boxes_3d`` (k, 9): x, y, z, three sizes (the first along the heading), yaw, vx, vy in metres,
            radians and metres a second; ``scores_3d`` (k,), ``labels_3d`` (k,), ``instance_ids`` (k,); and with a map
            head ``map_lines`` (k, num_points, 2) in metres, ``map_scores`` (k,), ``map_labels`` (k,).
        """
        found = decode_detections(outputs["det"], self.config.det.num_outputs)
        if "map" in outputs:
            found = [{**boxes, **lines} for boxes, lines in zip(found, decode_lines(outputs["map"]))]
        return found

    def loss(self, outputs: Mapping, targets: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The weighted terms, by SparseDrive's names; their sum is what to minimise.

        Args:
            outputs: of `forward`.
            targets: lists over samples: ``labels_3d`` (n,), ``boxes_3d`` (n, 9) as `decode` gives them, NaN where a
                value is not known; ``map_labels`` (n,), ``map_lines`` (n, num_points, 2) in metres. ``depth``: a list
                over levels of maps (bs, num_cams, H, W) in metres, 0 where nothing was measured. A head without targets
                gets no loss.

        Returns:
            ``det_loss_cls_0``, ``det_loss_box_0``, ``det_loss_cns_0``, ``det_loss_yns_0``, …, ``map_loss_cls_0``,
            ``map_loss_line_0``, …, ``loss_dense_depth``: scalars.

        Raises:
            ValueError: targets do not fit the outputs.
            ImportError: scipy is missing, which the extra ``train`` brings.
        """
        terms: dict[str, Tensor] = {}
        if "labels_3d" in targets:
            boxes = pad_boxes(targets, self.config.det, outputs["det"]["prediction"][-1])
            losses = box_losses(outputs["det"], boxes, self.config.det)
            terms.update({f"det_{name}": term for name, term in losses.items()})
        if self.config.map is not None and "map_labels" in targets:
            lines = pad_lines(targets, self.config.map, outputs["map"]["prediction"][-1])
            losses = line_losses(outputs["map"], lines, self.config.map)
            terms.update({f"map_{name}": term for name, term in losses.items()})
        if "depth" in targets and "depth" in outputs:
            loss = depth_loss(outputs["depth"], targets["depth"], self.config.max_depth)
            terms["loss_dense_depth"] = self.config.loss_depth * loss
        return terms

    def _denoising(self, metas: Mapping[str, Tensor], state: State, targets: Mapping | None) -> Denoising | None:
        """Queries around the targets, in training and where the configuration asks for them."""
        config = self.config.det.denoising
        if not self.training or targets is None or config.num_groups == 0:
            return None
        bank = self.heads["det"].instance_bank
        _, anchor = bank.start(len(metas["timestamp"]))
        known = known_boxes(targets, self.config.det, like=anchor)
        num_classes = len(self.config.det.classes)
        denoising = draw_queries(known, config, self.config.det.cost_weights, num_classes)
        last, queries = state.get("det"), state.get("denoising")
        if config.num_temp_groups > 0 and isinstance(last, TemporalState) and isinstance(queries, DenoisingState):
            moved = bank.recall(last._replace(anchor=queries.anchor), metas["timestamp"], metas["T_global"])
            recalled = queries._replace(anchor=moved.anchor)
            denoising = go_on(denoising, known, recalled, moved.goes_on, num_classes)
        return denoising

    def _checked(self, images: Tensor, metas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The metas with times and poses in double precision, after a look at every shape."""
        missing = [name for name in METAS if name not in metas]
        if missing:
            raise KeyError(f"metas must hold {', '.join(METAS)}; {', '.join(missing)} is missing")
        arguments: dict[str, object] = {"images": images, **{name: metas[name] for name in METAS}}
        check_tensors(arguments)
        sizes = {"num_cams": self.config.num_cams}
        check_shape("images", images, ("bs", "num_cams", 3, "H", "W"), sizes)
        check_shape("projection_mat", metas["projection_mat"], ("bs", "num_cams", 4, 4), sizes)
        check_shape("image_wh", metas["image_wh"], ("bs", "num_cams", 2), sizes)
        check_shape("timestamp", metas["timestamp"], ("bs",), sizes)
        check_shape("T_global", metas["T_global"], ("bs", 4, 4), sizes)
        return {**metas, "timestamp": metas["timestamp"].double(), "T_global": metas["T_global"].double()}


def _image_network(config: SparseDriveConfig) -> tuple[nn.Module, nn.Module]:
    """The backbone, and the neck that makes a pyramid of its maps."""
    if config.backbone is None:
        resnet = ResNet(config.depth)
        return resnet, FPN(resnet.out_channels[: config.num_levels], config.embed_dims)
    vit = ViTFeatureMap(config.backbone)
    scales = SCALES[: config.num_levels]
    return vit, SimpleFeaturePyramid(vit.out_channels[0], config.embed_dims, scales)
