"""What every op of the table promises alike: numbers, gradients, dtypes, layouts, registration, errors, streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from reimplementation import ops
from tests.ops.agreement import KernelCalls, assert_agrees, assert_close, assert_same, leaves_of, of_leaves, run
from tests.ops.inputs import with_memory_reversed
from tests.ops.table import FLOATING, FORMS, HALF, OPS, SAMPLING_OPS, Op, Operand, without_optional
from tests.reference import TOLERANCE, relative_error

GEOMETRIES = [pytest.param(op, make, id=f"{op}-{name}") for op in OPS for name, make in op.geometries.items()]
EMPTY = [pytest.param(op, sizes, id=f"{op}-{name}") for op in OPS for name, sizes in op.empty.items()]
NO_NUMBERS = (torch.bool, torch.complex64)

pointwise = pytest.mark.parametrize("op", [op for op in OPS if op.is_pointwise], ids=str)
sampling = pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)


class TestNumbers:
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    @pytest.mark.parametrize(("op", "geometry"), GEOMETRIES)
    def test_agrees_with_float64(self, op, geometry, backend_device, dtype):
        assert_agrees(op, geometry(), backend_device, dtype)

    @pytest.mark.parametrize("first", FLOATING, ids=str)
    def test_the_first_operand_sets_the_dtype(self, op, backend_device, first):
        """Whatever the others have of the dtypes that they may have beside it."""
        operands = op.on(backend_device, first, 3)
        for place, about in list(enumerate(op.operands))[1:]:
            for dtype in set(about.dtypes(first)) & set(FLOATING):
                mixed = [t.to(dtype) if i == place else t for i, t in enumerate(operands)]
                output = op.function(*mixed)
                assert output.dtype == op.output_dtype(first)
                expected = op.formula(*(t.cpu() for t in mixed))
                assert relative_error(output.cpu(), expected) <= TOLERANCE[output.dtype], f"{about.name}: {dtype}"

    @pointwise
    @pytest.mark.parametrize("half", HALF, ids=str)
    def test_half_precision_is_computed_in_float32(self, op, device, half):
        operands = op.on(device, half)
        output, *gradients = run(op, operands)
        expected, *single = run(op, [operand.float() for operand in operands])
        assert torch.equal(output, expected)
        assert all(got.dtype == half and torch.equal(got, wanted.to(half)) for got, wanted in zip(gradients, single))

    @pytest.mark.parametrize(("op", "sizes"), EMPTY)
    def test_nothing_to_do(self, op, sizes, backend_device):
        """The output is empty, or zero where it is a sum of nothing; there are gradients, and they are like it."""
        operands = op.on(backend_device, seed=9, **sizes)
        leaves = [operands[i] for i in op.differentiable if operands[i] is not None]
        output, *gradients = run(op, operands)
        assert output.shape == op.formula(*(t if t is None else t.cpu() for t in operands)).shape
        assert output.numel() == 0 or not op.is_pointwise
        assert not output.any()
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()

    @pointwise
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
    def test_special_values(self, op, kernels, value):
        """In every place of every operand in turn: what comes out is what comes out of the formula, but that
        infinities which meet in a sum depend on its order."""
        for place, operand in enumerate(op.small()):
            for index in range(operand.numel()):
                operands = op.moved(op.small(), kernels, torch.float64)
                operands[place].view(-1)[index] = value
                with ops.use_backend("grid_sample"):
                    expected = run(op, operands)
                for got, wanted in zip(run(op, operands), expected, strict=True):
                    if op.has_products:
                        got, wanted = got.where(got.isfinite(), torch.nan), wanted.where(wanted.isfinite(), torch.nan)
                    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-10, atol=1e-10)


class TestGradients:
    @pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
    def test_gradcheck(self, op, backend, backend_device, optional):
        """Of the second order too where there is one; the kernels of other ops refuse it, and say so."""
        operands = op.moved(op.small(), backend_device, torch.float64)
        operands = operands if optional else without_optional(op, operands)
        leaves = leaves_of(op, operands)
        function = of_leaves(op, operands)
        assert torch.autograd.gradcheck(function, leaves, nondet_tol=0 if op.is_pointwise else 1e-12)
        if op.is_pointwise:
            assert torch.autograd.gradgradcheck(function, leaves)
        elif backend == "grid_sample":
            assert_second_derivatives_or_refusal(function, leaves)
        else:
            (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaves[1], create_graph=True)
            whose = "" if op.runs_formula(backend) else f"{op} "
            with pytest.raises(RuntimeError, match=f"{whose}has no second derivative"):
                gradient.sum().backward()

    @pointwise
    def test_second_derivatives_of_operands_that_depend_on_each_other(self, op, kernels):
        """A logit computed from its anchor: the anchor's gradient through it is counted once."""
        operands = op.on(kernels)
        source = operands[0].clone().requires_grad_()

        def second_order():
            *others, last = operands[1:]
            if len(others) + 1 in op.differentiable and last.dim() == source.dim():
                last = source[..., :1].sin() * last
            output = op.function(source.cos(), *others, last)
            (first,) = torch.autograd.grad(output.square().sum(), source, create_graph=True)
            return first.detach(), *torch.autograd.grad(first.square().sum(), source)

        actual = second_order()
        with ops.use_backend("grid_sample"):
            assert_close(op, actual, second_order(), 1e-10)

    @pointwise
    def test_gradients_of_all_operands_and_of_gradients(self, op, kernels):
        """Those that the operator's kernel has not are the formula's."""
        operands = [t.requires_grad_() for t in op.moved(op.small(), kernels, torch.float64)]
        assert torch.autograd.gradcheck(op.forward, operands)
        assert torch.autograd.gradgradcheck(op.forward, operands)

    def test_only_the_gradients_that_are_needed(self, op, backend, backend_device):
        """Frozen operands get none, and a kernel is not asked for one."""
        operands = op.on(backend_device, seed=5)
        _, *expected = run(op, operands)
        for needs in filter(any, product([False, True], repeat=len(op.differentiable))):
            leaves = list(operands)
            for i, needed in zip(op.differentiable, needs):
                leaves[i] = operands[i].detach().requires_grad_(needed)
            output = op.function(*leaves)
            toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
            with KernelCalls() as calls:
                output.backward(toward.to(output))
            for i, needed, wanted in zip(op.differentiable, needs, expected):
                assert (leaves[i].grad is not None) == needed
                assert not needed or relative_error(leaves[i].grad, wanted) <= TOLERANCE[torch.float64]
            if not op.runs_formula(backend) and not op.is_pointwise:
                assert calls.needs_of(op) == [needs]

    @sampling
    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_that_are_not_asked_for_take_no_memory(self, op, kernels, needs):
        operands = op.on(kernels, torch.float32)
        results = op.backward_call(torch.ones_like(op.forward_call(operands)), operands, needs)
        wanted = [operands[i].numel() if needed else 0 for i, needed in zip(op.differentiable, needs)]
        assert [gradient.numel() for gradient in results] == wanted

    def test_several_output_gradients_at_once(self, op, kernels):
        operands = op.on(kernels)
        leaves = leaves_of(op, operands)
        output = op.function(*operands)
        several = torch.stack([torch.ones_like(output), output.detach()])
        batched = torch.autograd.grad(output, leaves, several, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in several]
        assert_close(op, batched, [torch.stack(grads) for grads in zip(*one_by_one)], TOLERANCE[torch.float64])


def assert_second_derivatives_or_refusal(function, leaves):
    """Plain PyTorch has second derivatives, or says that it does not, as some releases do."""
    try:
        assert torch.autograd.gradgradcheck(function, leaves)
    except RuntimeError as error:
        assert "not implemented" in str(error)


def shifted(operand: Tensor) -> Tensor:
    """One element behind where an allocation begins, which suits no vector load."""
    return torch.cat([operand.new_zeros(1), operand.flatten()])[1:].view_as(operand)


def negated(operand: Tensor) -> Tensor:
    """The imaginary part of a conjugate is a view whose sign is turned when it is read."""
    if not operand.is_floating_point():
        return operand
    lazy = torch.complex(torch.zeros_like(operand), -operand).conj().imag
    assert lazy.is_neg()
    return lazy


class TestLayouts:
    """Operands are read where they lie, gradients of outputs too."""

    @pytest.mark.parametrize("layout", [with_memory_reversed, shifted, negated])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_any_strides_and_address(self, op, backend, backend_device, layout, dtype):
        operands = op.on(backend_device, dtype, 6)
        expected = run(op, operands)
        toward = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        actual = run(op, [layout(operand) for operand in operands], layout(toward.to(expected[0])))
        if op.runs_formula(backend):  # PyTorch may add in another order
            assert_close(op, actual, expected, TOLERANCE[dtype])
        else:
            assert_same(op, actual, expected)

    def test_every_dimension_expanded(self, op, backend_device):
        """One row of memory that stands for many is read, and its gradient is that of the many."""
        operands = op.on(backend_device, seed=7)
        floating = [(i, t) for i, t in enumerate(operands) if t.is_floating_point()]
        for place, dim in ((i, dim) for i, t in floating for dim in range(t.dim())):
            expanded = list(operands)
            expanded[place] = operands[place].narrow(dim, 0, 1).expand(operands[place].shape)
            repeated = [t.contiguous() for t in expanded]
            assert_same(op, run(op, expanded), run(op, repeated))

    def test_expanded_output_gradient(self, op, backend_device):
        operands = op.on(backend_device)
        toward = torch.ones((), dtype=torch.float64, device=backend_device).expand(op.function(*operands).shape)
        assert_same(op, run(op, operands, toward), run(op, operands, toward.contiguous()))

    @sampling
    @pytest.mark.parametrize("narrow", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
    def test_narrow_metadata(self, op, backend_device, narrow):
        operands = op.on(backend_device, seed=6)
        narrowed = [t.to(narrow) if torch.equal(t.to(narrow).to(t.dtype), t) else t for t in operands[1:3]]
        assert narrowed[0].dtype == narrow
        narrowed = [operands[0], *narrowed, *operands[3:]]
        assert_same(op, run(op, narrowed), run(op, operands))


class TestPath:
    """Which operators a call takes."""

    @pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
    def test_one_kernel_forward_and_one_backward(self, op, kernels, optional):
        operands = op.on(kernels, torch.float32)
        operands = operands if optional else without_optional(op, operands)
        with KernelCalls() as calls, torch.no_grad():
            op.function(*operands)
        assert calls.names == [op.name]
        with KernelCalls() as calls:
            run(op, operands)
        assert calls.names == [op.name, f"{op.name}_backward"]

    def test_grid_sample_takes_none(self, op, kernels):
        with KernelCalls() as calls, ops.use_backend("grid_sample"):
            run(op, op.on(kernels, torch.float32))
        assert calls.names == []

    @pointwise
    def test_a_gradient_that_the_kernel_has_not_takes_the_formula(self, op, kernels):
        for i in set(range(len(op.operands))) - set(op.differentiable):
            operands = op.on(kernels)
            operands[i].requires_grad_()
            with KernelCalls() as calls:
                op.function(*operands).sum().backward()
            assert calls.names == []
            assert operands[i].grad.count_nonzero() > 0
            with KernelCalls() as calls, torch.no_grad():
                op.function(*operands)
            assert calls.names == [op.name]


class TestOperator:
    """What torch.library promises of a registered operator, and that whoever calls it directly is checked."""

    @pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
    @pytest.mark.parametrize("needs", [False, True])
    def test_forward(self, op, kernels, needs, optional):
        operands = op.on(kernels, torch.float32, 15, num_queries=3)
        operands = operands if optional else without_optional(op, operands)
        if needs:
            leaves_of(op, operands)
        torch.library.opcheck(op.forward, op.forward_arguments(operands))

    @pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
    @pytest.mark.parametrize("all_needed", [True, False])
    def test_backward(self, op, kernels, all_needed, optional):
        operands = op.on(kernels, torch.float32, 15, num_queries=3)
        operands[-1] = with_memory_reversed(operands[-1])  # whose gradient, where it has one, has its strides
        operands = operands if optional else without_optional(op, operands)
        needs = [all_needed or number == 1 for number in range(len(op.differentiable))]
        toward = torch.randn_like(op.forward_call(operands)).detach()
        torch.library.opcheck(op.backward, op.backward_arguments(toward, operands, needs))

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_on_meta(self, op, kernels, dtype):
        """Shapes and dtypes without numbers."""
        operands = op.on("meta", dtype)
        for output in (op.function(*operands), *([op.forward_call(operands)] if dtype in op.kernel_dtypes else [])):
            assert output.is_meta
            assert output.dtype == op.output_dtype(dtype)
            assert output.shape == op.function(*op.on(kernels)).shape

    @pytest.mark.parametrize("on_meta", [False, True])
    def test_direct_calls_are_checked(self, op, kernels, on_meta):
        """Wrong shapes, dtypes and devices are errors; no kernel reads beyond what there is."""
        operands = op.on("meta" if on_meta else kernels, torch.float32)
        toward = torch.ones_like(op.forward_call(operands))
        elsewhere, kept = kernels if on_meta else "meta", op.kept(operands)
        for place, (about, operand) in enumerate(zip(op.operands, operands)):
            taken = (torch.float32,) if op.is_pointwise or about.in_float32 else about.dtypes(torch.float32)
            wrong_dtypes = [dtype for dtype in (*FLOATING, *NO_NUMBERS, torch.int64) if dtype not in taken]
            for spoiled in (
                *wrong_ranks(operand),
                *wrong_sizes(about, operand),
                *(torch.zeros_like(operand, dtype=dtype) for dtype in wrong_dtypes),
                *([] if on_meta and about.any_device else [torch.zeros_like(operand, device=elsewhere)]),
            ):
                others = [spoiled if i == place else other for i, other in enumerate(operands)]
                calls = [partial(op.forward_call, others), partial(op.backward_call, toward, others, kept=kept)]
                # Of a meta tensor, the gradients of a sampling op say a shape alone.
                for call in calls if op.is_pointwise or not (on_meta or spoiled.is_meta) else calls[:1]:
                    with pytest.raises((RuntimeError, ValueError, TypeError), match=" must "):
                        call()
        if on_meta and not op.is_pointwise:
            return
        for spoiled in (toward[0], toward[..., :1], toward[:, :1], toward.double(), toward.half()):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="grad_output must"):
                op.backward_call(spoiled, operands, kept=kept)

    @sampling
    def test_direct_calls_read_metadata_on_the_cpu(self, op, kernels):
        operands = op.on(kernels, torch.float32)
        operands[1:3] = operands[1].cpu(), operands[2].cpu() + 1
        with pytest.raises(RuntimeError, match=op.operands[2].name):
            op.forward_call(operands)


def wrong_ranks(operand: Tensor) -> Iterator[Tensor]:
    yield from (operand[0], operand[None])


def wrong_sizes(about: Operand, operand: Tensor) -> Iterator[Tensor]:
    """Each dimension whose size is fixed elsewhere, with too little and too much of it."""
    for dim in about.tied:
        for size in {0, 1, operand.shape[dim] + 1} - {operand.shape[dim]}:
            yield operand.new_zeros([*operand.shape[:dim], size, *operand.shape[dim + 1 :]])


class TestErrors:
    """The Python functions say which argument is wrong, whichever backend would have run."""

    @pytest.fixture(params=[None, "grid_sample"], autouse=True)
    def backend(self, request):
        with ops.use_backend(request.param) if request.param else nullcontext():
            yield

    @staticmethod
    def assert_refused(op: Op, place: int, spoiled, error: type[Exception], message: str) -> None:
        operands = op.on("cpu", torch.float32, 12)
        operands[place] = spoiled
        for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with context, pytest.raises(error, match=message):
                op.function(*operands)

    @pytest.mark.parametrize(
        "spoil", [lambda t: t.tolist(), lambda t: None, lambda t: 1.5], ids=["list", "None", "float"]
    )
    def test_what_is_no_tensor(self, op, spoil):
        for place, (about, operand) in enumerate(zip(op.operands, op.on("cpu", torch.float32))):
            spoiled = spoil(operand)
            if (spoiled is not None or not about.optional) and type(spoiled) not in about.also:
                message = f"^{about.name} must be a torch.Tensor; got {type(spoiled).__name__}"
                self.assert_refused(op, place, spoiled, TypeError, message)

    def test_other_layouts(self, op):
        for place, (about, operand) in enumerate(zip(op.operands, op.on("cpu", torch.float32))):
            message = rf"^{about.name} must be a dense \(strided\) tensor"
            self.assert_refused(op, place, operand.to_sparse(), TypeError, message)

    def test_other_dtypes(self, op):
        """Autocast casts what is floating, and nothing else."""
        for place, (about, operand) in enumerate(zip(op.operands, op.on("cpu", torch.float32))):
            for dtype in {*NO_NUMBERS, torch.int64} - {*about.dtypes(torch.float32), *about.also}:
                message = f"^{about.name} must be .*; got {str(dtype).removeprefix('torch.')}"
                self.assert_refused(op, place, torch.zeros_like(operand, dtype=dtype), TypeError, message)

    def test_other_floating_dtypes(self, op):
        operands = op.on("cpu", torch.float32)
        for place, about in enumerate(op.operands):
            for dtype in set(FLOATING) - {*about.dtypes(torch.float32), *about.also}:
                mixed = [torch.zeros_like(t, dtype=dtype) if i == place else t for i, t in enumerate(operands)]
                message = f"^{about.name} must be .*; got {str(dtype).removeprefix('torch.')}"
                with pytest.raises(TypeError, match=message):
                    op.function(*mixed)

    def test_other_devices(self, op):
        operands = op.on("cpu", torch.float32)
        for place, about in list(enumerate(op.operands))[1:]:
            self.assert_refused(
                op, place, operands[place].to("meta"), ValueError, f"^{about.name} must be on cpu.*; got meta"
            )
        self.assert_refused(op, 0, operands[0].to("meta"), ValueError, "must be on meta")

    def test_other_ranks(self, op):
        for place, (about, operand) in enumerate(zip(op.operands, op.on("cpu", torch.float32))):
            for spoiled in wrong_ranks(operand):
                self.assert_refused(op, place, spoiled, ValueError, rf"^{about.name} must be \(.*\).*; got \(")

    def test_other_sizes(self, op):
        """Whichever of the arguments that disagree is named."""
        for place, (about, operand) in enumerate(zip(op.operands, op.on("cpu", torch.float32))):
            for spoiled in wrong_sizes(about, operand):
                self.assert_refused(op, place, spoiled, ValueError, f"^({'|'.join(op.names)})")


class TestOutOfMemory:
    """Queries that take no memory themselves, as all of them are one, and more output than there can be."""

    @staticmethod
    def far_too_many(op: Op, device: torch.device) -> list[Tensor]:
        queries = 2**34 if device.type == "cuda" else 2**45
        pairs = zip(op.on(device, torch.float32, 3, num_queries=1), op.on(device, torch.float32, 3, num_queries=2))
        return [one if one.shape == two.shape else one.expand(-1, queries, *one.shape[2:]) for one, two in pairs]

    @pytest.mark.parametrize("records", [False, True])
    def test_error(self, op, kernels, records):
        few = op.on(kernels, torch.float32, 3)
        before = op.function(*few)
        operands = self.far_too_many(op, kernels)
        operands[0].requires_grad_(records)
        error = torch.OutOfMemoryError if kernels.type == "cuda" else RuntimeError
        with pytest.raises(
            error, match=f"^{kernels.type.upper()} out of memory( on cuda:0)?. Tried to allocate .* GiB"
        ):
            op.function(*operands)
        assert torch.equal(op.function(*few), before)

    def test_error_of_the_operators(self, op, kernels):
        operands = self.far_too_many(op, kernels)
        few = op.on(kernels, torch.float32, num_queries=1)
        one = op.function(*few)[:1, :1]
        queries = max(t.shape[1] for t in operands if t.dim() > 1)
        grad_output = one[..., :1].expand(operands[0].shape[0], queries, *one.shape[2:])
        kept = [t[:, :1].expand(-1, queries, *t.shape[2:]) for t in op.kept(few)]
        for call in (partial(op.forward_call, operands), partial(op.backward_call, grad_output, operands, kept=kept)):
            with pytest.raises(RuntimeError, match="out of memory( on cuda:0)?. Tried to allocate"):
                call()


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernels")
class TestGpu:
    def test_another_stream_and_metadata_on_the_cpu(self, op):
        operands = op.on("cuda", seed=16)
        expected = run(op, operands)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = run(op, [t.cpu() if about.any_device else t for about, t in zip(op.operands, operands)])
        stream.synchronize()
        assert torch.equal(actual[0], expected[0])
        assert_same(op, actual, expected)

    @pytest.mark.two_gpus
    def test_tensors_on_another_gpu_than_the_current_one(self, op):
        operands = op.random(18)
        with torch.cuda.device(0):
            actual = run(op, op.moved(operands, "cuda:1", torch.float64))
        assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
        assert_close(op, actual, run(op, operands, function=op.formula), TOLERANCE[torch.float64])

    @pointwise
    def test_a_larger_batch_than_a_grid_has_rows(self, op):
        draw = op.geometries.get("ahead", op.random)  # near a camera's plane a projection amplifies its rounding
        assert_agrees(op, draw(2, batch_size=65537, num_queries=3), "cuda", torch.float32)
