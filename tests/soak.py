"""`python -m tests.soak --minutes 30`: train both modules at ever changing sizes and watch the memory.

Every step draws its sizes, a backend and a precision, builds a module of that shape, and takes one step of gradient
descent; nothing of a step is kept. What is still held after a warm-up is then a leak if it grows: a line is fitted to
the samples, and the soak fails when that line rises by more than the bound over the time that it spans.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.data.rig import Rig, nuscenes_like_rig
from reimplementation.models import MSDeformAttn
from reimplementation.models.deformable import DeformableFeatureAggregation

CHANNELS = 64
HALF_PRECISION_SIZES = 60  # oneDNN keeps hundreds of megabytes of half-precision matmuls, by shape: let that cache fill
WARM_UP = 0.2  # of the time: thread pools, cuBLAS workspaces and the allocator's arenas fill
MIB = 2**20


def main() -> int:
    options = _parser().parse_args()
    device = torch.device(options.device)
    held = {"resident": resident_bytes}
    if device.type == "cuda":
        held["allocated on the GPU"] = lambda: torch.cuda.memory_allocated(device)
    print(f"{'minutes':>7} {'steps':>8}", *(f"{name + ', MiB':>25}" for name in held))

    torch.manual_seed(0)
    draw = random.Random(0)
    start = time.monotonic()
    times: list[float] = []
    samples: dict[str, list[int]] = {name: [] for name in held}
    steps = 0
    while (elapsed := (time.monotonic() - start) / 60) < options.minutes:
        train_once(draw, device)
        steps += 1
        if elapsed * 60 < len(times) * options.every:
            continue
        _hand_back_freed_memory()
        times.append(elapsed)
        for name, measure in held.items():
            samples[name].append(measure())
        print(f"{elapsed:7.1f} {steps:8d}", *(f"{sample[-1] / MIB:25.1f}" for sample in samples.values()), flush=True)

    leaks = False
    for name, sample in samples.items():
        rise = growth(times, sample) / MIB
        leaks |= rise > options.bound
        print(f"{name}: a rise of {rise:.2f} MiB after the warm-up; at most {options.bound:g} MiB is allowed")
    print(f"{steps} steps on {device}: {'FAILED, memory grows' if leaks else 'passed'}")
    return int(leaks)


def growth(times: Sequence[float], sample: Sequence[float]) -> float:
    """How far the line fitted to a sample rises, in the sample's unit, after the first `WARM_UP` of the time.

    Raises ValueError for fewer than 5 samples after the warm-up: a line through them would say nothing.
    """
    times, sample = np.asarray(times), np.asarray(sample, dtype=np.float64)
    settled = times >= WARM_UP * times[-1] if len(times) else np.zeros(0, dtype=bool)
    if settled.sum() < 5:
        raise ValueError(f"a trend needs 5 samples after the warm-up; got {settled.sum()}: soak for longer")
    times, sample = times[settled], sample[settled]
    return float(np.polyfit(times - times[0], sample, 1)[0] * (times[-1] - times[0]))


def train_once(draw: random.Random, device: torch.device) -> None:
    """One training step of one module, of sizes that `draw` chooses."""
    half = draw.random() < 0.5
    if half:
        draw = random.Random(draw.randrange(HALF_PRECISION_SIZES))
    shapes = [(draw.randint(1, 24), draw.randint(1, 40)) for _ in range(draw.randint(1, 4))]
    build = draw.choice([_aggregation, _attention])
    module, arguments = build(draw.randint(1, 3), draw.randint(1, 300), draw.randint(1, 6), shapes, device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    with (
        ops.use_backend(draw.choice(ops.available_backends(device))),
        torch.autocast(device.type, torch.bfloat16, enabled=half),
    ):
        loss = module(*arguments).square().mean()
    loss.backward()
    optimizer.step()


def _aggregation(
    batch_size: int, num_queries: int, num_cams: int, shapes: list[tuple[int, int]], device: torch.device
) -> tuple[nn.Module, tuple]:
    rig = Rig(nuscenes_like_rig().cameras[:num_cams])
    module = DeformableFeatureAggregation(
        embed_dims=CHANNELS,
        num_levels=len(shapes),
        num_cams=num_cams,
        kps_generator={"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": 6},
        use_deformable_func=True,
        use_camera_embed=True,
    )
    maps = [torch.randn(batch_size, num_cams, CHANNELS, *shape, device=device, requires_grad=True) for shape in shapes]
    metas = {
        "projection_mat": _floats(rig.projection_mat, device).expand(batch_size, -1, -1, -1),
        "image_wh": _floats(rig.image_wh, device).expand(batch_size, -1, -1),
    }
    feature, embed = torch.randn(2, batch_size, num_queries, CHANNELS, device=device)
    anchor = torch.randn(batch_size, num_queries, 11, device=device)
    anchor[..., :2] *= 20  # metres around the car
    return module.to(device), (feature, anchor, embed, maps, metas)


def _attention(
    batch_size: int, num_queries: int, num_heads: int, shapes: list[tuple[int, int]], device: torch.device
) -> tuple[nn.Module, tuple]:
    module = MSDeformAttn(num_heads * 16, len(shapes), num_heads, n_points=4)
    spatial_shapes = torch.tensor(shapes)
    rows = spatial_shapes.prod(-1)
    query = torch.randn(batch_size, num_queries, module.d_model, device=device)
    values = torch.randn(batch_size, int(rows.sum()), module.d_model, device=device, requires_grad=True)
    points = torch.rand(batch_size, num_queries, 1, 2, device=device)
    return module.to(device), (query, points, values, spatial_shapes, rows.cumsum(0) - rows)


def _floats(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).float().to(device)


def resident_bytes() -> int:
    """The process's resident memory, by Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def _hand_back_freed_memory() -> None:
    """What was freed but is still kept by Python or the C library would look like a leak."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[2])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--bound", type=float, default=2.0, help="allowed rise in MiB (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
