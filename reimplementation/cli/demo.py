"""`python -m reimplementation demo`: see the op at work, then time the module on every backend here."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import TYPE_CHECKING

import torch

import reimplementation
from reimplementation import ops
from reimplementation.bench import modules
from reimplementation.demo import aggregation, attention

from . import arguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHOWS = {"aggregation": aggregation.show, "msda": attention.show}
MAX_QUERIES = 100_000
STEPS_BESIDE_CASES = 4
MAX_ROWS = 100


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="read colours from images through an op, and time its module on every backend",
        description="Read the colours of the boxes around a car through deformable aggregation, or those around "
        "a grid of queries in one image through multi-scale deformable attention; draw what was read and where; "
        "and time the op's whole module on every backend of this machine.",
    )
    parser.add_argument("--op", choices=SHOWS, default="aggregation", help="which op (default: %(default)s)")
    parser.add_argument(
        "--rig", metavar="DIR", help="a folder with sample.json and images (default: a built-in street)"
    )
    parser.add_argument(
        "--output", metavar="FILE", default="demo.png", help="the picture, as PNG, SVG, … (default: %(default)s)"
    )
    parser.add_argument(
        "--queries",
        metavar="N",
        type=arguments.at_most(MAX_QUERIES),
        default=900,
        help="queries of the timed module (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # Before the work begins: a missing extra or a wrong file name is said at once.
    from rich.console import Console
    from rich.progress import Progress

    output = arguments.picture("--output", options.output)
    # Of the CPU the op itself says so: it reads the colours there.
    if torch.cuda.is_available() and (missing := ops.backends.why_missing("cuda")):
        warnings.warn(f"timing grid_sample alone on the GPU: no cuda kernels: {missing}", RuntimeWarning, stacklevel=1)
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=len(modules.cases()) + STEPS_BESIDE_CASES)
        found = SHOWS[options.op](
            options.rig,
            options.queries,
            output,
            lambda description: progress.update(task, advance=1, description=description),
        )
    document = {
        "reimplementation": reimplementation.__version__,
        "op": options.op,
        "picture": str(output),
        **found,
    }
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print_report(document, Console())


def print_report(document: dict, console: Console) -> None:
    """Print what `demo --json` would have said, as tables."""
    if document["op"] == "aggregation":
        _print_colors(document, console)
    else:
        _print_attention(document, console)
    _print_module(document, console)
    console.print(f"\nPicture: {document['picture']}", markup=False, highlight=False)


def _print_colors(document: dict, console: Console) -> None:
    from rich.text import Text

    boxes, colors = document["boxes"], document.get("colors")
    table = _table("Colours read at the key points of each box")
    table.add_column("#", justify="right", style="dim")
    table.add_column("box")
    table.add_column("key points seen", justify="right")
    if colors:
        table.add_column("painted")
    table.add_column("recovered" if colors else "mean colour")
    if colors:
        table.add_column("error / 255", justify="right")
    for number, box in enumerate(boxes[:MAX_ROWS], start=1):
        row = [str(number), Text(box["label"]), str(box["key_points_seen"])]
        row += [_swatch(box["painted_rgb"])] if colors else []
        row += [_swatch(box["recovered_rgb"])]
        if colors:
            error = "" if box["error"] is None else _error(box["error"])
            row += [Text(error, style="" if box["counted"] else "dim")]
        table.add_row(*row)
    console.print(table)
    if len(boxes) > MAX_ROWS:
        console.print(f"and {len(boxes) - MAX_ROWS} more; --json lists them all")
    if colors:
        console.print(
            f"\nMean absolute error {_error(colors['mean_absolute_error'])} / 255 over the "
            f"{colors['counted_boxes']} boxes of which {colors['rule']}.",
            highlight=False,
        )


def _print_attention(document: dict, console: Console) -> None:
    from rich.text import Text

    table = _table(f"Colours read around each query of {document['camera']}")
    for heading in ("x", "y"):
        table.add_column(heading, justify="right", style="dim")
    table.add_column("mean")
    table.add_column("of each head")
    for query in document["queries"]:
        heads = query["heads_rgb"]
        mean = [sum(channel) / len(heads) for channel in zip(*heads)]
        table.add_row(*(f"{x:.2f}" for x in query["xy"]), _swatch(mean), Text.assemble(*map(_patch, heads)))
    console.print(table)
    colors = document["colors"]
    console.print(
        f"\nLargest error {_error(colors['max_absolute_error'])} / 255, against {colors['against']}.",
        highlight=False,
    )


def _print_module(document: dict, console: Console) -> None:
    module = document["module"]
    table = _table(f"The whole module, {module['name']}: {module['queries']} queries, {module['sizes']}")
    for heading in ("device", "backend", "dtype"):
        table.add_column(heading)
    for heading in ("forward, ms", "fwd + bwd, ms", "memory, MB", "max error"):
        table.add_column(heading, justify="right")
    for timing in module["timings"]:
        memory = timing["extra_memory_bytes"]
        table.add_row(
            timing["device"],
            timing["backend"],
            timing["dtype"],
            f"{timing['forward_ms']:.2f}",
            f"{timing['forward_backward_ms']:.2f}",
            "-" if memory is None else f"{memory / 1e6:.0f}",
            f"{timing['max_relative_error']:.1e}",
        )
    console.print()
    console.print(table)
    console.print(
        f"Memory: the most held during forward and backward, beyond parameters and inputs. Error: {module['error']}.",
        style="dim",
    )


def _table(title: str):
    from rich.table import Table
    from rich.text import Text

    # A camera's name may read like markup.
    return Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)


def _error(value: float) -> str:
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"


def _swatch(color: list | None) -> Text:
    from rich.text import Text

    if color is None:
        return Text("not seen", style="dim")
    red, green, blue = _rgb(color)
    return Text.assemble(_patch(color), f" {red:3d} {green:3d} {blue:3d}")


def _patch(color: list) -> Text:
    from rich.text import Text

    return Text("    ", style="on rgb({},{},{})".format(*_rgb(color)))


def _rgb(color: list) -> tuple[int, ...]:
    return tuple(min(max(round(channel), 0), 255) for channel in color)
