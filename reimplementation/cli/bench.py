"""`python -m reimplementation bench`: time the ops at the sizes that people run, on every backend here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from reimplementation import ops
from reimplementation.timing import measure
from reimplementation.workloads import AggregationInputs, OpInputs, aggregation_inputs, attention_inputs

from .bench_report import Result, markdown, print_table, read_json, write_json

CASES: dict[str, Callable[..., OpInputs]] = {
    "rig-bs1": partial(aggregation_inputs, "rig", 1),
    "rig-bs6": partial(aggregation_inputs, "rig", 6),
    "dense-bs1": partial(aggregation_inputs, "dense", 1),
    "dense-bs6": partial(aggregation_inputs, "dense", 6),
    "msda-encoder": partial(attention_inputs, "encoder"),
    "msda-encoder-bs1": partial(attention_inputs, "encoder", 1),
    "msda-decoder": partial(attention_inputs, "decoder"),
    "msda-paper": partial(attention_inputs, "paper"),
}
DEFAULT_CASES = {
    "cuda": ["rig-bs1", "rig-bs6", "dense-bs1", "dense-bs6", "msda-encoder", "msda-decoder", "msda-paper"],
    "cpu": ["rig-bs1", "dense-bs1", "msda-encoder-bs1", "msda-decoder"],
}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
PASSES = ("forward", "backward", "training")
ROTATED_BYTES = 256 * 2**20  # inputs that are rotated through: several times a GPU's L2


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the ops on every backend of this machine",
        description="Time the ops. Passes: forward; backward, the kernels alone; training, forward and backward "
        "together through autograd.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="some of: %(choices)s")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE", help="some of: %(choices)s"
    )
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help="some of: %(choices)s"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=ops.backends.BACKENDS, help="default: all of the device")
    parser.add_argument("--repeats", type=_positive, default=20, help="timed runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, with the machine's name")
    parser.add_argument("--read", metavar="FILE", type=Path, help="measure nothing: show the figures in FILE")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.read:
        document, results = read_json(options.read)
    else:
        results = measure_all(options)
        if options.json:
            write_json(options.json, torch.device(options.device), results)
    if options.markdown:
        if not options.read and not options.json:
            raise ValueError("--markdown needs --json or --read: the table names the machine and the date in the file")
        print(markdown(*read_json(options.read or options.json)))
    else:
        print_table(results)


def measure_all(options: argparse.Namespace) -> list[Result]:
    """Time every case, dtype, backend and pass that the options name."""
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(options.device)
    cases = options.cases or DEFAULT_CASES[device.type]
    backends = options.backends or ops.available_backends(device)
    # grid_sample has no backward of its own: autograd runs it after a forward
    runs = [(b, p) for b in backends for p in options.passes if (b, p) != ("grid_sample", "backward")]
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(options.dtypes) * len(runs))
        for case in cases:
            for dtype in options.dtypes:
                inputs = rotated_inputs(case, DTYPES[dtype], device)
                for backend, passed in runs:
                    progress.update(task, description=f"{case} {dtype} {backend} {passed}")
                    with ops.use_backend(backend):
                        timing = measure([_step(i, backend, passed) for i in inputs], device, options.repeats)
                    results.append(Result(case, str(device), backend, dtype, passed, timing))
                    progress.advance(task)
    return results


def rotated_inputs(case: str, dtype: torch.dtype, device: torch.device) -> list[OpInputs]:
    """Inputs of a case: on CUDA several, larger than the L2 together, so that none is found there."""
    first = CASES[case](dtype=dtype, device=device)
    features = next(iter(first))
    copies = ROTATED_BYTES // (features.numel() * features.element_size()) if device.type == "cuda" else 0
    return [first] + [CASES[case](dtype=dtype, device=device, seed=1 + copy) for copy in range(copies)]


def _step(inputs: OpInputs, backend: str, passed: str) -> Callable[[], object]:
    """The work that is timed."""
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value
