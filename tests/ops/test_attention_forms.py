"""Forms of ms_deform_attn's operands: shapes as numbers, no first rows, points a level, one pixel, other layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation import ops
from reimplementation.ops.pyramid import levels_of_numbers
from tests.ops.agreement import KernelCalls
from tests.ops.inputs import quantized, random_attention_inputs
from tests.reference import TOLERANCE, relative_error

SHAPES = ((9, 14), (5, 7), (1, 3))
NUM_POINTS = [6, 2, 4]
METHODS = ("default", "discrete", "discrete_by_height")


def operands(device="cpu", dtype=torch.float32, seed=0, **sizes):
    return list(random_attention_inputs(seed, shapes=SHAPES, **sizes).to(device, dtype))


def flat_operands(device="cpu", dtype=torch.float32, num_points=NUM_POINTS):
    """Value, locations (N, Lq, M, sum(num_points), 2) and weights likewise."""
    generator = torch.Generator().manual_seed(3)
    value, *_ = operands(device, dtype)
    samples = (2, 7, 3, sum(num_points))
    locations = quantized(torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2)
    weights = torch.randn(samples, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return value, locations.to(device, wide), weights.to(device, dtype)


def level_by_level(value, locations, weights, num_points, method="default"):
    """What several projects' plain code computes, written once more, in float64."""
    batch, _, heads, channels = value.shape
    output = 0
    levels = zip(
        value.double().split([height * width for height, width in SHAPES], 1),
        SHAPES,
        locations.double().split(list(num_points), 3),
        weights.double().split(list(num_points), 3),
    )
    for rows, (height, width), location, weight in levels:
        image = rows.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        place = location.transpose(1, 2).flatten(0, 1)
        if method == "default":
            sampled = F.grid_sample(image, 2 * place - 1, align_corners=False)
        else:
            x, y = (place * place.new_tensor([width, height]) + 0.5).long().unbind(-1)
            last = height - 1 if method == "discrete_by_height" else width - 1
            x, y = x.clamp(0, last), y.clamp(0, height - 1)
            sampled = image[torch.arange(batch * heads)[:, None, None], :, y, x].permute(0, 3, 1, 2)
        output = output + (sampled * weight.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


class TestLevels:
    @pytest.mark.parametrize("starts", [True, False], ids=["starts", "no-starts"])
    @pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tensor"])
    def test_are_what_tensors_of_them_are(self, backend_device, pairs, starts):
        value, shapes, first, locations, weights = operands(backend_device)
        expected = ops.ms_deform_attn(value, shapes, first, locations, weights)
        given = [torch.Size(SHAPES[0]), *SHAPES[1:]] if pairs else shapes
        assert torch.equal(ops.ms_deform_attn(value, given, first if starts else None, locations, weights), expected)

    def test_first_rows(self):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            starts = ops.level_start_index(torch.tensor([(4, 5), (2, 3), (30, 9)], dtype=dtype))
            assert starts.tolist() == [0, 20, 26] and starts.dtype == torch.int64
        assert ops.level_start_index(torch.zeros(0, 2, dtype=torch.int64)).tolist() == []

    def test_are_made_once(self, kernels):
        value, _, _, locations, weights = operands(kernels)
        ops.ms_deform_attn(value, SHAPES, None, locations, weights)
        made = []

        class Made(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                made.append(function)
                return function(*args, **(kwargs or {}))

        with Made():
            ops.ms_deform_attn(value, [list(pair) for pair in SHAPES], None, locations, weights)
        assert torch.tensor not in made and torch.stack not in made and torch.Tensor.to not in made

    def test_made_for_inference_serve_training(self, kernels):
        value, _, _, locations, weights = operands(kernels, seed=1)
        shapes = [(3, 3), (2, 1), (1, 1)]  # of no other test
        with torch.inference_mode():
            ops.ms_deform_attn(value, shapes, None, locations, weights)
        ops.ms_deform_attn(value.requires_grad_(), shapes, None, locations, weights).sum().backward()
        assert value.grad[:, :12].any() and not value.grad[:, 12:].any()

    def test_of_a_fake_mode_do_not_stay(self):
        arguments = ((4, 4), (2, 2)), (1, 1), torch.device("cpu")
        with FakeTensorMode():
            assert all(isinstance(made, FakeTensor) for made in levels_of_numbers(*arguments))
        assert not any(isinstance(made, FakeTensor) for made in levels_of_numbers(*arguments))

    @pytest.mark.cuda
    def test_are_made_within_a_graph(self, cuda_kernels):
        """Of a capture that no call went before; the next call does not read the graph's memory."""
        value, _, _, locations, weights = operands("cuda")
        shapes = [(8, 8), (4, 4), (2, 2)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        ops.ms_deform_attn(value, SHAPES, None, locations, weights)
        with torch.cuda.graph(graph, stream=stream):
            captured = ops.ms_deform_attn(value, shapes, None, locations, weights)
        expected = ops.ms_deform_attn(value, shapes, None, locations, weights)
        graph.replay()
        assert torch.equal(captured, expected) and expected.any()

    @pytest.mark.cuda
    def test_beyond_the_rows_are_an_error_on_a_gpu_too(self, cuda_kernels):
        value, _, _, locations, weights = operands("cuda")
        with pytest.raises(ValueError, match="hold 10126 pixels, but value has S=164 rows"):
            ops.ms_deform_attn(value, [(100, 100), *SHAPES[:1]], None, locations[:, :, :, :2], weights[:, :, :, :2])


class TestPointsALevel:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("num_points", [NUM_POINTS, [3, 5, 0], [4, 4, 4]], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_agrees(self, backend_device, dtype, num_points, method):
        value, locations, weights = flat_operands(backend_device, dtype, num_points)
        leaves = [t.requires_grad_() for t in (value, locations, weights)]
        output = ops.ms_deform_attn(value, SHAPES, None, locations, weights, num_points=num_points, method=method)
        exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
        expected = level_by_level(*exact, num_points, method)
        toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
        got = torch.autograd.grad(output, leaves, toward.to(backend_device), allow_unused=True)
        wanted = torch.autograd.grad(expected, exact, toward.double(), allow_unused=True)
        assert (got[1] is None) == (wanted[1] is None) == (method != "default")
        # The centre of a pixel rounds as a location does: by that much, times its position, it is beside it.
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        tolerance = max(TOLERANCE[dtype], 0 if method == "default" else 16 * wide)
        for one, other in zip((output, *got), (expected, *wanted)):
            if other is not None:
                assert relative_error(one.cpu(), other) <= tolerance

    def test_are_no_padding(self, kernels):
        """The kernel is given as many samples as there are."""
        value, locations, weights = flat_operands(kernels)
        with KernelCalls() as calls:
            ops.ms_deform_attn(value, SHAPES, None, locations, weights, num_points=NUM_POINTS)
        assert calls.names == ["ms_deform_attn"]
        assert calls.arguments[0][3].shape == (2, 7, 3, 6, 2, 2)

    @pytest.mark.parametrize("shapes", ["pairs", "tensor"])
    def test_shapes_in_a_tensor(self, backend_device, shapes):
        value, locations, weights = flat_operands(backend_device)
        given = torch.tensor(SHAPES, device=backend_device) if shapes == "tensor" else SHAPES
        starts = ops.level_start_index(torch.tensor(SHAPES)).to(backend_device)
        output = ops.ms_deform_attn(value, given, starts, locations, weights, num_points=NUM_POINTS)
        expected = level_by_level(value.cpu(), locations.cpu(), weights.cpu(), NUM_POINTS)
        assert relative_error(output.cpu(), expected) <= TOLERANCE[torch.float32]


class TestDiscrete:
    def test_the_pixels(self, backend_device):
        """The truncated position, with x clamped into the level, or by its height."""
        value = torch.arange(1.0, 16.0, device=backend_device).view(1, 15, 1, 1)  # 3 x 5 pixels
        places = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.3, 0.5], [1.0, 1.0], [-3.0, 0.9], [9.0, -9.0]])
        places = torch.cat([places, torch.tensor([[float("nan"), 0.5]])]).view(1, 7, 1, 1, 1, 2).to(backend_device)
        ones = torch.ones(1, 7, 1, 1, 1, device=backend_device)
        arguments = value, [(3, 5)], None, places, ones
        assert ops.ms_deform_attn(*arguments, method="discrete").flatten().tolist() == pytest.approx(
            [1, 2, 13, 15, 11, 5, 0]
        )
        assert ops.ms_deform_attn(*arguments, method="discrete_by_height").flatten().tolist() == pytest.approx(
            [1, 2, 13, 13, 11, 3, 0]
        )

    def test_steps_share_one_tensor(self):
        """All that the call makes beside metadata of levels and the output are the centres of pixels, once."""
        value, _, _, locations, weights = operands()
        made = set()

        class Storages(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and result.shape == locations.shape:
                    made.add(result.untyped_storage().data_ptr())
                return result

        shapes = torch.tensor(SHAPES)
        with Storages():
            ops.ms_deform_attn(value, shapes, None, locations, weights, method="discrete")
        assert len(made - {locations.untyped_storage().data_ptr()}) == 1


class TestValue:
    def test_as_a_list_of_levels(self, backend_device):
        value, shapes, starts, locations, weights = operands(backend_device)
        expected = ops.ms_deform_attn(value, shapes, starts, locations, weights)
        levels = value.permute(0, 2, 3, 1).contiguous().split([height * width for height, width in SHAPES], -1)
        assert torch.equal(ops.ms_deform_attn(list(levels), SHAPES, None, locations, weights), expected)

    def test_a_list_becomes_contiguous_in_one_copy(self, kernels):
        """What is joined from parts that look like channels last is what the kernel reads."""
        value, _, _, locations, weights = operands(kernels)
        levels = value.permute(0, 2, 3, 1).contiguous().split([height * width for height, width in SHAPES], -1)
        with KernelCalls() as calls:
            ops.ms_deform_attn(list(levels), SHAPES, None, locations, weights)
        assert calls.arguments[0][0].is_contiguous()

    def test_transposed(self, backend_device):
        value, shapes, starts, locations, weights = operands(backend_device)
        expected = ops.ms_deform_attn(value, shapes, starts, locations, weights)
        transposed = value.permute(0, 2, 3, 1).contiguous().requires_grad_()  # (N, M, D, S)
        output = ops.ms_deform_attn(transposed.permute(0, 3, 1, 2), shapes, starts, locations, weights)
        assert torch.equal(output, expected)
        output.sum().backward()
        assert transposed.grad.any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_locations_are_widened(backend_device, half):
    value, shapes, starts, locations, weights = operands(backend_device)
    rounded = locations.to(half).requires_grad_()
    output = ops.ms_deform_attn(value, shapes, starts, rounded, weights)
    assert torch.equal(output, ops.ms_deform_attn(value, shapes, starts, rounded.float(), weights))
    output.sum().backward()
    assert rounded.grad.dtype == half and rounded.grad.any()


class Forms(torch.nn.Module):
    """Every form at once."""

    def __init__(self, method: str = "default"):
        super().__init__()
        self.method = method

    def forward(self, value, locations, weights):
        height = value.shape[1] // 20
        return ops.ms_deform_attn(
            value, [(height, 16), (height, 4)], None, locations, weights, num_points=[4, 2], method=self.method
        )


def of_height(height: int):
    value, locations, weights = flat_operands(num_points=[4, 2])
    return value[:, : height * 20], locations, weights


@pytest.mark.parametrize(
    ("backend_name", "method"), [("cpu", "default"), ("cpu", "discrete"), ("grid_sample", "discrete_by_height")]
)
class TestTraced:
    @pytest.fixture(autouse=True)
    def forced(self, backend_name):
        if backend_name not in ops.available_backends("cpu"):
            pytest.skip("the CPU kernels are not built")
        with ops.use_backend(backend_name):
            yield

    def test_compiled(self, method):
        """In one graph, also where another image makes the sizes of levels symbols."""
        torch.compiler.reset()
        compiled = torch.compile(Forms(method), backend="eager", fullgraph=True)
        for height in (3, 5, 7):
            arguments = of_height(height)
            expected = Forms(method)(*arguments)
            assert relative_error(compiled(*arguments), expected) <= TOLERANCE[torch.float32]

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported(self, method, strict):
        arguments = of_height(4)
        program = torch.export.export(Forms(method), arguments, strict=strict)
        assert relative_error(program.module()(*arguments), Forms(method)(*arguments)) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_onnx(method):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    arguments = of_height(4)
    program = torch.onnx.export(Forms(method).eval(), arguments, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    named = {given.name: t.numpy() for given, t in zip(session.get_inputs(), arguments)}
    (output,) = session.run(None, named)
    assert relative_error(torch.from_numpy(output), Forms(method)(*arguments)) <= 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"spatial_shapes": [(9, 14), 5, (1, 3)]}, TypeError, r"list of pairs \(height, width\) of whole numbers; got"),
        ({"spatial_shapes": [(9, 14), (5, 7.5), (1, 3)]}, TypeError, "of whole numbers"),
        ({"spatial_shapes": [(9, 14), (5, -7), (1, 3)]}, ValueError, "must not be negative"),
        ({"spatial_shapes": [(9, 14), (5, 8), (1, 3)]}, ValueError, "hold 169 pixels, but value has S=164 rows"),
        ({"spatial_shapes": [(9, 14), (5, 7)]}, ValueError, r"sampling_locations must be \(N, Lq, M, L, P, 2\) with"),
        ({"spatial_shapes": "9x14"}, TypeError, "spatial_shapes must be a torch.Tensor; got str"),
        ({"value": []}, ValueError, "value must be a tensor, or a list with one for each level; got an empty list"),
        ({"value": [torch.zeros(2, 3, 8, 4), torch.zeros(2, 3, 4)]}, ValueError, r"value\[1\] must be \(N, M, D, rows"),
        ({"value": [torch.zeros(2, 3, 8, 4), None]}, TypeError, r"value\[1\] must be a torch.Tensor; got NoneType"),
        ({"method": "nearest"}, ValueError, "method must be one of default, discrete, discrete_by_height; got"),
        ({"num_points": [3, 3]}, ValueError, "num_points must be L=3 numbers from 0 on, one for each level; got"),
        ({"num_points": [3, 3, -3]}, ValueError, "num_points must be L=3 numbers"),
        ({"num_points": [3, 3, 3]}, ValueError, r"sampling_locations must be \(N, Lq, M, sum\(num_points\), 2\) with"),
    ],
)
def test_errors(changes, error, message):
    value, _, _, locations, weights = operands()
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "level_start_index": None,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    with pytest.raises(error, match=message):
        ops.ms_deform_attn(**arguments | changes)
