"""`python -m reimplementation bench`: time the ops at the sizes that people run, on every backend here."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import reimplementation
from reimplementation import ops
from reimplementation.timing import Timing, measure
from reimplementation.workloads import AggregationInputs, OpInputs, aggregation_inputs, attention_inputs

CASES: dict[str, Callable[..., OpInputs]] = {
    "rig-bs1": partial(aggregation_inputs, "rig", 1),
    "rig-bs6": partial(aggregation_inputs, "rig", 6),
    "dense-bs1": partial(aggregation_inputs, "dense", 1),
    "dense-bs6": partial(aggregation_inputs, "dense", 6),
    "msda-encoder-bs1": partial(attention_inputs, "encoder", 1),
    "msda-encoder": partial(attention_inputs, "encoder"),
    "msda-decoder": partial(attention_inputs, "decoder"),
    "msda-paper": partial(attention_inputs, "paper"),
}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
PASSES = ("forward", "backward", "training")
ROTATED_BYTES = 256 * 2**20  # inputs that are rotated through: several times a GPU's L2


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    case: str
    device: str
    backend: str
    dtype: str
    passed: str  # forward, backward alone, or training: forward and backward together
    timing: Timing


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="time the ops on every backend of this machine")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="of: %(choices)s"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE", help="of: %(choices)s"
    )
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help="of: %(choices)s"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=ops.backends.BACKENDS, help="default: all of the device")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each input (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures, with the machine's name")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(options.device)
    backends = options.backends or ops.available_backends(device)
    plan = [
        (case, dtype, backend, passed)
        for case in options.cases
        for dtype in options.dtypes
        for backend in backends
        for passed in options.passes
        # grid_sample has no backward of its own: autograd runs it after a forward
        if (backend, passed) != ("grid_sample", "backward")
    ]
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for case, dtype, backend, passed in plan:
            progress.update(task, description=f"{case} {dtype} {backend} {passed}")
            timing = time_case(case, DTYPES[dtype], device, backend, passed, options.repeats)
            results.append(Result(case, str(device), backend, dtype, passed, timing))
            progress.advance(task)
    print_table(results)
    if options.json:
        Path(options.json).write_text(json.dumps(document(device, results), indent=1) + "\n")


def time_case(case: str, dtype: torch.dtype, device: torch.device, backend: str, passed: str, repeats: int) -> Timing:
    """Time one pass of an op; on CUDA over several inputs in turn, larger than the L2 together."""
    first = CASES[case](dtype=dtype, device=device)
    features = next(iter(first))
    copies = 1
    if device.type == "cuda":
        copies += ROTATED_BYTES // (features.numel() * features.element_size())
    inputs = [first] + [CASES[case](dtype=dtype, device=device, seed=seed) for seed in range(1, copies)]
    with ops.use_backend(backend):
        return measure([_step(i, backend, passed) for i in inputs], device, repeats)


def _step(inputs: OpInputs, backend: str, passed: str) -> Callable[[], object]:
    aggregation = isinstance(inputs, AggregationInputs)
    function = ops.deformable_aggregation_function if aggregation else ops.ms_deform_attn
    features, shapes, starts, locations, weights = inputs
    if backend == "grid_sample":  # it reads the shapes on the host
        shapes, starts = shapes.cpu(), starts.cpu()
    leaves = [t.detach().requires_grad_(passed == "training") for t in (features, locations, weights)]

    def forward():
        return function(leaves[0], shapes, starts, leaves[1], leaves[2])

    if passed == "forward":
        return forward
    with torch.no_grad():
        grad_output = torch.randn_like(forward())
    if passed == "training":
        return lambda: torch.autograd.grad(forward(), leaves, grad_output)
    name = "deformable_aggregation" if aggregation else "ms_deform_attn"
    backward = getattr(torch.ops.reimplementation, f"{name}_backward")
    return lambda: backward(grad_output, *inputs, True, True, True)


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "dtype", "backend", "pass", title="microseconds, median of runs on rotated inputs")
    for column in ("median", "spread", "against grid_sample"):
        table.add_column(column, justify="right")
    table.add_column("timed by")
    slow = {(r.case, r.dtype, r.passed): r.timing.median_us for r in results if r.backend == "grid_sample"}
    for r in results:
        baseline = slow.get((r.case, r.dtype, r.passed))
        ratio = f"{baseline / r.timing.median_us:.1f} x" if baseline else ""
        table.add_row(
            r.case,
            r.dtype,
            r.backend,
            r.passed,
            f"{r.timing.median_us:.1f}",
            f"{r.timing.spread_us:.1f}",
            ratio,
            r.timing.method,
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def document(device: torch.device, results: list[Result]) -> dict:
    """The results with what is needed to read them later."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": {"device": name, "cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {
            "reimplementation": reimplementation.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
        "results": [asdict(result) for result in results],
    }


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
