"""The figures to reach, in microseconds.

Rough prototypes of the kernels were timed before the kernels were written, and the goals of the ops lie a step beyond
what those took. The goals of the module at batch 1 and of the host were set when the benchmark first measured them.
Those for CUDA are meant for one NVIDIA H200, those for the CPU for two cores.
"""

from __future__ import annotations

from .results import Result

MACHINES = {"cuda": "one NVIDIA H200", "cpu": "two CPU cores"}
HALF = ("float16", "bfloat16")

_CUDA = {  # forward and backward in float32, the same in float16 and bfloat16
    "rig-bs1": ((24, 105), (15, 90)),
    "rig-bs6": ((110, 480), (68, 420)),
    "dense-bs1": ((120, 370), (65, 330)),
    "dense-bs6": ((780, 2500), (420, 2200)),
    "map-bs1": ((48, 170), (48, 170)),
    "map-bs6": ((200, 560), (200, 560)),
    "fused-rig-bs1": ((27, 131), (20, 112)),  # backward: a quarter more than the plain op's
    "fused-rig-bs6": ((110, 560), (75, 460)),
    "fused-dense-bs1": ((115, 374), (115, 300)),
    "fused-dense-bs6": ((690, 2000), (690, 1536)),
    "msda-encoder": ((150, 650), (95, 550)),
    "msda-decoder": ((13, 50), (9, 45)),
    "msda-paper": ((700, 3500), (450, 2800)),
}

_MODULE = {
    "module-bs1": {"forward": 220, "training": 900},
    "module-bs6": {"forward": 260, "forward graph": 215, "training": 1350, "training graph": 950},
}

GOALS: dict[tuple[str, str, str, str], float] = {  # device, case, pass, dtype
    **{
        ("cuda", case, passed, dtype): goal
        for case, (single, half) in _CUDA.items()
        for dtype, goals in (("float32", single), *((dtype, half) for dtype in HALF))
        for passed, goal in zip(("forward", "backward"), goals)
    },
    **{
        ("cuda", f"{case}{suffix}", passed, dtype): round(goal * (1.05 if suffix else 1))  # dropping takes a twentieth
        for case, goals in _MODULE.items()
        for passed, goal in goals.items()
        for suffix in ("", "-drop")
        for dtype in ("float32", *HALF)  # half precision is no slower
    },
    **{
        ("cuda", "attention-layer", passed, dtype): goal
        for dtype, goals in (("float32", (700, 2200)), ("bfloat16", (300, 1250)))
        for passed, goal in zip(("forward", "training"), goals)
    },
    ("cpu", "rig-bs1", "forward", "float32"): 35_000,
    ("cpu", "rig-bs1", "training", "float32"): 140_000,
    ("cpu", "dense-bs1", "forward", "float32"): 150_000,
    **{
        (device, case, passed, "float32"): goal
        for device in MACHINES
        for case in ("overhead-aggregation", "overhead-msda")
        # A recorded forward sets up its backward; to run that takes PyTorch's engine longer than all of this.
        for passed, goal in (("call no_grad", 15), ("call inference_mode", 15), ("call forward", 35))
    },
}


def goal_us(result: Result) -> float | None:
    """The goal of a figure; None where there is none, as for any backend but the kernels."""
    device = result.device.partition(":")[0]
    if result.backend != device:
        return None
    return GOALS.get((device, result.case, result.passed, result.dtype))
