"""What a detector is built from: dataclasses with SparseDrive-S's values as defaults, and their YAML form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reimplementation.models.backbones.vit.config import ViTConfig
from reimplementation.models.checks import check_positive

from .mappings import read_dataclass, write_dataclass

PATCH = 16  # pixels of a side: of a ViT whose pyramid has the strides of a ResNet's
FAMILIES = ("sparsedrive", "sparse4d")
BOX_CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
MAP_CLASSES = ("ped_crossing", "divider", "boundary")
BOX_KEY_POINTS = (
    (0.0, 0.0, 0.0),
    (0.45, 0.0, 0.0),
    (-0.45, 0.0, 0.0),
    (0.0, 0.45, 0.0),
    (0.0, -0.45, 0.0),
    (0.0, 0.0, 0.45),
    (0.0, 0.0, -0.45),
)


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Instances of a head, and what it remembers of them.

    num_temp_instances      how many a frame hands to the next; 0: every frame stands alone
    max_time_interval       seconds; over a longer gap a sample starts anew
    default_time_interval   seconds; assumed where there is no earlier frame, or one of the same time
    confidence_decay        what a cached confidence is worth a frame later
    min_score_for_id        an instance of a lower score gets no id yet; None: every one gets one
    """

    num_anchors: int
    num_temp_instances: int
    max_time_interval: float = 2.0
    default_time_interval: float = 0.5
    confidence_decay: float = 0.6
    min_score_for_id: float | None = None

    def __post_init__(self) -> None:
        check_positive(num_anchors=self.num_anchors)
        if not 0 <= self.num_temp_instances < self.num_anchors:
            raise ValueError(
                f"num_temp_instances must be in [0, num_anchors={self.num_anchors}); got {self.num_temp_instances}"
            )


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """Noisy ground truth as further queries in training (Sparse4Dv3, arXiv 2311.11722, section 3.1). 0 groups: none.

    noise_scale   half-width of the noise: metres, log sizes, sine and cosine, metres per second
    """

    num_groups: int = 0
    num_temp_groups: int = 0
    max_boxes: int = 32
    noise_scale: tuple[float, ...] = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.num_temp_groups <= self.num_groups:
            raise ValueError(
                f"num_temp_groups must be in [0, num_groups={self.num_groups}]; got {self.num_temp_groups}"
            )
        _check_length("noise_scale", self.noise_scale, 10)


@dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """The head for 3D boxes. Weights of ten values: x, y, z, log sizes, sine, cosine, vx, vy.

    symmetric_classes      a box of theirs may be turned by half a circle
    small_classes          their sizes count less, their heading nothing (Sparse4D: traffic cones)
    min_score_for_boxes    a matched prediction of a lower score learns its class only
    """

    classes: tuple[str, ...] = BOX_CLASSES
    num_decoders: int = 6
    num_single_frame_decoders: int = 1
    bank: BankConfig = field(default_factory=lambda: BankConfig(num_anchors=900, num_temp_instances=600))
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    fix_scale: tuple[tuple[float, ...], ...] = BOX_KEY_POINTS
    num_learnable_pts: int = 6
    max_distance: float = 55.0
    symmetric_classes: tuple[str, ...] = ("barrier",)
    small_classes: tuple[str, ...] = ("traffic_cone",)
    cost_class: float = 2.0
    cost_box: float = 0.25
    cost_weights: tuple[float, ...] = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)
    loss_class: float = 2.0
    loss_box: float = 0.25
    loss_centerness: float = 1.0
    loss_yawness: float = 1.0
    loss_weights: tuple[float, ...] = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    min_score_for_boxes: float = 0.05
    num_outputs: int = 300

    def __post_init__(self) -> None:
        _check_decoders(self.num_decoders, self.num_single_frame_decoders)
        _check_length("cost_weights", self.cost_weights, 10)
        _check_length("loss_weights", self.loss_weights, 10)
        for name in ("symmetric_classes", "small_classes"):
            unknown = sorted(set(getattr(self, name)) - set(self.classes))
            if unknown:
                raise ValueError(f"{name} must be some of classes, {', '.join(self.classes)}; got {', '.join(unknown)}")


@dataclass(frozen=True, kw_only=True)
class MapHeadConfig:
    """The head for map lines.

    num_points   points of a line
    extent       metres, across and along: the window around the car to which coordinates are normalised
    """

    classes: tuple[str, ...] = MAP_CLASSES
    num_decoders: int = 6
    num_single_frame_decoders: int = 1
    bank: BankConfig = field(default_factory=lambda: BankConfig(num_anchors=100, num_temp_instances=0))
    num_points: int = 20
    extent: tuple[float, ...] = (30.0, 60.0)
    num_learnable_pts: int = 3
    fix_height: tuple[float, ...] = (0.0, 0.5, -0.5, 1.0, -1.0)
    ground_height: float = -1.84023
    cost_class: float = 1.0
    cost_line: float = 10.0
    loss_class: float = 1.0
    loss_line: float = 10.0
    beta: float = 0.01
    min_score_for_lines: float = 0.05

    def __post_init__(self) -> None:
        _check_decoders(self.num_decoders, self.num_single_frame_decoders)
        _check_length("extent", self.extent, 2)


@dataclass(frozen=True, kw_only=True)
class SparseDriveConfig:
    """A detector of the Sparse4D kind; the defaults are SparseDrive-S, stage 1 (arXiv 2405.19620).

    family   whose checkpoints load: "sparsedrive" or "sparse4d". It decides the names of the head's parameters, and the
             order in which cached anchors hold sine and cosine, which the two families learnt differently.
    depth    of the ResNet that sees the images
    backbone a ViT with patches of 16 pixels in its place, and with a simple pyramid; None: the ResNet
    map      None: boxes alone
    """

    family: str = "sparsedrive"
    depth: int = 50
    embed_dims: int = 256
    num_heads: int = 8
    num_groups: int = 8
    num_levels: int = 4
    num_cams: int = 6
    feedforward_dims: int = 1024
    dropout: float = 0.1
    attn_drop: float = 0.15
    num_depth_levels: int = 3
    max_depth: float = 60.0
    loss_depth: float = 0.2
    use_deformable_func: bool = True
    backbone: ViTConfig | None = None
    det: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    map: MapHeadConfig | None = field(default_factory=MapHeadConfig)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {self.family!r}")
        if self.family == "sparse4d" and self.map is not None:
            raise ValueError("a detector of the family sparse4d has no map head; set map to None")
        check_positive(
            embed_dims=self.embed_dims,
            num_heads=self.num_heads,
            num_groups=self.num_groups,
            num_cams=self.num_cams,
            feedforward_dims=self.feedforward_dims,
        )
        if self.embed_dims % 8 != 0 or self.embed_dims % self.num_heads != 0:
            raise ValueError(
                f"embed_dims must be a multiple of 8 and of num_heads={self.num_heads}; got {self.embed_dims}"
            )
        if not 1 <= self.num_levels <= 4:
            raise ValueError(f"num_levels must be 1 to 4, as a ResNet has four stages; got {self.num_levels}")
        if self.backbone is not None and list(self.backbone.patch_size) != [PATCH, PATCH]:
            raise ValueError(
                f"backbone must have patches of {PATCH} x {PATCH} pixels, from which the pyramid's strides follow; got "
                f"{list(self.backbone.patch_size)}"
            )
        if not 0 <= self.num_depth_levels <= self.num_levels:
            raise ValueError(
                f"num_depth_levels must be in [0, num_levels={self.num_levels}]; got {self.num_depth_levels}"
            )

    @classmethod
    def from_dict(cls, values: Mapping, where: str = "") -> SparseDriveConfig:
        """The configuration that a mapping describes; what it leaves out has its default. An error calls it ``where``.

        Raises:
            ValueError: a key is unknown, or a value out of range.
            TypeError: a value has the wrong type.
        """
        return read_dataclass(cls, values, where)

    def to_dict(self) -> dict:
        """Plain dicts, lists, numbers and text."""
        return write_dataclass(self)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparseDriveConfig:
        """Read what `to_yaml` wrote. Needs PyYAML.

        Raises:
            ValueError: the file is no YAML mapping, or as `from_dict`.
            TypeError: as `from_dict`.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text())
            return cls.from_dict({} if values is None else values)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from None

    def to_yaml(self, path: str | Path) -> None:
        """Write every value, defaults included, so that the file says all. Needs PyYAML."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def _check_length(name: str, values: tuple, length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{name} must hold {length} values; got {len(values)}")


def _check_decoders(num_decoders: int, num_single_frame_decoders: int) -> None:
    if not 1 <= num_single_frame_decoders <= num_decoders:
        raise ValueError(
            f"num_single_frame_decoders must be in [1, num_decoders={num_decoders}]; got {num_single_frame_decoders}"
        )
