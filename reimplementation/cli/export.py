"""`python -m reimplementation export`: write a module as ONNX, an AOTInductor package or an exported program."""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from reimplementation.models import DeformableFeatureAggregation, MSDeformAttn

from . import arguments

ANY_BATCH, ANY_BATCH_AND_QUERIES = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
IMAGE_STRIDE = 4  # pixels of an image per pixel of its first level
LARGEST_ERROR = 1e-4  # relative L2, in float32; what is larger is another computation
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What is exported: a module, its inputs by name for any (batch, queries), and which of their sizes may vary."""

    module: nn.Module
    inputs: Callable[[int, int], Inputs]
    dynamic_shapes: Inputs

    def to(self, device: torch.device) -> Model:
        def inputs(batch: int, queries: int) -> Inputs:
            return tree_map(lambda tensor: tensor.to(device), self.inputs(batch, queries))

        return Model(self.module.to(device), inputs, self.dynamic_shapes)

    def exported(self, inputs: Inputs) -> torch.export.ExportedProgram:
        return torch.export.export(self.module, (), inputs, dynamic_shapes=self.dynamic_shapes)


@dataclass(frozen=True)
class Format:
    """A kind of file: how its name ends, how a model is written, how a file is read back as a function of inputs."""

    suffix: str
    write: Callable[[Model, Inputs, Path], None]
    read: Callable[[Path], Callable[[Inputs], Tensor]]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a module as ONNX, an AOTInductor package or an exported program",
        description="Export a module with random weights, run what was written, and print its error against the "
        "module. Batch and number of queries may differ from call to call, the levels may not.",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write: NAME.onnx, or else NAME.pt2")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--module", required=True, choices=MODELS)
    parser.add_argument(
        "--levels",
        nargs="+",
        type=_level,
        default=[(64, 176), (32, 88), (16, 44), (8, 22)],
        metavar="HxW",
        help="rows and columns of each (default: 64x176 32x88 16x44 8x22)",
    )
    for name, default, what in (
        ("--channels", 256, "of queries and features"),
        ("--groups", 8, "groups of channels, or attention heads"),
        ("--points", 4, "that a query samples"),
        ("--cameras", 6, "of the aggregation"),
        ("--queries", 900, "of the check"),
    ):
        parser.add_argument(name, type=arguments.positive, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="that the module is on (default: %(default)s)")
    parser.set_defaults(run=run)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    kind = FORMATS[options.format]
    if options.output.suffix != kind.suffix:
        raise ValueError(f"the name of --format {options.format} ends in {kind.suffix}; got {options.output}")
    if options.channels % options.groups != 0:
        raise ValueError(f"--channels must be a multiple of --groups {options.groups}; got {options.channels}")
    device = arguments.device(options.device)
    # PyTorch's exporters warn of packages that nothing here needs, and of their own future.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[options.module](options).to(device)
        # An exporter would take a size of 1 for a constant; the check below knows better.
        kind.write(model, model.inputs(2, max(2, options.queries)), options.output)
        print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB; relative L2 error against PyTorch:")
        _check(model, kind.read(options.output), [(2, options.queries), (1, options.queries + 1)])


def _check(model: Model, function: Callable[[Inputs], Tensor], sizes: list[tuple[int, int]]) -> None:
    for batch, queries in sizes:
        inputs = model.inputs(batch, queries)
        expected = model.module(**inputs).cpu()
        error = ((function(inputs).cpu() - expected).norm() / expected.norm()).item()
        print(f"  batch {batch}, {queries} queries: {error:.1e}")
        if not error <= LARGEST_ERROR:
            raise RuntimeError(f"the file does not compute what the module does: relative L2 error {error:.1e}")


def _aggregation(options: argparse.Namespace) -> Model:
    """`DeformableFeatureAggregation`: cameras that look all around, boxes on the ground within 30 m."""
    channels, cameras = options.channels, options.cameras
    module = DeformableFeatureAggregation(
        channels,
        options.groups,
        len(options.levels),
        cameras,
        kps_generator={"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": options.points - 1},
        use_deformable_func=True,
        use_camera_embed=True,
        residual_mode=None,  # errors of the samples would hide behind the exact instance feature
    ).eval()
    height, width = (IMAGE_STRIDE * size for size in options.levels[0])
    matrices = torch.stack([_looking_along(2 * math.pi * i / cameras, width, height) for i in range(cameras)])

    def inputs(batch: int, queries: int) -> Inputs:
        centre = (torch.rand(batch, queries, 3) - 0.5) * torch.tensor([60, 60, 6])
        rest = torch.randn(batch, queries, 8)
        return {
            "instance_feature": torch.randn(batch, queries, channels),
            "anchor": torch.cat([centre, rest], -1),
            "anchor_embed": torch.randn(batch, queries, channels),
            "feature_maps": [torch.randn(batch, cameras, channels, *shape) for shape in options.levels],
            "metas": {
                "projection_mat": matrices.repeat(batch, 1, 1, 1),
                "image_wh": torch.tensor([width, height]).repeat(batch, cameras, 1),
            },
        }

    dynamic_shapes = {
        "instance_feature": ANY_BATCH_AND_QUERIES,
        "anchor": ANY_BATCH_AND_QUERIES,
        "anchor_embed": ANY_BATCH_AND_QUERIES,
        "feature_maps": [ANY_BATCH] * len(options.levels),
        "metas": {"projection_mat": ANY_BATCH, "image_wh": ANY_BATCH},
    }
    return Model(module, inputs, dynamic_shapes)


def _looking_along(bearing: float, width: int, height: int) -> Tensor:
    """(4, 4): the projection of a camera at the origin that sees 90 degrees of the horizon around a bearing."""
    sin, cos = math.sin(bearing), math.cos(bearing)
    forward, right, down = torch.tensor([[cos, sin, 0, 0], [sin, -cos, 0, 0], [0, 0, -1.0, 0]])
    focal = width / 2
    u, v = focal * right + width / 2 * forward, focal * down + height / 2 * forward
    return torch.stack([u, v, forward, torch.tensor([0, 0, 0, 1.0])])


class _FixedLevels(nn.Module):
    """`MSDeformAttn` with the shapes of its levels inside, so that they are constants of the file."""

    def __init__(self, attention: MSDeformAttn, levels: list[tuple[int, int]]):
        super().__init__()
        self.attention = attention
        shapes = torch.tensor(levels)
        rows = shapes.prod(-1)
        self.register_buffer("spatial_shapes", shapes)
        self.register_buffer("level_start_index", rows.cumsum(0) - rows)

    def forward(self, query: Tensor, reference_points: Tensor, input_flatten: Tensor) -> Tensor:
        return self.attention(query, reference_points, input_flatten, self.spatial_shapes, self.level_start_index)


def _attention(options: argparse.Namespace) -> Model:
    """`MSDeformAttn`, queries anywhere in the image."""
    levels, channels = options.levels, options.channels
    num_rows = sum(height * width for height, width in levels)

    def inputs(batch: int, queries: int) -> Inputs:
        return {
            "query": torch.randn(batch, queries, channels),
            "reference_points": torch.rand(batch, queries, 1, 2).repeat(1, 1, len(levels), 1),
            "input_flatten": torch.randn(batch, num_rows, channels),
        }

    dynamic_shapes = {
        "query": ANY_BATCH_AND_QUERIES,
        "reference_points": ANY_BATCH_AND_QUERIES,
        "input_flatten": ANY_BATCH,
    }
    module = _FixedLevels(MSDeformAttn(channels, len(levels), options.groups, options.points), levels)
    return Model(module.eval(), inputs, dynamic_shapes)


def _write_onnx(model: Model, inputs: Inputs, path: Path) -> None:
    program = torch.onnx.export(
        model.module, (), kwargs=inputs, dynamic_shapes=model.dynamic_shapes, dynamo=True, verbose=False
    )
    assert program is not None  # for it was not given a file to write
    program.save(path, external_data=False)  # weights in the file itself, so that there is one to move


def _read_onnx(path: Path) -> Callable[[Inputs], Tensor]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def function(inputs: Inputs) -> Tensor:
        arrays = [tensor.numpy(force=True) for tensor in tree_leaves(inputs)]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays)))[0])

    return function


def _aoti_settings() -> dict[str, bool]:
    """What a package needs that is asked to check its inputs: by itself it would refuse a batch of 1.

    The oldest PyTorch may not know the setting; its packages are not asked.
    """
    is_known = hasattr(torch._inductor.config.aot_inductor, "check_lowerbound")
    return {"aot_inductor.check_lowerbound": False} if is_known else {}


def _write_aoti(model: Model, inputs: Inputs, path: Path) -> None:
    program = model.exported(inputs)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_aoti_settings())


def _read_aoti(path: Path) -> Callable[[Inputs], Tensor]:
    if _aoti_settings():
        # A package reads this when it first runs. Unasked, it takes other sizes than it was made for, and reads beyond.
        os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    package = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: package(**inputs)


def _write_exported(model: Model, inputs: Inputs, path: Path) -> None:
    torch.export.save(model.exported(inputs), path)


def _read_exported(path: Path) -> Callable[[Inputs], Tensor]:
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
    "aoti": Format(".pt2", _write_aoti, _read_aoti),
    "exported": Format(".pt2", _write_exported, _read_exported),
}
MODELS = {"aggregation": _aggregation, "attention": _attention}


def _level(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected rows and columns, such as 64x176; got {text!r}")
    height, width = map(int, sizes)
    return height, width
