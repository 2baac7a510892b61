"""`python -m reimplementation vit`: check, summarise, run, time and export a ViT that a YAML file describes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reimplementation.bench import results, vit_tables
from reimplementation.bench import vit as bench
from reimplementation.bench.results import Document
from reimplementation.bench.vit_parts import PARTS, part_candidate
from reimplementation.models.backbones.vit import ViT, ViTConfig
from reimplementation.models.backbones.vit.config import DTYPES
from reimplementation.models.backbones.vit.export import (
    DenseFeatures,
    check_package,
    export_package,
    load_package,
    random_images,
)
from reimplementation.models.backbones.vit.files import load_weights, read_images, write_tensor
from reimplementation.models.backbones.vit.initialization import wake_branches
from reimplementation.models.backbones.vit.summary import summarize
from reimplementation.ops.dtypes import name_of

FORMATS = ("text", "json")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "vit",
        help="check, summarise, run, time and export a ViT",
        description="What CONFIG says is in docs/vit.md; examples are in examples/vit.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_validate, _add_summarize, _add_infer, _add_benchmark, _add_export):
        add(commands)


def _add_validate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("validate", help="check a configuration, its heads included")
    _add_config(parser)
    parser.set_defaults(run=run_validate)


def _add_summarize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("summarize", help="tokens, parameters, operations and memory of a configuration")
    _add_config(parser)
    parser.set_defaults(run=run_summarize)


def _add_infer(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "infer",
        help="run a model, and time it",
        description="Run a model, or the package that `vit export` wrote, on an input or on random images.",
    )
    _add_config(parser)
    parser.add_argument("--model", type=Path, metavar="PT2", help="run this package instead of the model in Python")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict, ours or DINOv3's (else random)")
    parser.add_argument("--input", type=Path, metavar="FILE", help=".npy or .pt of images (else random ones)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the dense features, as .npy or .pt")
    parser.add_argument("--batch-size", type=_positive, default=1, help="of random images (default: %(default)s)")
    _add_device(parser, "cpu")
    parser.add_argument("--warmup", type=_positive, default=3, help="untimed runs (default: %(default)s)")
    parser.add_argument("--iterations", type=_positive, default=10, help="timed runs (default: %(default)s)")
    parser.set_defaults(run=run_infer)


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="time configurations at several resolutions",
        description="Every configuration at every resolution, batch size, pass and mode: latency, memory, operations "
        "and throughput. What fails is said and left out.",
    )
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="YAML files")
    parser.add_argument(
        "--read", nargs="+", type=Path, metavar="FILE", help="measure nothing: show these files' figures, as one run's"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--resolutions", nargs="+", type=_size, metavar="HxW", help="default: each configuration's img_size"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=_positive, default=[1], metavar="N", help="default: 1")
    parser.add_argument("--passes", nargs="+", choices=bench.PASSES, default=["forward"], help="default: forward")
    parser.add_argument("--modes", nargs="+", choices=bench.MODES, default=["eager"], help="default: eager")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["model"], help="of each configuration (default: model)"
    )
    parser.add_argument("--timm", nargs="+", default=[], metavar="NAME", help="models of timm to time beside them")
    _add_device(parser, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=_positive, default=30, help="timed runs (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write benchmark_results.csv and .json there")
    parser.add_argument("--plot-formats", nargs="+", default=["png"], metavar="EXT", help="default: png")
    parser.add_argument("--dpi", type=_positive, default=150, help="of the plots (default: %(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="write no plots beside them")
    _add_format(parser)
    parser.set_defaults(run=run_benchmark)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="compile a model into a package that runs without Python",
        description="Write an AOTInductor package of the model in evaluation, for images of the configuration's "
        "img_size in any batch; then run it and compare it with the model.",
    )
    _add_config(parser)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write, NAME.pt2")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict, ours or DINOv3's (else random)")
    _add_device(parser, "cpu")
    parser.set_defaults(run=run_export)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    _add_format(parser)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="text", help="of what is printed (default: %(default)s)")


def _add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", default=default, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and images (default: the configuration's)")


def run_validate(options: argparse.Namespace) -> None:
    try:
        config = _read(options.config)
    except ValueError as error:
        if options.format == "json":
            print(json.dumps({"valid": False, "config_path": str(options.config), "error": str(error)}, indent=2))
        raise
    facts = {
        "valid": True,
        "config_path": str(options.config),
        "depth": config.depth,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "patch_size": list(config.patch_size),
        "img_size": list(config.img_size),
        "heads": {name: head.type_name for name, head in config.heads.items()},
    }
    _print(facts, options.format)


def run_summarize(options: argparse.Namespace) -> None:
    config = _read(options.config)
    facts = summarize(config)
    flops = bench.count_flops(bench.vit_candidate("", config), config.img_size)
    facts["compute"] = {"forward_gflops_per_image": flops / 1e9}
    _print(facts, options.format)


def run_infer(options: argparse.Namespace) -> None:
    if options.model and options.weights:
        raise ValueError("a package holds its weights: give --model or --weights, not both")
    config, device = _read(options.config, options.dtype), torch.device(options.device)
    function = load_package(options.model) if options.model else DenseFeatures(_model(config, options.weights, device))
    if options.input:
        images = read_images(options.input, config, any_size=options.model is None).to(device)
    else:
        images = random_images(config, options.batch_size, device)
    with torch.inference_mode():
        output = function(images)
        latency = bench.measure_latency(lambda: function(images), device, options.warmup, options.iterations)
    if options.output:
        write_tensor(options.output, output)
    _print(_inference_facts(options, images, output, latency), options.format)


def run_benchmark(options: argparse.Namespace) -> None:
    if bool(options.configs) == bool(options.read):
        raise ValueError("give configurations to time, or files to --read")
    folder = options.output_dir
    wants_plots = folder and not options.no_plots
    if wants_plots:  # before the work begins: a missing extra is named at once
        from reimplementation.bench.vit_plots import draw_all
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    if options.read:
        document = vit_tables.joined([results.read_one(path, bench.Figure) for path in options.read])
    else:
        document = _measure_all(options)
    if options.format == "json":
        print(json.dumps(asdict(document), indent=1))
    elif options.markdown:
        print(vit_tables.markdown(document))
    else:
        _print_figures(document)
    if folder:
        document.write(folder / "benchmark_results.json")
        bench.write_csv(folder / "benchmark_results.csv", document.results)
    if wants_plots:
        draw_all(folder, document, options.plot_formats, options.dpi)


def run_export(options: argparse.Namespace) -> None:
    config = _read(options.config, options.dtype)
    model = _model(config, options.weights, torch.device(options.device))
    export_package(model, options.output)
    errors = check_package(model, load_package(options.output))
    facts = {
        "path": str(options.output),
        "bytes": options.output.stat().st_size,
        "relative_l2_error": {f"batch_{batch}": error for batch, error in errors.items()},
    }
    _print(facts, options.format)


def _read(path: Path, dtype: str | None = None) -> ViTConfig:
    try:
        config = ViTConfig.from_yaml(path)
    except TypeError as error:  # a setting of another type: the file's author can put it right
        raise ValueError(str(error)) from None
    return config.replace(dtype=DTYPES[dtype]) if dtype else config


def _model(config: ViTConfig, weights: Path | None, device: torch.device) -> ViT:
    """The model in evaluation; without a file its weights are random, and always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.instantiate()
        wake_branches(model)
    if weights:
        load_weights(model, weights)
    return model.to(device).eval()


def _inference_facts(
    options: argparse.Namespace, images: Tensor, output: Tensor, latency: bench.Latency
) -> dict[str, Any]:
    return {
        "model": str(options.model or options.config),
        "weights": "the package's" if options.model else str(options.weights or "random"),
        "device": str(images.device),
        "dtype": name_of(images.dtype),
        "input_shape": list(images.shape),
        "output_shape": list(output.shape),
        "output_mean": output.double().mean().item(),
        "latency_ms": {
            "mean": latency.mean_ms,
            "std": None if math.isnan(latency.std_ms) else latency.std_ms,
            "min": latency.min_ms,
            "max": latency.max_ms,
        },
        "peak_memory_mb": None if latency.peak_bytes is None else latency.peak_bytes / 1e6,
        "images_per_s": images.shape[0] / latency.mean_ms * 1e3,
        **({"output": str(options.output)} if options.output else {}),
    }


def _measure_all(options: argparse.Namespace) -> Document:
    """Time what the options name, with a progress bar on stderr and a line there for each result."""
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(options.device)
    configs = {path.stem: _read(path, options.dtype) for path in options.configs}
    candidates = [_candidate(name, config, part) for name, config in configs.items() for part in options.parts]
    candidates += [bench.timm_candidate(name, candidates[0].dtype) for name in options.timm]
    sizes = options.resolutions or list(dict.fromkeys(tuple(config.img_size) for config in configs.values()))
    axes = (candidates, sizes, options.batch_sizes, options.passes, options.modes)
    figures = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        runs = bench.measure_all(*axes, device, options.repeats)
        for name, found in progress.track(runs, total=math.prod(map(len, axes)), description="runs"):
            if isinstance(found, bench.Figure):
                figures.append(found)
                said = f"{name}: {found.timing.median_us / 1e3:.3g} ms"
            else:
                said = f"{name} failed: {str(found).splitlines()[0]}"
            progress.console.print(said, markup=False, highlight=False)
    if not figures:
        raise RuntimeError("nothing was timed: all of it failed")
    return results.describe(device, figures, packages=_timm_version() if options.timm else {})


def _candidate(name: str, config: ViTConfig, part: str) -> bench.Candidate:
    return bench.vit_candidate(name, config) if part == "model" else part_candidate(name, config, part)


def _timm_version() -> dict[str, str]:
    import timm

    return {"timm": timm.__version__}


def _print_figures(document: Document) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140, markup=False)
    table = Table("config", "images", "pass", "mode", "dtype", title=document.machine["device"])
    for column in ("ms", "spread", "MB", "GFLOPs", "images/s", "TFLOP/s"):
        table.add_column(column, justify="right")
    for figure in document.results:
        memory = "" if figure.extra_bytes is None else f"{figure.extra_bytes / 1e6:.4g}"
        numbers = (figure.timing.median_us / 1e3, figure.timing.spread_us / 1e3)
        table.add_row(
            figure.config,
            f"{figure.batch_size} x {figure.image_size}",
            figure.passed,
            figure.mode,
            figure.dtype,
            *(f"{number:.4g}" for number in numbers),
            memory,
            *(f"{number:.4g}" for number in (figure.gflops, figure.throughput, figure.tflops_per_s)),
        )
    console.print(table)


def _print(facts: dict[str, Any], form: str) -> None:
    if form == "json":
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A line for each fact, a section for each mapping."""
    for name, value in facts.items():
        label = indent + name.replace("_", " ")
        if isinstance(value, dict):
            yield f"{label}:" if value else f"{label}: none"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{label}: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else value


def _size(text: str) -> tuple[int, ...]:
    sides = text.replace(",", "x").split("x")
    if len(sides) not in (2, 3):
        raise argparse.ArgumentTypeError(f"expected HxW, or DxHxW for volumes; got {text!r}")
    return tuple(map(_positive, sides))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)
