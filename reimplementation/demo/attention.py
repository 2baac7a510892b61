"""The demo of multi-scale deformable attention: colours read around queries, and the module on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from reimplementation.bench.inputs import AttentionProblem
from reimplementation.bench.modules import Timing, measure_all, module_document
from reimplementation.data.rig import Camera, Rig
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH, built_in_scene
from reimplementation.demo.reading import NUM_HEADS, NUM_POINTS, STRIDES, Reading, read_colors
from reimplementation.models import MSDeformAttn

D_MODEL = 256


def show(rig_folder: str | None, num_queries: int, output: Path, begins: Callable[[str], None]) -> dict:
    """Draw the picture and time the module; returns everything that was found, ready for JSON.

    Args:
        rig_folder: a folder with sample.json and images; None stands for the built-in street.
        num_queries: of the timed module.
        output: the picture's file; its format follows its suffix.
        begins: is told what comes next, in words.
    """
    from reimplementation.demo.attention_drawing import draw  # first: a missing extra is named before the work begins

    begins("looking around")
    camera = front_camera(rig_folder)
    begins("reading colours")
    reading = read_colors(camera.pixels)
    begins("drawing")
    draw(output, camera.pixels, reading)
    timings = measure_all(problem(num_queries), begins)
    return _document(camera, reading, timings, num_queries)


def front_camera(folder: str | None = None) -> Camera:
    """The camera that looks ahead, in the built-in street or in the rig of a folder, at 704 x 256 pixels."""
    rig = built_in_scene().rig if folder is None else Rig.load(folder).scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)
    return max(rig.cameras, key=lambda camera: camera.world_to_camera[2, 1])  # y of its optical axis: forward


def problem(num_queries: int, seed: int = 0) -> AttentionProblem:
    """256 channels, 8 heads, 4 points, 4 levels of a 704 x 256 image; random features, queries at random places.

    The module's offsets and weights depend on the query, as after training.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MSDeformAttn(D_MODEL, len(STRIDES), NUM_HEADS, NUM_POINTS).eval()
        with torch.no_grad():
            for layer in (module.sampling_offsets, module.attention_weights):
                torch.nn.init.xavier_uniform_(layer.weight)
    spatial_shapes = torch.tensor([(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in STRIDES])
    rows = spatial_shapes.prod(-1)
    return AttentionProblem(
        module=module,
        query=torch.randn(1, num_queries, D_MODEL, generator=generator),
        reference_points=torch.rand(1, num_queries, 1, 2, generator=generator),
        input_flatten=torch.randn(1, int(rows.sum()), D_MODEL, generator=generator),
        spatial_shapes=spatial_shapes,
        level_start_index=rows.cumsum(0) - rows,
    )


def _document(camera: Camera, reading: Reading, timings: list[Timing], queries: int) -> dict:
    """Everything the demo found, ready for JSON."""
    return {
        "camera": camera.name,
        "queries": [
            {"xy": place.tolist(), "heads_rgb": colors.tolist()}
            for place, colors in zip(reading.places, reading.colors, strict=True)
        ],
        "colors": {
            "max_absolute_error": reading.error,
            "against": "grid_sample in float64",
            "unit": "1/255",
        },
        "module": module_document(
            "MSDeformAttn",
            queries,
            f"{NUM_HEADS} heads, {len(STRIDES)} levels, {NUM_POINTS} points, {D_MODEL} channels",
            timings,
        ),
    }
