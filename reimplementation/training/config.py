"""What a training is: dataclasses with SparseDrive's values as defaults, and their YAML form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reimplementation.data.synthetic import FRAMES_PER_DRIVE
from reimplementation.models.checks import check_positive
from reimplementation.models.sparsedrive.config import SparseDriveConfig
from reimplementation.models.sparsedrive.mappings import read_dataclass, write_dataclass

from .augmentation import AugmentationConfig

PRECISIONS = ("float32", "bfloat16")
PARTS = ("images", "heads")
PRESETS = Path(__file__).with_name("presets")
ANCHORS = ("spread", "clusters")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Synthetic drives, or a data set's files.

    image_wh               pixels of the images that the network sees
    num_workers            processes that read frames beside each training process; 0: it reads them itself

    Of synthetic drives:

    seed                   of the town; drives that are held out are another town's
    num_drives             how many are driven, over and over; None: always new ones
    frames_per_drive       at two a second
    num_validation_drives  to evaluate on; they are held out
    validate_on_learnt     evaluate on the drives that are learnt from instead: what is learnt by heart

    Of files:

    validation_scenes      held out by their names; none: all scenes are learnt from, and evaluated on
    scene_parts            sequences that a scene is cut into, so that a batch's frames differ more
    augmentation           None: frames are seen as they are
    """

    image_wh: tuple[int, ...] = (704, 256)
    seed: int = 0
    num_drives: int | None = None
    frames_per_drive: int = FRAMES_PER_DRIVE
    num_validation_drives: int = 8
    validate_on_learnt: bool = False
    validation_scenes: tuple[str, ...] = ()
    scene_parts: int = 2
    num_workers: int = 4
    augmentation: AugmentationConfig | None = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        if len(self.image_wh) != 2 or min(self.image_wh) < 32:
            raise ValueError(f"image_wh must be a width and a height of at least 32 pixels; got {self.image_wh}")
        check_positive(frames_per_drive=self.frames_per_drive, num_validation_drives=self.num_validation_drives)
        check_positive(scene_parts=self.scene_parts)
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative; got {self.num_workers}")
        if self.num_drives is not None:
            check_positive(num_drives=self.num_drives)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, a linear warm-up and a cosine after it; the defaults are those of SparseDrive's first stage, batch 64.

    lr               learning rate; a smaller batch wants a lower one
    backbone_factor  what the backbone's rate is times that
    max_norm         gradients that are longer are cut to it
    warmup_steps     steps in which the rate grows from ``warmup_factor`` times its value
    final_factor     what is left of the rate after the last step
    """

    lr: float = 4e-4
    weight_decay: float = 1e-3
    backbone_factor: float = 0.5
    max_norm: float = 25.0
    warmup_steps: int = 500
    warmup_factor: float = 1 / 3
    final_factor: float = 1e-3

    def __post_init__(self) -> None:
        if not self.lr > 0 or not self.max_norm > 0:
            raise ValueError(f"lr and max_norm must be positive; got {self.lr} and {self.max_norm}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative; got {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole training.

    num_steps         how often the parameters move
    batch_size        frames a step, of all processes together
    precision         "float32", or "bfloat16": the network runs under autocast, and parameters stay float32
    compile           parts that `torch.compile` makes faster after a minute: "images" (backbone and neck), "heads"
    graph             whether a GPU replays the network as CUDA graphs: for hosts that are slower than it
    recompute         whether blocks and layers forget what they computed, and compute it again: less memory, more time
    average_decay     of the parameters' average over the steps, which is then what is judged; None: the last ones are
    anchors           "spread" evenly, or the centres of "clusters" of the boxes to learn from, found by k-means
    evaluate_every    steps between evaluations on the held-out frames, one of which is after the last step; None: none
    checkpoint_every  steps
    keep_checkpoints  how many stay on the disk, the newest ones
    """

    num_steps: int
    batch_size: int = 8
    seed: int = 0
    precision: str = "float32"
    compile: tuple[str, ...] = ()
    graph: bool = False
    recompute: bool = False
    average_decay: float | None = None
    anchors: str = "clusters"
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: SparseDriveConfig = field(default_factory=SparseDriveConfig)

    def __post_init__(self) -> None:
        check_positive(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.average_decay is not None and not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1); got {self.average_decay}")
        if self.evaluate_every is not None:
            check_positive(evaluate_every=self.evaluate_every)
        if self.anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {', '.join(ANCHORS)}; got {self.anchors!r}")
        if unknown := sorted(set(self.compile) - set(PARTS)):
            raise ValueError(f"compile must be some of {', '.join(PARTS)}; got {', '.join(unknown)}")

    @classmethod
    def from_dict(cls, values: object) -> TrainingConfig:
        """The training that a mapping describes; what it leaves out has its default.

        Raises:
            ValueError: a key is unknown or missing, or a value out of range.
            TypeError: a value has the wrong type.
        """
        return read_dataclass(cls, values)

    def to_dict(self) -> dict:
        """Plain dicts, lists, numbers and text."""
        return write_dataclass(self)

    @classmethod
    def preset(cls, name: str) -> TrainingConfig:
        """A training that comes with the package; a ValueError names those that there are."""
        names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        if name not in names:
            raise ValueError(f"there is no preset {name!r}, but {', '.join(names)}")
        return cls.from_yaml(PRESETS / f"{name}.yaml")

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Read a YAML file. Needs PyYAML.

        Raises:
            ValueError: the file is no such YAML, or as `from_dict`; a wrong type too, as it is the file that is wrong.
        """
        import yaml

        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text()))
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
