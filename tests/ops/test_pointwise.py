"""What project_points and box_key_points promise alike: their path, gradients of any order, registration, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.ops.backends.backend import Missing
from tests.ops.agreement import KernelCalls
from tests.ops.inputs import with_memory_reversed
from tests.ops.pointwise import POINTWISE, Pointwise, leaves_of, output_and_gradients
from tests.reference import relative_error

HALF_DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=POINTWISE, ids=lambda op: op.name)
def op(request) -> Pointwise:
    return request.param


@pytest.fixture
def kernels(device) -> torch.device:
    """A device that the extension has kernels for."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    return device


def by_formula(op, operands, **settings) -> list[Tensor]:
    with ops.use_backend("grid_sample"):
        return output_and_gradients(op, operands, **settings)


def assert_same_numbers(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= tolerance


class TestPath:
    """One kernel in eager mode, the formula wherever somebody else looks at it."""

    @pytest.mark.parametrize("optional", [True, False])
    def test_eager_calls_one_kernel(self, op, kernels, optional):
        operands = op.on(kernels, torch.float32, optional)
        with KernelCalls() as calls, torch.no_grad():
            op.function(*operands)
        assert calls.names == [op.name]
        with KernelCalls() as calls:
            output_and_gradients(op, operands)
        assert calls.names == [op.name, f"{op.name}_backward"]

    def test_a_gradient_of_another_operand_takes_the_formula(self, op, kernels):
        operands = op.on(kernels, torch.float64)
        for i in {0, 1, 2} - set(op.differentiable):
            leaf = operands[i].clone().requires_grad_()
            with KernelCalls() as calls:
                op.function(*operands[:i], leaf, *operands[i + 1 :]).sum().backward()
            assert calls.names == []
            assert leaf.grad.count_nonzero() > 0
            with KernelCalls() as calls, torch.no_grad():
                op.function(*operands[:i], leaf, *operands[i + 1 :])
            assert calls.names == [op.name]

    def test_grid_sample_takes_the_formula(self, op, kernels):
        with KernelCalls() as calls:
            by_formula(op, op.on(kernels, torch.float32))
        assert calls.names == []

    @pytest.mark.parametrize("optional", [True, False])
    def test_compiled_in_one_graph_of_standard_operators(self, op, device, optional):
        graphs = []

        def keep(graph, _):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, backend=keep, dynamic=True)
        operands = op.on(device, torch.float64, optional)
        expected = output_and_gradients(op, operands)
        assert_same_numbers(output_and_gradients(op, operands, function=compiled), expected, 1e-12)
        (graph,) = graphs
        assert "reimplementation" not in graph.code

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
    def test_traced_to_standard_operators(self, op):
        operands = op.on("cpu", torch.float32)
        traced = torch.jit.trace(op.function, operands)
        assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
        torch.testing.assert_close(traced(*operands), op.function(*operands))

    def test_transformed(self, op, device):
        operands = op.on(device, torch.float64)
        doubled = [torch.stack([operand, operand + 0.1]) for operand in operands]
        actual = torch.func.vmap(op.function)(*doubled)
        expected = torch.stack([op.function(*(operand[i] for operand in doubled)) for i in range(2)])
        torch.testing.assert_close(actual, expected)
        gradient = torch.func.grad(lambda first: op.function(first, *operands[1:]).sum())(operands[0])
        leaf = operands[0].clone().requires_grad_()
        op.function(leaf, *operands[1:]).sum().backward()
        torch.testing.assert_close(gradient, leaf.grad)

    def test_without_extension(self, op, monkeypatch):
        """It warns once, and points to where the op was called."""
        operands = op.on("cpu", torch.float32)
        expected = op.function(*operands)
        missing = Missing("there is no compiler")
        monkeypatch.setattr(ops.backends, "_missing", lambda *_: missing)
        monkeypatch.setattr(ops.backends, "_best", {})
        monkeypatch.setattr(ops.backends, "_warned", set())
        with pytest.warns(RuntimeWarning, match="running on grid_sample.*there is no compiler") as caught:
            actual = op.function(*operands)
        assert [warning.filename for warning in caught] == [__file__]
        torch.testing.assert_close(actual, expected)


class TestNumbers:
    @pytest.mark.parametrize("optional", [True, False])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
    def test_kernel_and_formula_agree(self, op, kernels, dtype, tolerance, optional):
        operands = op.on(kernels, dtype, optional)
        actual = output_and_gradients(op, operands)
        assert all(tensor.dtype == dtype for tensor in actual)
        assert_same_numbers(actual, by_formula(op, operands), tolerance)

    @pytest.mark.parametrize("half", HALF_DTYPES, ids=str)
    def test_half_precision_is_computed_in_float32(self, op, device, half):
        operands = op.on(device, half)
        output, *gradients = output_and_gradients(op, operands)
        expected, *wide = output_and_gradients(op, [operand.float() for operand in operands])
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        assert all(got.dtype == half and torch.equal(got, wanted.to(half)) for got, wanted in zip(gradients, wide))

    def test_the_first_operand_sets_the_dtype(self, op, device):
        single, double = op.on(device, torch.float32), op.on(device, torch.float64)
        for first, others in ((single, double), (double, single)):
            actual = op.function(first[0], *others[1:])
            assert actual.dtype == first[0].dtype
            torch.testing.assert_close(actual, op.function(*first), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("half", HALF_DTYPES, ids=str)
    def test_autocast_changes_nothing(self, op, device, half):
        operands = op.on(device, torch.float32)
        expected = output_and_gradients(op, operands)
        with torch.autocast(device.type, half):
            actual = output_and_gradients(op, operands)
        assert_same_numbers(actual, expected, 0)

    def test_any_strides(self, op, kernels):
        operands = op.on(kernels, torch.float64)
        expected = output_and_gradients(op, operands)
        strided = [with_memory_reversed(operand) for operand in operands]
        shifted = [torch.cat([operand.new_zeros(1), operand.flatten()])[1:].view_as(operand) for operand in operands]
        lazy = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in operands]
        toward = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        for others in (strided, shifted, lazy):
            actual = output_and_gradients(op, others, toward=with_memory_reversed(toward))
            assert_same_numbers(actual, expected, 0)

    def test_expanded_output_gradient(self, op, kernels):
        operands = op.on(kernels, torch.float64)
        one = torch.ones((), dtype=torch.float64, device=kernels)
        toward = one.expand(op.function(*operands).shape)
        expected = output_and_gradients(op, operands, toward=toward.contiguous())
        assert_same_numbers(output_and_gradients(op, operands, toward=toward), expected, 0)

    def test_the_same_bits_every_time_and_for_any_number_of_threads(self, op, kernels):
        first, second, last = op.on(kernels, torch.float32)
        many = first.repeat(1, 200, *[1] * (first.dim() - 2))
        operands = [many, second, last if op.name == "project_points" else last.repeat(1, 200, 1)]
        first = output_and_gradients(op, operands)
        threads = torch.get_num_threads()
        try:
            for number in (1, 3, threads):
                torch.set_num_threads(number)
                assert_same_numbers(output_and_gradients(op, operands), first, 0)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
    def test_special_values(self, op, kernels, value):
        """In every place of every operand in turn: what comes out is what comes out of the formula."""
        for place, operand in enumerate(op.operands()):
            for index in range(operand.numel()):
                operands = op.on(kernels, torch.float64)
                operands[place].view(-1)[index] = value
                for got, wanted in zip(output_and_gradients(op, operands), by_formula(op, operands), strict=True):
                    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-10, atol=1e-10)


class TestGradients:
    @pytest.mark.parametrize("optional", [True, False])
    def test_gradcheck_to_second_order(self, op, kernels, optional):
        operands = op.on(kernels, torch.float64, optional)
        leaves = leaves_of(op, operands)

        def function(*leaves):
            replaced = dict(zip([i for i in op.differentiable if operands[i] is not None], leaves))
            return op.function(*(replaced.get(i, operand) for i, operand in enumerate(operands)))

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)

    def test_second_derivatives_of_operands_that_depend_on_each_other(self, op, kernels):
        """A logit computed from its anchor: the anchor's gradient through it is counted once."""
        operands = op.on(kernels, torch.float64)
        source = operands[0].clone().requires_grad_()

        def second_order():
            last = operands[2]
            if 2 in op.differentiable:
                last = source[..., :1].sin() * last
            output = op.function(source.cos(), operands[1], last)
            (first,) = torch.autograd.grad(output.square().sum(), source, create_graph=True)
            return first.detach(), *torch.autograd.grad(first.square().sum(), source)

        actual = second_order()
        with ops.use_backend("grid_sample"):
            assert_same_numbers(actual, second_order(), 1e-10)

    def test_only_the_gradients_that_are_needed(self, op, kernels):
        operands = op.on(kernels, torch.float64)
        _, *expected = output_and_gradients(op, operands)
        for i, wanted in zip(op.differentiable, expected):
            leaf = operands[i].clone().requires_grad_()
            output = op.function(*operands[:i], leaf, *operands[i + 1 :])
            toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
            (gradient,) = torch.autograd.grad(output, leaf, toward.to(output))
            assert torch.equal(gradient, wanted)

    def test_several_output_gradients_at_once(self, op, kernels):
        operands = op.on(kernels, torch.float64)
        leaves = leaves_of(op, operands)
        output = op.function(*operands)
        several = torch.stack([torch.ones_like(output), output.detach()])
        batched = torch.autograd.grad(output, leaves, several, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in several]
        assert_same_numbers(batched, [torch.stack(gradients) for gradients in zip(*one_by_one)], 1e-13)


class TestOperator:
    """What torch.library promises of a registered operator."""

    @pytest.mark.parametrize("optional", [True, False])
    @pytest.mark.parametrize("needs", [False, True])
    def test_forward(self, op, kernels, needs, optional):
        operands = op.on(kernels, torch.float32, optional)
        if needs:
            leaves_of(op, operands)
        torch.library.opcheck(op.forward, tuple(operands))

    @pytest.mark.parametrize("optional", [True, False])
    def test_backward(self, op, kernels, optional):
        operands = op.on(kernels, torch.float32, optional)
        operands[0] = with_memory_reversed(operands[0])
        torch.library.opcheck(op.backward, (torch.randn_like(op.forward(*operands)), *operands))

    def test_gradients_of_all_operands_and_of_gradients(self, op, kernels):
        """Those that the kernel has not are the formula's."""
        operands = op.on(kernels, torch.float64)
        if op.name == "project_points":
            operands[0] = operands[0][:, :, :2]  # ahead of the cameras: behind them slopes are too steep to measure
        operands = [operand.detach().requires_grad_() for operand in operands]
        assert torch.autograd.gradcheck(op.forward, operands)
        assert torch.autograd.gradgradcheck(op.forward, operands)

    def test_on_meta(self, op, kernels):
        operands = op.on("meta", torch.float32)
        assert op.function(*operands).shape == op.function(*op.on(kernels, torch.float32)).shape

    @pytest.mark.parametrize("on_meta", [False, True])
    def test_direct_calls_are_checked(self, op, kernels, on_meta):
        """Wrong shapes, dtypes and devices are errors; no kernel reads beyond what there is."""
        operands = op.on("meta" if on_meta else kernels, torch.float32)
        toward = torch.ones_like(op.forward(*operands))
        elsewhere = kernels if on_meta else "meta"
        for place, operand in enumerate(operands):
            for spoiled in (
                operand[:1, ..., :2],
                operand[..., :1],
                operand[0],
                operand[None],
                operand.half(),
                operand.double(),
                operand.long(),
                torch.zeros_like(operand, device=elsewhere),
            ):
                others = [spoiled if i == place else other for i, other in enumerate(operands)]
                for call in (lambda: op.forward(*others), lambda: op.backward(toward, *others)):  # noqa: B023
                    with pytest.raises((RuntimeError, ValueError, TypeError), match=" must "):
                        call()
        for spoiled in (toward[0], toward[..., :1], toward[:, :1], toward.double(), toward.half()):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="grad_output must"):
                op.backward(spoiled, *operands)

    def test_out_of_memory(self, op, kernels):
        """Anchors that take no memory themselves, as all of them are one, and more of them than there can be."""
        first, second, last = op.on(kernels, torch.float32)
        many = 2**36 if kernels.type == "cuda" else 2**45
        first = first[:, :1].expand(-1, many, *[-1] * (first.dim() - 2))
        last = last[:, :1].expand(-1, many, -1) if op.name == "box_key_points" else last
        error = torch.OutOfMemoryError if kernels.type == "cuda" else RuntimeError
        with pytest.raises(error, match=f"^{kernels.type.upper()} out of memory. Tried to allocate .* GiB"):
            op.function(first, second, last)


@pytest.mark.cuda
def test_another_stream(op, cuda_kernels):
    operands = op.on("cuda", torch.float64)
    expected = output_and_gradients(op, operands)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = output_and_gradients(op, operands)
    stream.synchronize()
    assert_same_numbers(actual, expected, 0)


@pytest.mark.cuda
@pytest.mark.two_gpus
def test_tensors_on_another_gpu_than_the_current_one(op, cuda_kernels):
    with torch.cuda.device(0):
        actual = output_and_gradients(op, op.on("cuda:1", torch.float64))
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    expected = output_and_gradients(op, op.on("cpu", torch.float64))
    assert_same_numbers([tensor.cpu() for tensor in actual], expected, 1e-12)


@pytest.mark.cuda
def test_captured_in_a_cuda_graph(op, cuda_kernels):
    operands = op.on("cuda", torch.float32)
    with torch.no_grad():
        expected = op.function(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = op.function(*operands)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 65537])
def test_many_samples_and_cameras(op, cuda_kernels, batch):
    """More samples than a grid has rows, more cameras or points than a block has threads in a row."""
    generator = torch.Generator().manual_seed(2)
    if op.name == "project_points":
        cams = 70 if batch == 1 else 2
        operands = [
            torch.rand(batch, 2, 3, 3, generator=generator) + 1,
            torch.rand(batch, cams, 4, 4, generator=generator),
            torch.rand(batch, cams, 2, generator=generator) + 1,
        ]
    else:
        learned = 70 if batch == 1 else 1
        operands = [
            torch.randn(batch, 3, 10, generator=generator),
            torch.randn(2, 3, generator=generator),
            torch.randn(batch, 3, learned * 3, generator=generator),
        ]
    actual = output_and_gradients(op, [operand.cuda() for operand in operands])
    expected = by_formula(op, [operand.double() for operand in operands])
    assert_same_numbers([tensor.cpu() for tensor in actual], expected, 2e-6)
