"""The detector with random weights in front of six cameras: time, memory, kernels, and the aggregation's share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from reimplementation.bench import results
from reimplementation.bench.memory import extra_memory
from reimplementation.bench.results import Document
from reimplementation.bench.timing import Timing, measure
from reimplementation.data.synthetic import synthetic_rig
from reimplementation.models.sparsedrive import ReplayedDetector, SparseDrive, SparseDriveConfig, for_inference

FORMS = ("inference", "model", "plain")
PASSES = ("frame", "frame replayed", "frame graph", "frame compiled", "frame compiled graph", "training")
DEFAULT_PASSES = ("frame", "frame replayed", "frame graph", "training")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZE = (256, 704)  # of the images
FRAME_BATCH, TRAINING_BATCH = 1, 6
SECONDS_BETWEEN_FRAMES = 0.5
NUM_BOXES, NUM_LINES = 30, 10  # targets of a sample in training
KERNELS_OF_AGGREGATION = ("feature_aggregation::", "aggregation::", "points::")  # namespaces of csrc


@dataclass(frozen=True)
class DetectorResult:
    """One figure.

    form: "model"; "inference", what `for_inference` makes of it; "plain", the model with `use_deformable_func=False`.
    dtype: of the form for inference; otherwise a half one stands for autocast.
    passed: of `PASSES`. A frame is a later one, with instances of the one before; "replayed" is a call of a
        `ReplayedDetector`, "graph" the GPU's time alone. Training is forward, losses and backward.
    extra_bytes: most memory that the pass held beyond the model and its inputs; None if unknown.
    kernels: launches of a call; None where nobody counted.
    gpu_us: what these kernels take together; aggregation_share: the part of it that deformable aggregation takes, its
        key points included.
    """

    form: str
    device: str
    dtype: str
    passed: str
    batch: int
    timing: Timing
    extra_bytes: int | None = None
    kernels: int | None = None
    gpu_us: float | None = None
    aggregation_share: float | None = None

    @property
    def frames_a_second(self) -> float:
        return self.batch / self.timing.median_us * 1e6


@dataclass(frozen=True)
class Choice:
    """What a run is to time."""

    forms: Sequence[str]
    dtypes: Sequence[str]
    passes: Sequence[str]

    def all(self) -> list[tuple[str, str, str]]:
        """Every form, dtype and pass that belong together: a form for inference does not train."""
        return [
            (form, dtype, passed)
            for form in self.forms
            for dtype in self.dtypes
            for passed in self.passes
            if not (form == "inference" and passed == "training")
        ]

    def __len__(self) -> int:
        return len(self.all())


def measure_all(
    choice: Choice,
    device: torch.device,
    repeats: int,
    *,
    begins: Callable[[str], None],
    fails: Callable[[str], None],
    config: SparseDriveConfig | None = None,
    size: tuple[int, int] = SIZE,
) -> Document:
    """Time all that was chosen; what fails is left out. ``begins`` and ``fails`` are told as in `bench.run`.

    Args:
        config: of the detector; None: SparseDrive-S.
        size: height and width of the images.

    Raises:
        RuntimeError: nothing could be timed.
    """
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = SparseDrive(config)
    found = []
    for form, dtype, passed in choice.all():
        what = f"{form} {dtype} {passed}"
        begins(what)
        try:
            found.append(_measure(model, size, form, dtype, passed, device, repeats))
        except (RuntimeError, ValueError, ImportError) as error:  # too little memory, or no scipy for the losses
            fails(f"{what} failed: {error}")
    if not found:
        raise RuntimeError("nothing could be timed")
    return results.describe(device, found)


def _measure(
    model: SparseDrive,
    size: tuple[int, int],
    form: str,
    dtype: str,
    passed: str,
    device: torch.device,
    repeats: int,
) -> DetectorResult:
    is_training = passed == "training"
    batch = TRAINING_BATCH if is_training else FRAME_BATCH
    autocast = nullcontext() if form == "inference" else _autocast(device, DTYPES[dtype])
    with autocast:
        detector = _formed(model, form, DTYPES[dtype])
        images, metas = _frame(detector.config, size, batch, device)
        if is_training:
            step = _training_step(detector, images, metas)
        else:
            step = _frame_step(detector, images, metas, passed)
        timing = measure([step], device, repeats, graph=passed.endswith("graph"))
        if passed.endswith("graph") and timing.method != "graph":
            raise RuntimeError("it waits for the GPU, which a graph cannot record")
        extra_bytes = extra_memory(step, device)
        profile = _profile(step) if device.type == "cuda" and passed == "frame" else {}
    return DetectorResult(form, str(device), dtype, passed, batch, timing, extra_bytes, **profile)


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _formed(model: SparseDrive, form: str, dtype: torch.dtype) -> SparseDrive:
    """A copy of the model in a form, in evaluation."""
    if form == "inference":
        return for_inference(model.eval(), dtype)
    if form == "plain":
        with next(model.parameters()).device:
            plain = SparseDrive(dataclasses.replace(model.config, use_deformable_func=False))
        plain.load_state_dict(model.state_dict())
        return plain.eval()
    return copy.deepcopy(model).eval()


def _frame_step(detector: SparseDrive, images: Tensor, metas: dict[str, Tensor], passed: str) -> Callable[[], Any]:
    """A later frame, as a function without arguments; where the state is the caller's, each call does the same."""
    backbone: Any = detector.img_backbone
    if not isinstance(backbone.bn1, nn.Identity):
        backbone.fold_norms()
    if passed == "frame replayed":
        replayed = ReplayedDetector(detector, images, metas)
        return lambda: replayed(images, metas)
    with torch.no_grad():
        _, state = detector(images, metas, state=detector.initial_state(len(images)), every_layer=False)
    later = {**metas, "timestamp": metas["timestamp"] + SECONDS_BETWEEN_FRAMES}
    if "compiled" in passed:
        torch._dynamo.reset()
    run = torch.compile(detector, dynamic=False) if "compiled" in passed else detector
    return torch.no_grad()(lambda: run(images, later, state=state, every_layer=False))


def _training_step(detector: SparseDrive, images: Tensor, metas: dict[str, Tensor]) -> Callable[[], Any]:
    detector.train()
    targets = _targets(detector.config, images)
    state = detector.initial_state(len(images))
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]

    def step() -> Any:
        outputs, _ = detector(images, metas, state=state, targets=targets)
        loss = torch.stack(list(detector.loss(outputs, targets).values())).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def _frame(
    config: SparseDriveConfig, size: tuple[int, int], batch: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random images, and metas of the cameras around a car."""
    height, width = size
    rig = synthetic_rig(width, height)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, config.num_cams, 3, height, width, generator=generator)
    metas = {
        "projection_mat": torch.from_numpy(rig.projection_mat).float().repeat(batch, 1, 1, 1),
        "image_wh": torch.from_numpy(rig.image_wh).float().repeat(batch, 1, 1),
        "timestamp": torch.zeros(batch, dtype=torch.float64),
        "T_global": torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1),
        "focal": torch.full((batch, config.num_cams), rig.cameras[0].intrinsics[0, 0]),
    }
    return images.to(device), {name: tensor.to(device) for name, tensor in metas.items()}


def _targets(config: SparseDriveConfig, images: Tensor) -> dict[str, list[Tensor]]:
    """Random boxes and lines around the car, and a depth for every pixel."""
    generator = torch.Generator().manual_seed(1)
    batch, device = len(images), images.device
    height, width = images.shape[-2:]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    boxes = [torch.cat([uniform(NUM_BOXES, 3) * 60 - 30, uniform(NUM_BOXES, 6) + 1], dim=1) for _ in range(batch)]
    found = {
        "boxes_3d": boxes,
        "labels_3d": [torch.arange(NUM_BOXES) % len(config.det.classes) for _ in range(batch)],
        "depth": [
            uniform(batch, config.num_cams, height // stride, width // stride) * config.max_depth
            for stride in (4, 8, 16, 32)[: config.num_depth_levels]
        ],
    }
    if config.map is not None:
        across = torch.tensor(config.map.extent)
        found["map_lines"] = [(uniform(NUM_LINES, config.map.num_points, 2) - 0.5) * across for _ in range(batch)]
        found["map_labels"] = [torch.arange(NUM_LINES) % len(config.map.classes) for _ in range(batch)]
    return {name: [tensor.to(device) for tensor in tensors] for name, tensors in found.items()}


def _profile(step: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of a call: how many, their time, and aggregation's share of it."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    total = sum(event.time_range.elapsed_us() for event in kernels)
    of_aggregation = sum(
        event.time_range.elapsed_us() for event in kernels if any(name in event.name for name in KERNELS_OF_AGGREGATION)
    )
    return {"kernels": len(kernels), "gpu_us": total, "aggregation_share": of_aggregation / total}
