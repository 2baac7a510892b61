"""`python -m reimplementation bench`: time the ops at the sizes that people run, on every backend here."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reimplementation import ops
from reimplementation.bench import page, peers, results
from reimplementation.bench.cases import CASES, DEFAULT_CASES, DTYPES, PASSES
from reimplementation.bench.clients import measure as clients
from reimplementation.bench.clients import sides
from reimplementation.bench.clients import tables as client_tables
from reimplementation.bench.clients.models import MODELS
from reimplementation.bench.detector import measure as detector
from reimplementation.bench.detector import tables as detector_tables
from reimplementation.bench.floor import build
from reimplementation.bench.results import FLOOR, Document
from reimplementation.bench.run import Choice, measure_all
from reimplementation.bench.tables import markdown, print_table

from . import arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the ops on every backend of this machine",
        description="Time the ops (rig, dense, map, planner; fused, the same with projection and softmax; msda), the "
        "whole module (module; drop, with attention dropout; attention-layer), and what the host does for one call "
        "(overhead). "
        "Passes of an op: forward, also warm, on one set of inputs, which L2 holds if it is large enough; "
        "backward, the kernels alone, also with frozen features and under torch.use_deterministic_algorithms; "
        "training, forward and backward through autograd. Of the module: forward and training as calls, as "
        "replayed CUDA graphs, and after torch.compile.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="some of: %(choices)s")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="some of: %(choices)s (default: float32)"
    )
    every_pass = list(dict.fromkeys([*PASSES, *detector.PASSES]))
    parser.add_argument("--passes", nargs="+", choices=every_pass, metavar="PASS", help="some of: %(choices)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=ops.backends.BACKENDS, help="default: all of the device")
    parser.add_argument(
        "--peers",
        action="store_true",
        help=f"time other packages' kernels too, where they are installed: {', '.join(peers.PEERS)}; of --clients, "
        f"{sides.PEER} where it knows the model",
    )
    parser.add_argument(
        "--floor", action="store_true", help="CUDA: time a kernel too that only gathers the same rows; needs nvcc"
    )
    parser.add_argument(
        "--clients",
        nargs="*",
        choices=MODELS,
        metavar="MODEL",
        help="time other people's models instead, before and after integrations.accelerate, with random weights: all, "
        "or some of: %(choices)s; with the passes forward and training, and half precision as autocast",
    )
    parser.add_argument(
        "--batch", nargs="+", type=arguments.positive, default=[1], help="images at once, of --clients (default: 1)"
    )
    parser.add_argument(
        "--detector",
        nargs="*",
        choices=detector.FORMS,
        metavar="FORM",
        help="time the whole detector instead, a later frame of six cameras and a step of training at batch "
        f"{detector.TRAINING_BATCH}: all forms, or some of: %(choices)s; passes: {', '.join(detector.PASSES)} "
        f"(default: {', '.join(detector.DEFAULT_PASSES)})",
    )
    parser.add_argument(
        "--repeats", type=arguments.positive, default=20, help="timed runs of each figure (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures, with the machine's name")
    parser.add_argument(
        "--read",
        nargs="+",
        metavar="FILE",
        type=Path,
        help="measure nothing: show these files' figures; with --json, join those of one machine",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--plot", metavar="FILE", help="draw the figures as bars, as PNG, SVG, …")
    parser.add_argument(
        "--page",
        metavar="FOLDER",
        type=Path,
        help="measure nothing: print docs/benchmarks.md, made from the results in FOLDER (benchmarks)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.page:
        print(page.render(options.page), end="")
        return
    # Before the work begins: a missing extra or a wrong file name is said at once.
    figures, picture = arguments.file("--json", options.json), arguments.picture("--plot", options.plot)
    if options.clients is not None:
        _run_clients(options, figures, picture)
        return
    if options.detector is not None:
        _run_detector(options, figures)
        return
    if options.read:
        documents = [_chosen(document, options) for document in results.read(options.read)]
    else:
        documents = [_measure(options)]
    if figures:
        if len(documents) > 1:
            raise ValueError(f"--json {figures} holds one machine's results; those read are of {len(documents)}")
        documents[0].write(figures)
    for document in documents:
        if options.markdown:
            print(markdown(document), end="\n\n")
        else:
            print_table(document)
    if picture:
        from reimplementation.bench.plots import draw_bars

        draw_bars(picture, documents)


def _run_clients(options: argparse.Namespace, figures: Path | None, picture: Path | None) -> None:
    """Time other people's models, or show those of files."""
    if options.read:
        document, *others = results.read(options.read, clients.ClientResult)
        if others:
            raise ValueError(f"--clients shows one machine's figures; those read are of {1 + len(others)}")
        if figures:
            document.write(figures)
    else:
        document = _measure_clients(options, figures)
    if options.markdown:
        print(client_tables.markdown(document))
    else:
        client_tables.print_table(document)
    if picture:
        from reimplementation.bench.clients.plots import draw

        draw(picture, document)


def _run_detector(options: argparse.Namespace, figures: Path | None) -> None:
    """Time the detector, or show a file's figures."""
    if options.plot:
        raise ValueError("--detector draws no picture: leave --plot away")
    if options.read:
        document = detector_tables.joined([results.read_one(path, detector.DetectorResult) for path in options.read])
    else:
        _check_known(options, "--detector", tuple(detector.DTYPES), detector.PASSES)
        choice = detector.Choice(
            options.detector or detector.FORMS,
            options.dtypes or ["float32", "bfloat16"],
            options.passes or detector.DEFAULT_PASSES,
        )
        with _progress(len(choice)) as (begins, fails):
            device = arguments.device(options.device)
            document = detector.measure_all(choice, device, options.repeats, begins=begins, fails=fails)
    if figures:
        document.write(figures)
    if options.markdown:
        print(detector_tables.markdown(document))
    else:
        detector_tables.print_table(document)


def _check_known(options: argparse.Namespace, of: str, dtypes: tuple[str, ...], passes: tuple[str, ...]) -> None:
    """Raise ValueError where dtypes or passes are given that a kind of run does not know."""
    for option, given, known in (("--dtypes", options.dtypes, dtypes), ("--passes", options.passes, passes)):
        if given and not set(given) <= set(known):
            raise ValueError(f"{option} of {of} are {', '.join(known)}; got {', '.join(given)}")


def _measure_clients(options: argparse.Namespace, figures: Path | None) -> Document:
    """Time other people's models; a file of figures is written after each of them."""
    _check_known(options, "--clients", tuple(clients.DTYPES), clients.PASSES)
    reason = sides.why_no_peer() if options.peers else None
    if reason:
        warnings.warn(f"{sides.PEER} is left out: {reason}", RuntimeWarning, stacklevel=1)
    choice = clients.Choice(
        options.clients or list(MODELS),
        options.dtypes or ["float32"],
        options.batch,
        options.passes or clients.PASSES,
        options.peers and reason is None,
    )
    device = arguments.device(options.device)
    with _progress(len(choice)) as (begins, says):
        keeps = (lambda document: document.write(figures)) if figures else (lambda document: None)
        return clients.measure_all(choice, device, options.repeats, clients.Listener(begins, says, keeps))


def _measure(options: argparse.Namespace) -> Document:
    """Time what the options name."""
    device = arguments.device(options.device)
    _check_known(options, "an op or a module", tuple(DTYPES), tuple(PASSES))
    choice = Choice(
        options.cases or DEFAULT_CASES[device.type],
        options.dtypes or ["float32"],
        _backends(options, device),
        options.passes or PASSES,
    )
    with _progress(len(choice)) as (begins, fails):
        return measure_all(choice, device, options.repeats, begins=begins, fails=fails)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """A progress bar on stderr: what tells it that something begins, and what says a line above it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda what: progress.update(task, advance=1, description=what),
            lambda message: progress.console.print(message, markup=False, soft_wrap=True),
        )


def _backends(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Everything that is to be timed on a device: backends, peers, the floor."""
    backends = list(options.backends or ops.available_backends(device))
    missing = ops.backends.why_missing(device)
    if missing and not options.backends:
        warnings.warn(f"timing grid_sample alone: no {device.type} kernels: {missing}", RuntimeWarning, stacklevel=1)
    if options.peers:
        found, reasons = peers.installed(device)
        backends += found
        for name, reason in reasons.items():
            warnings.warn(f"{name} is left out: {reason}", RuntimeWarning, stacklevel=1)
    if options.floor:
        if device.type != "cuda":
            raise ValueError(f"--floor is a CUDA kernel: it needs --device cuda; got {device}")
        build(device)  # now, lest it fail when half is measured
        backends.append(FLOOR)
    return backends


def _chosen(document: Document, options: argparse.Namespace) -> Document:
    """The results of a file that the options name."""
    wanted = {"case": options.cases, "dtype": options.dtypes, "passed": options.passes, "backend": options.backends}
    chosen = [
        result
        for result in document.results
        if all(names is None or getattr(result, field) in names for field, names in wanted.items())
    ]
    return Document(document.machine, document.versions, document.date, chosen)
