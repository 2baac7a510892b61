"""The whole module on every backend of this machine: time, memory, and the error against float64."""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.models.deformable import DeformableFeatureAggregation
from reimplementation.rig import Rig
from reimplementation.scene import FIXED_KEY_POINTS, FREE_KEY_POINTS
from reimplementation.workloads import STRIDES

EMBED_DIMS, NUM_GROUPS = 256, 8  # SparseDrive's
SECONDS_PER_FIGURE, MAX_REPEATS = 1.2, 50
DTYPES = {  # a backend on a device: what is worth timing there
    ("cuda", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("cuda", "grid_sample"): (torch.float32, torch.float16, torch.bfloat16),
    ("cpu", "cpu"): (torch.float32, torch.bfloat16),
    ("cpu", "grid_sample"): (torch.float32,),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    device: str
    backend: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """What a case took.

    forward_ms, training_ms  median milliseconds of a forward pass, and of forward and backward together
    extra_bytes              most memory held in both passes beyond parameters and inputs; None if unknown
    max_error                largest error of the output against float64, over the largest float64 output
    """

    case: Case
    forward_ms: float
    training_ms: float
    extra_bytes: int | None
    max_error: float


class Timed(Protocol):
    """A module with one batch of inputs: what `measure` times."""

    module: nn.Module

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs whose gradients are taken."""

    def to(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Timed:
        """The same elsewhere; gradients of the result do not reach this one's tensors."""

    def forward(self) -> Tensor:
        """Call the module."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The module, and one batch of inputs for it: float32, on one device."""

    module: DeformableFeatureAggregation
    instance_feature: Tensor
    anchor: Tensor
    anchor_embed: Tensor
    feature_maps: list[Tensor]  # col_feats, spatial_shape, scale_start_index
    metas: dict[str, Tensor]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs whose gradients are taken."""
        return self.feature_maps[0], self.instance_feature

    def to(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Problem:
        """The same elsewhere. Only the feature maps go to half precision; integers keep their dtype.

        Gradients of the result do not reach this problem's tensors.
        """
        col_feats, *levels = (tensor.detach().to(device) for tensor in self.feature_maps)
        wide = dtype if dtype == torch.float64 else None
        return replace(
            self,
            module=copy.deepcopy(self.module).to(device, wide),
            instance_feature=self.instance_feature.detach().to(device, wide),
            anchor=self.anchor.to(device, wide),
            anchor_embed=self.anchor_embed.to(device, wide),
            feature_maps=[col_feats.to(dtype), *levels],
            metas={key: value.to(device, wide) for key, value in self.metas.items()},
        )

    def forward(self) -> Tensor:
        return self.module(self.instance_feature, self.anchor, self.anchor_embed, self.feature_maps, self.metas)


def cases() -> list[Case]:
    """Every backend of every kind of device here, with the dtypes worth timing."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        Case(device, backend, dtype)
        for device in devices
        for backend in ops.available_backends(device)
        for dtype in DTYPES[device, backend]
    ]


def problem(rig: Rig, num_queries: int, seed: int = 0) -> Problem:
    """SparseDrive's sizes: 256 channels, 8 groups, 4 levels, 13 key points a query; random features.

    The anchors are the rig's boxes, then random ones around the car. There is no residual connection, which
    would only hide errors of the aggregated features behind the exact instance feature.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DeformableFeatureAggregation(
            embed_dims=EMBED_DIMS,
            num_groups=NUM_GROUPS,
            num_levels=len(STRIDES),
            num_cams=len(rig.cameras),
            kps_generator={
                "type": "SparseBox3DKeyPointsGenerator",
                "num_learnable_pts": len(FREE_KEY_POINTS),
                "fix_scale": FIXED_KEY_POINTS,
            },
            use_deformable_func=True,
            use_camera_embed=True,
            residual_mode=None,
        ).eval()

    width, height = rig.image_wh[0].astype(int)
    maps = [
        torch.randn(1, len(rig.cameras), EMBED_DIMS, height // stride, width // stride, generator=generator)
        for stride in STRIDES
    ]
    return Problem(
        module=module,
        instance_feature=torch.randn(1, num_queries, EMBED_DIMS, generator=generator),
        anchor=torch.from_numpy(_anchors(rig, num_queries, seed)).float()[None],
        anchor_embed=torch.randn(1, num_queries, EMBED_DIMS, generator=generator),
        feature_maps=ops.feature_maps_format(maps),
        metas={
            "projection_mat": torch.from_numpy(rig.projection_mat).float()[None],
            "image_wh": torch.from_numpy(rig.image_wh).float()[None],
        },
    )


def reference(of: Timed) -> Tensor:
    """The module's output in float64, on the CPU and in plain PyTorch."""
    with torch.no_grad(), ops.use_backend("grid_sample"):
        return of.to(dtype=torch.float64).forward()


def measure(of: Timed, expected: Tensor, case: Case) -> Timing:
    """Time the module in one case; half precision runs under autocast, with features in that dtype."""
    of = of.to(case.device, case.dtype)
    half = case.dtype != torch.float32
    for leaf in of.leaves:
        leaf.requires_grad_()

    def run() -> Tensor:
        with ops.use_backend(case.backend), torch.autocast(case.device, case.dtype, enabled=half):
            return of.forward()

    @torch.no_grad()
    def forward() -> None:
        run()

    def training() -> None:
        output = run()
        output.backward(torch.ones_like(output))
        of.module.zero_grad()
        for leaf in of.leaves:
            leaf.grad = None

    with torch.no_grad():
        error = (run().cpu().double() - expected).abs().max() / expected.abs().max()
    extra_bytes = _extra_memory(training, case.device)
    return Timing(
        case,
        _milliseconds(forward, case.device),
        _milliseconds(training, case.device),
        extra_bytes,
        error.item(),
    )


def module_document(name: str, queries: int, sizes: str, timings: Sequence[Timing]) -> dict:
    """What was timed and what came out, ready for JSON."""
    return {
        "name": name,
        "queries": queries,
        "sizes": sizes,
        "error": "largest error of the module's output against float64, over the largest float64 output",
        "timings": [
            {
                "device": timing.case.device,
                "backend": timing.case.backend,
                "dtype": timing.case.dtype_name,
                "forward_ms": timing.forward_ms,
                "forward_backward_ms": timing.training_ms,
                "extra_memory_bytes": timing.extra_bytes,
                "max_relative_error": timing.max_error,
            }
            for timing in timings
        ],
    }


def _milliseconds(step: Callable[[], None], device: str) -> float:
    """The median wall-clock time of a step that has already run, repeated for about a second."""
    times: list[float] = []
    while not times or (sum(times) < SECONDS_PER_FIGURE and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _extra_memory(step: Callable[[], None], device: str) -> int | None:
    """Run a step; the most bytes that it held at once beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory that the C library keeps would be used again and not be counted, so hand it back first.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _reset_resident_peak()
    step()
    return None if before is None else _resident_peak() - before


def _reset_resident_peak() -> int | None:
    """Start the process's peak resident size afresh and return it; None where there is no Linux /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_peak()
    except OSError:
        return None


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = status.split("VmHWM:")[1].split()[0]
    return int(kibibytes) * 1024


def _anchors(rig: Rig, count: int, seed: int) -> np.ndarray:
    """(count, 11): the rig's boxes, then boxes the size of cars, 2 to 55 m away, standing on the ground."""
    random = np.random.default_rng(seed)
    camera_height = np.mean([camera.position[2] for camera in rig.cameras])
    distance, bearing = random.uniform(2, 55, count), random.uniform(-np.pi, np.pi, count)
    yaw = random.uniform(-np.pi, np.pi, count)
    sizes = np.array([4.5, 1.9, 1.6]) * random.uniform(0.3, 1.4, (count, 3))
    velocity = random.normal(0, 3, (count, 2))
    position = np.stack([distance * np.cos(bearing), distance * np.sin(bearing)], axis=1)
    elevation = np.full((count, 1), camera_height - 0.7)
    heading = np.stack([np.sin(yaw), np.cos(yaw)], axis=1)
    around = np.concatenate([position, elevation, np.log(sizes), heading, velocity, np.zeros((count, 1))], axis=1)
    return np.concatenate([rig.anchors, around])[:count]
