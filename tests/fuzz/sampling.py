"""Draws of the sampling ops: levels of any shape in any place, locations at edges and beyond, any number of all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests import reference
from tests.fuzz.drawing import NOT_FINITE, OF_THE_EXTENSION, Draw, Drawing
from tests.ops.inputs import STEP
from tests.ops.table import AGGREGATION, ATTENTION, ATTENTION_FROM_OFFSETS, FLOATING, INTEGER

MOST_PRODUCTS = 1 << 13  # about as many products the float64 rules form for one draw
# Locations are multiples of STEP: positions in levels of these sizes are exact in float32.
SPECIAL_LOCATIONS = (0.0, -0.0, 1.0, 1 - 2.0**-24, 2.0**-24, 1e-40, -1e-40, 1e30, -1e30, 3e38, 1 + STEP, -STEP)


class SamplingDrawing(Drawing):
    def draw(self) -> Draw:
        rng = self.rng
        self.dtype = rng.choice(FLOATING)
        result = Draw(self.op, rng.choice(self.backends), [], (False,) * 3)
        shapes, starts, num_rows, levels_fit = self.levels()
        sizes = self.sizes(shapes, num_rows)
        location, result.exact_locations = self.location(sizes["location"])
        features, weights = self.normal(*sizes["features"]), self.normal(*sizes["weights"])
        # 0 * inf is one thing where a position is exact, another where it is not.
        if result.exact_locations and self.chance(0.15):
            self.poison(rng.choice([features, weights]))
        result.direct = result.backend in OF_THE_EXTENSION and self.chance(0.2)
        autocast = not result.direct and self.chance(0.05)
        metadata = [self.lay_out(t, "metadata") for t in self.narrow(shapes, starts)]
        weight_dtype = rng.choice([self.dtype, torch.float32])
        location_dtype = rng.choice([torch.float32, torch.float32, torch.float64])
        if autocast:
            result.autocast = rng.choice([torch.bfloat16, torch.float16])
            weight_dtype, location_dtype = rng.choice(FLOATING), rng.choice(FLOATING)
        if result.direct:  # with what the Python function would pass on
            location_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            weight_dtype = torch.float64 if self.dtype == torch.float64 else weight_dtype
        operands = [
            self.lay_out(features.to(self.dtype).to(self.device), "features"),
            *self.place(metadata),
            self.lay_out(location.to(location_dtype).to(self.device), "locations"),
            self.lay_out(weights.to(weight_dtype).to(self.device), "weights"),
        ]
        result.operands = operands
        result.needs = tuple(self.chance(0.75) for _ in range(3))
        output_shape = sizes["output"]
        grad_output = self.normal(*output_shape)
        if result.exact_locations and self.chance(0.05):
            self.poison(grad_output)
        result.grad_output = self.lay_out(grad_output.to(self.dtype).to(self.device), "grad_output")
        levels_are_read = all(t.device.type == "cpu" for t in operands[1:3])
        if levels_are_read and not levels_fit:
            result.error = ValueError
        self.refuse(result)
        if result.backend == "cuda" and self.chance(0.4):
            result.deterministic = True
            self.story.append("deterministic")
        result.story = f"{str(self.dtype).removeprefix('torch.')} {sizes['features']} {'; '.join(self.story)}"
        return result

    @property
    def has_heads(self) -> bool:
        return self.op in (ATTENTION, ATTENTION_FROM_OFFSETS)

    # Levels: (num_cams, num_levels) for deformable aggregation, (num_levels) for attention.

    def levels(self) -> tuple[Tensor, Tensor, int, bool]:
        """Shapes, first rows, rows of the features, and whether every level fits them."""
        rng = self.rng
        self.num_cams = 1 if self.has_heads else self.count(8)
        self.num_levels = self.count(5, many=12)
        num_images = self.num_cams * self.num_levels
        sides = [0, 1, 2, 3, 4, 5, 7, 8, 16] if self.chance(0.3) else [1, 2, 3, 4, 5, 8, 13]
        shapes = [(rng.choice(sides), rng.choice(sides)) for _ in range(num_images)]
        if self.chance(0.3):
            shapes = [rng.choice(shapes)] * num_images if shapes else []
        kind = rng.choice(["in order"] * 4 + ["permuted", "gaps", "overlapping", "beyond", "negative", "huge"])
        self.story.append(f"levels {kind}")
        order = list(range(num_images))
        if kind == "permuted":
            rng.shuffle(order)
        starts, end = [0] * num_images, 0
        for i in order:
            end += rng.randrange(4) if kind == "gaps" else 0
            starts[i] = end
            end += math.prod(shapes[i])
        num_rows = end + (rng.randrange(5) if self.chance(0.2) else 0)
        if kind == "overlapping":
            num_rows = max([math.prod(shape) for shape in shapes], default=0) + rng.randrange(5)
            starts = [rng.randrange(num_rows - math.prod(shape) + 1) for shape in shapes]
        for i in range(num_images) if kind in ("beyond", "negative", "huge") else ():
            if self.chance(0.5):
                shapes[i], starts[i] = self.wild_level(kind, shapes[i], starts[i], num_rows)
        fit = all(reference.fits(*shape, start, num_rows) for shape, start in zip(shapes, starts))
        dims = (self.num_levels,) if self.has_heads else (self.num_cams, self.num_levels)
        shapes = torch.tensor(shapes, dtype=torch.int64).view(*dims, 2)
        return shapes, torch.tensor(starts, dtype=torch.int64).view(dims), num_rows, fit

    def wild_level(self, kind: str, shape: tuple, start: int, num_rows: int) -> tuple[tuple[int, int], int]:
        height, width = shape
        if kind == "beyond":
            return self.rng.choice([(shape, num_rows - height * width + 1), ((height + num_rows + 1, width), start)])
        if kind == "negative":
            return self.rng.choice([((-height, width), start), ((-height, -width), start), (shape, -1 - start)])
        large = self.rng.choice([2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1])
        return self.rng.choice([((large, width), start), ((large, large), start), (shape, large), ((large, 0), start)])

    def narrow(self, shapes: Tensor, starts: Tensor) -> list[Tensor]:
        """Each in a random integer dtype that holds its numbers."""
        result = []
        for tensor in (shapes, starts):
            dtypes = [dtype for dtype in INTEGER if torch.equal(tensor.to(dtype).long(), tensor)]
            result.append(tensor.to(self.rng.choice(dtypes)))
        return result

    def place(self, metadata: list[Tensor]) -> list[Tensor]:
        """Each on the CPU or the device."""
        return [t.to(self.device) if self.chance(0.5) else t for t in metadata]

    # Sizes and numbers.

    def sizes(self, shapes: Tensor, num_rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of features, locations, weights and output."""
        rng = self.rng
        batch = self.count(3)
        channels = 0 if self.chance(0.02) else rng.choice([1, 2, 3, 4, 7, 8, 12, 16, 30, 32, 33, 64, 71, 128, 130, 260])
        num_groups = rng.choice([n for n in range(1, max(channels, 1) + 1) if channels % n == 0])
        num_heads = self.count(4, many=9)
        num_points = self.count(5, many=150)
        num_images = self.num_cams * self.num_levels * (num_heads if self.has_heads else 1)
        most = MOST_PRODUCTS // max(1, 4 * batch * channels * num_points * num_images)
        num_queries = min(self.count(6, many=300), max(1, most))
        if self.op is AGGREGATION:
            samples = (batch, num_queries, num_points, self.num_cams)
            return {
                "features": (batch, num_rows, channels),
                "location": (*samples, 2),
                "weights": (*samples, self.num_levels, num_groups),
                "output": (batch, num_queries, channels),
            }
        samples = (batch, num_queries, num_heads, self.num_levels, num_points)
        return {
            "features": (batch, num_rows, num_heads, channels),
            "location": (*samples, 2),
            "weights": samples,
            "output": (batch, num_queries, num_heads * channels),
        }

    def location(self, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Locations around the unit square, and whether positions computed from them in float32 are exact."""
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        if self.chance(0.2):
            self.story.append("any locations")
            return (uniform * 1.6 - 0.3).float().double(), False
        location = ((uniform * 1.5 - 0.25) / STEP).round() * STEP
        if self.chance(0.3):  # edges and centres of pixels
            location = (location * 16).round() / 16
        if self.chance(0.5):
            self.sprinkle(location, SPECIAL_LOCATIONS + NOT_FINITE, 0.1)
        # The ops read float32: what is no number of that kind would be rounded.
        return location.float().double(), True
