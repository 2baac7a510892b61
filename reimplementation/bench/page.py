"""docs/benchmarks.md: what the figures mean, and tables of all that lies in the folder benchmarks/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from reimplementation.bench import results, sweep
from reimplementation.bench.cases import CASES
from reimplementation.bench.clients import tables as client_tables
from reimplementation.bench.clients.measure import ClientResult
from reimplementation.bench.comparison import OURS, Comparison, ModelRun, OpTimes, read_comparison
from reimplementation.bench.results import Document
from reimplementation.bench.tables import default_us, markdown, markdown_table, ratio, three_digits

PAGE = """\
# Benchmarks

The command `python -m reimplementation bench --page benchmarks > docs/benchmarks.md` writes this page from the figures
in [benchmarks](../benchmarks); whatever is edited here by hand is lost.

## What you gain

{gains}
{clients}## What is measured

`python -m reimplementation bench` measures on your machine; `--cases rig-small msda-small` takes seconds on a CPU.

| case | what it is |
| --- | --- |
| rig | deformable aggregation at key points of boxes around a car, each seen by 1.1 of six cameras on average; \
900 queries of 13 points, 256 channels, 8 groups, 4 levels of 704 x 256 images; *bs1* and *bs6* are the batch size |
| dense | the same, with every point in every camera |
| map | 100 queries of 300 points, 3 at each of 5 heights of 20 points of a line on the ground |
| planner | 1024 queries of 500 points ahead of the car, before three cameras |
| fused | the same inputs before projection and softmax, which `deformable_feature_aggregation` does itself; *drop* \
leaves out 15 % of the pairs |
| msda-encoder | multi-scale deformable attention in Deformable DETR's encoder: batch 2, 8 heads of 32 channels, \
4 points on each of 4 levels of 100 x 152 to 13 x 19 pixels, a query a pixel |
| msda-decoder | the same levels with 900 queries at random places |
| msda-decoder-discrete | the same with one pixel for each location instead of four, which is not one kernel |
| msda-paper | batch 48, one head of 32 channels, 8 points, 15422 queries, levels of 92 x 160 to 12 x 20 pixels |
| module | the whole `DeformableFeatureAggregation` on a rig; *drop* with attention dropout of 0.15 |
| attention-layer | the whole `MSDeformAttn` at the sizes of *msda-encoder*, half precision under autocast; \
*unfused* is the same layer with its locations and its softmax in PyTorch |
| overhead | what the host does for one call, at a size at which the device has next to nothing to do |

| pass | what is timed |
| --- | --- |
| forward | the op's forward |
| forward warm | the same on one set of inputs again and again, which a GPU finds in its L2 if that is large enough |
| backward | the kernels of the backward alone: all three gradients |
| backward frozen | the same without the features' gradient, as where the backbone is frozen |
| backward deterministic | the same under `torch.use_deterministic_algorithms(True)` |
| training | forward and backward, through autograd |
| forward graph, training graph | of a module: the same as a replayed CUDA graph, the GPU's time alone |
| forward graphed, training graphed | of a module: called, after `torch.cuda.make_graphed_callables` |
| forward compiled, training compiled | of a module: the same after `torch.compile` |
| call … | of *overhead*: one call as PyTorch's modes ask for it |

On a GPU the ops are timed as replays of CUDA graphs, on inputs that rotate through more than the L2 holds. Where a
decoder's inputs lie in L2 already, its forward takes less: compare *forward* with *forward warm*. The module's
*forward* and *training* are calls, so they include the host. Every figure is a median.

Beside a figure, behind a stroke, stands its goal. The goals of the ops were set before the kernels were written, a step
beyond what rough prototypes took on the same machines; those of the module at batch 1 and of the host came with the
benchmark itself. *Of the floor* is the figure over that of a [kernel](../reimplementation/bench/floor/gather.cu) that
only gathers the same rows. It reads the rows' numbers from memory, where the ops compute them, so an op may come out
below it.

Peers run on the same inputs, and in the same run, as ours. Before one is timed its output is held against ours, and for
*training* its gradients too; a peer that computes something else is not timed.

## Figures

{figures}
The figures of the module's calls, of *overhead*, and of grid_sample for *msda* have the host's time in them. They
depend on that host's processor more than on the GPU, and differ between hosts that have the same GPU.

## Deterministic gradients

{determinism}
## Shapes in between

{sweeps}
## Measure again

A machine has one file, and a picture of the same name beside it. Where a run is made in parts, `bench --read` with
`--json` joins them.

```sh
python -m reimplementation bench --device cuda --dtypes float32 float16 bfloat16 --floor --peers \\
  --json benchmarks/results/nvidia-h200.json --plot benchmarks/results/nvidia-h200.png
python -m reimplementation bench --device cpu --json benchmarks/results/cpu-2-cores.json
python -m reimplementation bench --clients --peers --device cuda --dtypes bfloat16 --batch 8 1 \\
  --json benchmarks/results/clients/nvidia-h200.json
python -m reimplementation bench --clients --device cpu --passes forward \\
  --json benchmarks/results/clients/cpu-2-cores.json
python -m reimplementation sweep --device cuda \\
  --json benchmarks/sweep/nvidia-h200-float32.json --plot benchmarks/sweep/nvidia-h200.png
python -m reimplementation bench --page benchmarks > docs/benchmarks.md
```
"""

CLIENTS = """\
## Other people's models, by one call

`integrations.accelerate` puts our ops into them; [integrations.md](integrations.md) says which it knows. The models are
those of Hugging Face transformers, with random weights and at their usual sizes.

{tables}

"""

GAINS = """\
{where}

{how}

### Ops

Microseconds, and how many times as long as ours of the same dtype; SparseDrive's op on {events_date}.

{ops}

### Modules

Microseconds of a call, forward alone and with its backward; megabytes kept from one to the other, and held at most.

{modules}

### Whole models, their op alone replaced

Models of Hugging Face transformers with random weights, as they come and with our op put into them by hand, before
there was the one call that replaces a whole attention module. Under bfloat16 autocast, at batch 8:

{models}

How many times as fast each becomes, forward / training, in every way that was measured:

{speedups}
"""

PEER_NAMES = {
    "ddetr": "Deformable DETR",
    "dcnv4": "DCNv4",
    "deformops triton": "deformops, Triton",
    "deformops triton nativeatomics": "deformops, Triton, native atomics",
    "deformops cuda": "deformops, CUDA",
}
MODULE_NAMES = {
    "bs1": "`DeformableFeatureAggregation`, batch 1",
    "bs6": "`DeformableFeatureAggregation`, batch 6",
    "layer encoder": "attention layer of an encoder",
}
LINE = 120  # characters of a line of prose
SHOWN_RUN = ("bfloat16-autocast", 8)


def render(folder: Path) -> str:
    """The page, from the files in a folder: results/*.json, results/peers/*.json, results/clients/*.json, sweep/*.json.

    Raises:
        ValueError: there are no results, or a file holds something else.
    """
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise ValueError(f"there are no results in {folder / 'results'}")
    documents = [(path, results.read_one(path, results.Result)) for path in files]
    comparisons = [read_comparison(path) for path in sorted((folder / "results" / "peers").glob("*.json"))]
    return PAGE.format(
        gains="\n".join(map(_gains, comparisons)),
        clients=_clients(sorted((folder / "results" / "clients").glob("*.json"))),
        figures="\n".join(_figures(path, document) for path, document in documents),
        determinism=_determinism([document for _, document in documents]),
        sweeps="\n".join(_sweep(path) for path in sorted((folder / "sweep").glob("*.json"))),
    )


def _gains(comparison: Comparison) -> str:
    versions = ", ".join(f"{name} ({version})" for name, version in comparison.versions.items())
    return GAINS.format(
        where=paragraph(f"Measured on {comparison.machine}, on {comparison.date}, with {versions}."),
        how=paragraph(f"How it was measured: {comparison.how}."),
        events_date=comparison.events_date,
        ops=_op_gains(comparison),
        modules=_modules(comparison),
        models=_models(comparison.models),
        speedups=_speedups(comparison.models),
    )


def _clients(files: list[Path]) -> str:
    tables = [client_tables.markdown(results.read_one(path, ClientResult)) for path in files]
    return CLIENTS.format(tables="\n\n".join(tables)) if tables else ""


def _op_gains(comparison: Comparison) -> str:
    """A row for each of another's kernels on each case, against ours of the same dtype."""
    lines = []
    for case, found in comparison.ops.items():
        others = {key: times for key, times in found.items() if key[0] != OURS}
        if case in comparison.events:
            others["SparseDrive", "float32"] = comparison.events[case]
        for (whose, dtype), theirs in others.items():
            if ours := found.get((OURS, dtype)):
                lines.append([_case(case), dtype, PEER_NAMES.get(whose, whose), *_against(ours, theirs)])
    heads = ("case", "dtype", "peer", "its forward", "ours", "", "its backward", "ours", "")
    return markdown_table(heads, lines, texts=3)


def _against(ours: OpTimes, theirs: OpTimes) -> Iterable[str]:
    for our, their in ((ours.fwd, theirs.fwd), (ours.bwd, theirs.bwd)):
        yield from (three_digits(their), three_digits(our), ratio(their, our, "x"))


def _case(name: str) -> str:
    """A case of the comparison as the benchmark calls it."""
    return name if name in CASES else f"msda-{name}"


def _modules(comparison: Comparison) -> str:
    lines = []
    for name, times in comparison.modules.items():
        which = next((key for key in MODULE_NAMES if name.startswith(f"{key} ")), "")
        whose = name.removeprefix(which).strip().replace("sparsedrive op", "with SparseDrive's op, fp32")
        figures = (times.fwd_us, times.train_us, times.kept_mb, times.peak_mb)
        lines.append([MODULE_NAMES.get(which, ""), whose, *map(three_digits, figures)])
    return markdown_table(("module", "whose", "forward", "training", "MB kept", "MB at most"), lines, texts=2)


def _models(runs: list[ModelRun]) -> str:
    """A row a model, before and after, for `SHOWN_RUN`."""
    by_model: dict[str, dict[str, ModelRun]] = {}
    for run in runs:
        if (run.mode, run.batch) == SHOWN_RUN:
            by_model.setdefault(run.model, {})[run.passed] = run
    lines = []
    for model, passes in by_model.items():
        figures = []
        forward, training = passes.get("forward"), passes.get("training")
        for run_of_pass in (forward, training):
            if run_of_pass:
                figures += [_change(run_of_pass.original_ms, run_of_pass.fused_ms), _times(run_of_pass)]
            else:
                figures += ["", ""]
        if training:  # which holds the most
            figures.append(_change(training.original_peak_mb / 1e3, training.fused_peak_mb / 1e3))
        size = next(iter(passes.values()))
        lines.append([model, f"{size.height} x {size.width}", *figures])
    heads = ("model", "image", "forward, ms", "", "training, ms", "", "memory in training, GB")
    return markdown_table(heads, lines, texts=2)


def _speedups(runs: list[ModelRun]) -> str:
    ways = sorted({(run.mode, run.batch) for run in runs}, key=lambda way: (way[0] != "float32", way))
    by_key = {(run.model, run.mode, run.batch, run.passed): run for run in runs}
    lines = []
    for model in dict.fromkeys(run.model for run in runs):
        cells = []
        for way in ways:
            found = [by_key.get((model, *way, passed)) for passed in ("forward", "training")]
            cells.append(" / ".join(_times(run) for run in found if run))
        lines.append([model, *cells])
    return markdown_table(("model", *(f"{mode}, batch {batch}" for mode, batch in ways)), lines, texts=1)


def _change(before: float, after: float) -> str:
    return f"{three_digits(before)} → {three_digits(after)}"


def _times(run: ModelRun) -> str:
    return ratio(run.original_ms, run.fused_ms, "x")


def _figures(path: Path, document: Document) -> str:
    parts = [f"### {document.machine['device']}\n"]
    if path.with_suffix(".png").exists():
        picture = f"../benchmarks/results/{path.stem}.png"
        parts.append(f"![What each case takes on every backend, and the goals]({picture})\n")
    return "\n".join([*parts, markdown(document), ""])


def _determinism(documents: list[Document]) -> str:
    """How much longer a deterministic backward takes at most, on each machine where it was timed."""
    said = (
        "On CUDA the gradients of features are summed in any order, and are equal up to rounding from run to run. "
        "Under `torch.use_deterministic_algorithms(True)` they are bitwise equal; the forward, the other gradients and "
        "the CPU's are so always."
    )
    for document in documents:
        pairs = [(r, default_us(r, document)) for r in document.results if r.passed == "backward deterministic"]
        ratios = [(r.timing.median_us / default, r) for r, default in pairs if default]
        if ratios:
            worst, r = max(ratios, key=lambda pair: pair[0])
            machine = document.machine["device"]
            said += f" A backward then takes up to {worst:.1f} times as long ({r.case} in {r.dtype}, {machine})."
    return paragraph(said) + "\n"


def _sweep(path: Path) -> str:
    document = results.read_one(path, sweep.Figure)
    dtypes = ", ".join(dict.fromkeys(figure.dtype for figure in document.results))
    found, count = sweep.outliers(document.results), len(document.results)
    picture = f"../benchmarks/sweep/{path.stem.rpartition('-')[0]}.png"
    return (
        paragraph(
            "`python -m reimplementation sweep` goes through a grid of shapes and looks for those that take more than "
            f"{sweep.TIMES_WORSE:g} times as long for the bytes that they gather as their neighbours do. Of {count} on "
            f"the {document.machine['device']} in {dtypes} it found {len(found) or 'none'} ({document.date}; "
            f"[picture]({picture}))."
        )
        + "\n"
    )


def paragraph(prose: str) -> str:
    return textwrap.fill(prose, LINE, break_long_words=False, break_on_hyphens=False)
