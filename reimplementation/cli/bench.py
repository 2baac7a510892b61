"""`python -m reimplementation bench`: time the ops at the sizes that people run, on every backend here."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from reimplementation import ops
from reimplementation.bench import results
from reimplementation.bench.cases import CASES, DEFAULT_CASES, PASSES
from reimplementation.bench.floor import build, copy_bandwidth
from reimplementation.bench.results import FLOOR, Document, Result
from reimplementation.bench.tables import markdown, print_table

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the ops on every backend of this machine",
        description="Time the ops (rig, dense, msda), the whole module (module), and what the host does for one call "
        "(overhead). Passes of an op: forward, also warm, on one set of inputs, which L2 holds if it is large enough; "
        "backward, the kernels alone, also with frozen features and under torch.use_deterministic_algorithms; "
        "training, forward and backward through autograd. Of the module: forward and training as calls, forward graph "
        "as a replayed CUDA graph.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="some of: %(choices)s")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="some of: %(choices)s (default: float32)"
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, metavar="PASS", help="some of: %(choices)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=ops.backends.BACKENDS, help="default: all of the device")
    parser.add_argument(
        "--floor", action="store_true", help="CUDA: time a kernel too that only gathers the same rows; needs nvcc"
    )
    parser.add_argument("--repeats", type=positive, default=20, help="timed runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, with the machine's name")
    parser.add_argument(
        "--read", nargs="+", metavar="FILE", type=Path, help="measure nothing: show these files' figures"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the figures as bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.plot:  # before the work begins: a missing extra is named at once
        from reimplementation.bench.plots import draw

    if options.read:
        documents = [_chosen(document, options) for document in results.read(options.read)]
    else:
        documents = [measure_all(options)]
        if options.json:
            documents[0].write(options.json)
    for document in documents:
        if options.markdown:
            print(markdown(document), end="\n\n")
        else:
            print_table(document)
    if options.plot:
        draw(options.plot, documents)


def measure_all(options: argparse.Namespace) -> Document:
    """Time every case, dtype, backend and pass that the options name; what fails is said on stderr and left out.

    Raises:
        ValueError: the floor is asked for on another device than CUDA.
        RuntimeError: the floor's kernel cannot be built, or nothing could be timed.
    """
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(options.device)
    if options.floor:
        if device.type != "cuda":
            raise ValueError(f"--floor is a CUDA kernel: it needs --device cuda; got {device}")
        build(device)  # now, lest it fail when half is measured
    cases = options.cases or DEFAULT_CASES[device.type]
    dtypes = options.dtypes or ["float32"]
    backends = (options.backends or ops.available_backends(device)) + ([FLOOR] if options.floor else [])
    passes = {
        case: [(b, p) for b in backends for p in CASES[case].passes(b) if p in (options.passes or PASSES)]
        for case in cases
    }
    figures = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(dtypes) * sum(map(len, passes.values())))
        for case in filter(passes.get, cases):
            for dtype in dtypes:
                progress.update(task, description=f"{case} {dtype}")
                prepared = CASES[case].prepare(DTYPES[dtype], device)
                for backend, passed in passes[case]:
                    progress.update(task, description=f"{case} {dtype} {backend} {passed}")
                    try:
                        found = prepared.measure(backend, passed, options.repeats)
                    except RuntimeError as error:  # too little memory, say
                        progress.console.print(f"{case} {dtype} {backend} {passed} failed: {error}", markup=False)
                        found = None
                    if found is not None:
                        figures.append(Result(case, str(device), backend, dtype, passed, **vars(found)))
                    progress.advance(task)
    if not figures:
        raise RuntimeError("nothing was timed: no case has such a pass on such a backend, or all of them failed")
    return results.describe(device, figures, copy_bandwidth(device, options.repeats))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _chosen(document: Document, options: argparse.Namespace) -> Document:
    """The results of a file that the options name."""
    wanted = {"case": options.cases, "dtype": options.dtypes, "passed": options.passes, "backend": options.backends}
    chosen = [
        result
        for result in document.results
        if all(names is None or getattr(result, field) in names for field, names in wanted.items())
    ]
    return Document(document.machine, document.versions, document.date, chosen)
