"""Attention from offsets and logits: what it promises beyond the rows of the table."""

from __future__ import annotations

import gc
from itertools import product

import pytest
import torch
from torch import Tensor

from reimplementation import ops
from tests import reference
from tests.ops import inputs
from tests.ops.agreement import KernelCalls, assert_agrees, assert_close, leaves_of, run
from tests.ops.table import ATTENTION_FROM_OFFSETS as OP
from tests.ops.table import FLOATING, HALF
from tests.reference import TOLERANCE, relative_error

FORMS = {
    "points": {"boxes": False},
    "boxes": {},
    "shared points": {"boxes": False, "shared": True},
    "shared boxes": {"shared": True},
}
forms = pytest.mark.parametrize("form", FORMS)
two_forms = pytest.mark.parametrize("form", ["points", "shared boxes"])
LOGITS = OP.names.index("attention_logits")


def drawn(form: str, device, dtype=torch.float64, seed: int = 0, **sizes) -> list[Tensor | None]:
    return OP.on(device, dtype, seed, **FORMS[form], **sizes)


def assert_same_or_both_nan(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


def workspace(function, operands: list[Tensor], differentiable: tuple[int, ...]) -> int:
    """Bytes of a GPU that a backward holds beside the gradients."""
    operands = [t.detach().requires_grad_(i in differentiable) for i, t in enumerate(operands)]
    output = function(*operands)
    toward = torch.ones_like(output)
    gc.collect()  # else another test's tensors may go meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(output, [operands[i] for i in differentiable], toward)
    return torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in gradients)


@two_forms
@pytest.mark.parametrize("channels", [1, 5, 8, 33, 130])
def test_any_channels(backend_device, channels, form):
    operands = inputs.random_offset_inputs(1, num_queries=5, channels=channels, **FORMS[form])
    for dtype in (torch.float64, torch.float16):
        assert_agrees(OP, operands, backend_device, dtype)


@two_forms
@pytest.mark.parametrize(("num_points", "levels"), [(1, 4), (5, 3), (17, 1), (8, 4), (33, 5)])
def test_any_points_and_levels(backend_device, num_points, levels, form):
    """Also more samples of a query and head than are staged at once, and numbers of them that divide no warp."""
    shapes = [(2 + level % 3, 3 + level) for level in range(levels)]
    base = inputs.random_attention_inputs(2, num_queries=6, channels=32, num_points=num_points, shapes=shapes)
    operands = inputs.from_offsets(base, scale=(0.5,) * levels, **{"boxes": True, **FORMS[form]})
    for dtype in (torch.float64, torch.float32):
        assert_agrees(OP, operands, backend_device, dtype)


def test_one_logit_does_nothing(backend_device):
    operands = drawn("points", backend_device, num_points=1, shapes=((4, 5),))
    output, *gradients = run(OP, operands)
    operands[LOGITS] = operands[LOGITS] + 3
    assert torch.equal(OP.function(*operands), output)
    assert not gradients[-1].any()


@two_forms
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_equals_attention_of_locations_and_weights(backend_device, dtype, form):
    value, shapes, starts, references, offsets, logits, scale = drawn(form, backend_device, dtype, 3)
    exact = [t.cpu() for t in (shapes, references, offsets, scale)]
    locations = reference.locations_from_offsets(*exact).to(references)
    weights = logits.to(references.dtype).flatten(3).softmax(-1).view(logits.shape)
    expected = ops.ms_deform_attn(value, shapes, starts, locations, weights)
    got = ops.ms_deform_attn_from_offsets(value, shapes, starts, references, offsets, logits, scale)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= TOLERANCE[dtype]


def test_the_scale_of_boxes_is_one_over_the_points_where_none_is_given(backend_device):
    *operands, _ = drawn("boxes", backend_device, num_points=3)
    third = torch.full((3,), 1 / 3, dtype=torch.float64, device=backend_device)
    assert_close(OP, run(OP, [*operands, None]), run(OP, [*operands, third]), 1e-12)


def test_points_have_no_scale(backend_device):
    *operands, scale = drawn("points", backend_device)
    assert torch.equal(OP.function(*operands, scale), OP.function(*operands))


def test_a_level_that_comes_twice_has_twice_the_points(backend_device):
    """As in D-FINE, where each level has its own number of points, here 2, 4 and 2, and a scale by that."""
    value, shapes, starts, references, offsets, logits, _ = drawn("shared boxes", backend_device, num_points=2)
    generator = torch.Generator().manual_seed(5)

    def with_more(tensor: Tensor) -> Tensor:
        more = torch.randn(tensor[:, :, :, :1].shape, generator=generator, dtype=torch.float64).to(tensor)
        return torch.cat([tensor[:, :, :, :2], more, tensor[:, :, :, 2:]], dim=3)

    offsets, logits = with_more(offsets), with_more(logits)
    twice = torch.tensor([0, 1, 1, 2], device=backend_device)
    scale = torch.tensor([1 / 2, 1 / 4, 1 / 4, 1 / 2], dtype=torch.float64, device=backend_device)
    got = OP.function(value, shapes[twice], starts[twice], references, offsets, logits, scale)

    centre, size = references[:, :, :, None, None].split(2, dim=-1)
    locations = centre + offsets * scale[:, None, None] * size / 2
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    expected = sum(
        ops.ms_deform_attn(value, shapes[level:][:1], starts[level:][:1], locations[:, :, :, i:][:, :, :, :1], weight)
        for i, level in enumerate([0, 1, 1, 2])
        for weight in [weights[:, :, :, i : i + 1]]
    )
    assert relative_error(got, expected) <= 1e-12


@two_forms
@pytest.mark.parametrize("half", HALF, ids=str)
def test_offsets_and_logits_beside_a_half_value(backend_device, half, form):
    """Each of them in the value's dtype or in float32; gradients have their operands' dtypes."""
    operands = drawn(form, backend_device, torch.float32, 5)
    for of_offsets, of_logits in product((half, torch.float32), repeat=2):
        value, shapes, starts, references, offsets, logits, scale = operands
        mixed = [value.to(half), shapes, starts, references, offsets.to(of_offsets), logits.to(of_logits), scale]
        output, *gradients = run(OP, mixed)
        assert output.dtype == half
        assert [g.dtype for g in gradients] == [half, torch.float32, of_offsets, of_logits]
        exact = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in mixed]
        assert relative_error(output.cpu(), OP.formula(*exact)) <= TOLERANCE[half]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_what_one_linear_layer_made(kernels, dtype):
    """They are read where they lie, and the gradient of the whole is as that of copies."""
    operands = drawn("points", kernels, dtype, 6)
    offsets, logits = operands[4:6]
    samples = logits.shape[2:]
    fused = torch.cat([offsets.flatten(2), logits.flatten(2)], dim=-1)
    of_fused = []
    for contiguous in (False, True):
        leaf = fused.clone().requires_grad_()
        parts = leaf.split([2 * samples.numel(), samples.numel()], dim=-1)
        parts = [part.contiguous() if contiguous else part for part in parts]
        with KernelCalls() as calls:
            output = OP.function(*operands[:4], parts[0].unflatten(-1, (*samples, 2)), parts[1].unflatten(-1, samples))
        read = calls.arguments[0][4]
        assert read.is_contiguous() == contiguous
        assert contiguous or read.data_ptr() == leaf.data_ptr()
        of_fused.append([output, *torch.autograd.grad(output.float().square().sum(), leaf)])
    for got, wanted in zip(*of_fused):
        assert relative_error(got, wanted) <= TOLERANCE[dtype]


@two_forms
@pytest.mark.parametrize("needed", [(0,), (3,), (4,), (5,), (3, 5), (0, 4)])
def test_only_the_gradients_that_are_needed(backend_device, needed, form):
    for sizes in ({}, {"num_points": 9}):
        operands = drawn(form, backend_device, seed=7, **sizes)
        expected = dict(zip(OP.differentiable, run(OP, operands)[1:]))
        leaves = [t.detach().requires_grad_(i in needed) if i in expected else t for i, t in enumerate(operands)]
        output = OP.function(*leaves)
        toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        output.backward(toward.to(output))
        for i, wanted in expected.items():
            assert (leaves[i].grad is not None) == (i in needed)
            assert leaves[i].grad is None or relative_error(leaves[i].grad, wanted) <= 1e-12


def test_gradient_of_the_scale(backend_device):
    """The kernels have none; the formula does."""
    operands = drawn("boxes", backend_device, seed=8)
    gradients = []
    for function, device in ((OP.function, backend_device), (OP.formula, "cpu")):
        moved = [t.to(device) for t in operands]
        moved[6].requires_grad_()
        (gradient,) = torch.autograd.grad(function(*moved).square().sum(), moved[6])
        gradients.append(gradient.cpu())
    assert gradients[1].all()
    assert relative_error(*gradients) <= 1e-12


@pytest.mark.parametrize("num_points", [4, 9])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_logits_act_as_in_the_formula(backend_device, special, num_points):
    """They spoil their query and head and no other, or with -inf count for nothing."""
    operands = drawn("boxes", backend_device, seed=10, num_points=num_points)
    operands[LOGITS][0, 1, 1, 0, 2] = special
    operands[LOGITS][1, 2, 0] = special  # all of them
    got = [t.cpu() for t in run(OP, operands)]
    assert_same_or_both_nan(got, run(OP, OP.moved(operands, "cpu", torch.float64), function=OP.formula))
    spoiled = got[0].unflatten(-1, (3, -1)).isnan().any(-1)
    expected = torch.zeros_like(spoiled)
    expected[1, 2, 0] = True
    expected[0, 1, 1] = special != float("-inf")
    assert torch.equal(spoiled, expected)


@forms
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_special_places_are_nowhere(backend_device, special, form):
    """Samples that are not finite, or far away, contribute nothing, and neither do their gradients."""
    for place, column in ((3, 0), (3, 1), (4, 0), (4, 1)):
        operands = drawn(form, backend_device, seed=11)
        operands[place][0, 1, 0, ..., column] = special
        alone = [t.clone() for t in operands]
        alone[place][0, 1, 0, ..., column] = 1e9
        for got, wanted in zip(run(OP, operands), run(OP, alone)):
            assert got.isfinite().all()
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_logits_far_apart(backend_device):
    """The largest one takes all, whatever the exponentials of the others would be."""
    for factor in (1e2, 1e4, 1e30):
        for dtype in (torch.float64, torch.float32):
            operands = drawn("points", backend_device, dtype, 12)
            operands[LOGITS] = (operands[LOGITS] * factor).round()
            output, *gradients = run(OP, operands)
            expected = OP.formula(*(t.cpu() for t in operands))
            assert relative_error(output.cpu(), expected) <= TOLERANCE[dtype]
            assert all(gradient.isfinite().all() for gradient in gradients)


@forms
def test_levels_without_pixels(backend_device, form):
    """Their weights are part of the softmax; nothing is read of them, and no offset's gradient is NaN."""
    operands = drawn(form, backend_device, seed=13)
    operands[1][1] = torch.tensor([0, 7])
    got = run(OP, operands)
    exact = run(OP, [t.cpu() for t in operands], function=OP.formula)
    assert_close(OP, got, exact, 1e-12)
    assert not got[3][:, :, :, 1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {3: lambda t: t[:, :, :2]},
            r"reference_points must be \(N, Lq, L or 1, 2 or 4\) with N=2, Lq=7, L=3; got \(2, 7, 2, 4\)",
        ),
        ({3: lambda t: t[..., :3]}, r"reference_points must be .*; got \(2, 7, 3, 3\)"),
        (
            {4: lambda t: t[..., :1]},
            r"sampling_offsets must be \(N, Lq, M, L, P, 2\) with .*; got \(2, 7, 3, 3, 4, 1\)",
        ),
        ({6: lambda t: t[:2]}, r"offset_scale must be \(L,\) with L=3; got \(2,\)"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(backend_device, changes, message):
    operands = drawn("boxes", backend_device, torch.float32)
    operands = [changes[i](t) if i in changes else t for i, t in enumerate(operands)]
    with pytest.raises(ValueError, match=message):
        OP.function(*operands)


@two_forms
def test_compiled(device, form):
    torch._dynamo.reset()
    operands = drawn(form, device, seed=14)
    compiled = torch.compile(OP.function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(OP, run(OP, operands, function=compiled), run(OP, operands), 1e-11)


def test_nothing_is_kept_but_the_operands(kernels):
    operands = drawn("boxes", kernels, torch.float32, 15, num_queries=50)
    leaves_of(OP, operands)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OP.function(*operands)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in operands}


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernels")
class TestOnAGpu:
    """What only a GPU has; the tests above run there too."""

    # Each way that the value's gradient is summed; sides of powers of two, so that half offsets are exact locations.
    SIZES = {
        "rows shared": {"num_queries": 3000, "num_heads": 8, "channels": 32, "shapes": ((16, 32), (8, 16))},
        "rows apart": {"num_queries": 300, "num_heads": 8, "channels": 32, "shapes": ((128, 128), (64, 64))},
        "odd channels": {"num_queries": 300, "num_heads": 3, "channels": 33, "shapes": ((64, 64), (8, 4))},
        "one channel": {"num_queries": 3000, "num_heads": 4, "channels": 1, "shapes": ((64, 64), (8, 4))},
        "many points": {
            "num_queries": 200,
            "num_heads": 8,
            "channels": 32,
            "num_points": 13,
            "shapes": ((64, 64),) * 3,
        },
    }
    sizes = pytest.mark.parametrize("sizes", SIZES)

    @forms
    @sizes
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_agrees_with_float64(self, dtype, sizes, form):
        operands = inputs.random_offset_inputs(20, **self.SIZES[sizes], **FORMS[form])
        # The value's gradient may be summed in half precision: see ms_deform_attn.
        rounded = OP.moved(operands, "cpu", dtype)
        exact = [t.double() if t.is_floating_point() else t for t in rounded]
        toward = torch.randn(OP.formula(*exact).shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        expected = run(OP, exact, toward, function=OP.formula)
        actual = run(OP, OP.moved(rounded, "cuda", dtype), toward)
        tolerance = 5e-6 if dtype == torch.float32 else TOLERANCE[dtype]
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert relative_error(got.cpu(), wanted) <= (2 if i == 1 else 1) * tolerance, f"result {i}"

    @sizes
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_every_time(self, dtype, sizes):
        operands = OP.on("cuda", dtype, 21, **self.SIZES[sizes])
        torch.use_deterministic_algorithms(True)
        try:
            expected = run(OP, operands)
            for _ in range(10):
                assert all(torch.equal(got, wanted) for got, wanted in zip(run(OP, operands), expected))
        finally:
            torch.use_deterministic_algorithms(False)
        assert_close(OP, run(OP, operands), expected, 2 * TOLERANCE[dtype])

    def test_levels_that_reach_beyond_the_rows_contribute_nothing(self):
        operands = drawn("points", "cuda", seed=22)
        operands[1][1] = torch.tensor([2**40, 3])
        got = run(OP, operands)
        operands[1][1] = 0
        for actual, expected in zip(got, run(OP, operands)):
            torch.testing.assert_close(actual, expected)

    def test_graph(self):
        static, fresh = (OP.on("cuda", torch.bfloat16, seed, num_queries=40, channels=32) for seed in (23, 24))
        leaves_of(OP, static)
        leaves = [static[i] for i in OP.differentiable]

        def step():
            output = OP.function(*static)
            return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        with torch.no_grad():
            for old, new in zip(static, fresh):
                old.copy_(new)
        graph.replay()
        for got, wanted in zip(replayed, step(), strict=True):
            assert relative_error(got, wanted) <= TOLERANCE[torch.bfloat16]

    def test_memory(self):
        """The forward allocates its output alone, and a backward at an encoder's sizes no locations and no weights: no
        more than the plain op's, and a number a sample, and two a query and head."""
        operands = OP.on("cuda", torch.bfloat16, 25, **{**self.SIZES["rows shared"], "boxes": False})
        value, shapes, starts, _, offsets, logits, *_ = operands
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = OP.function(*operands)
        assert torch.cuda.max_memory_allocated() - before < output.numel() * 2 + 2**16
        plain = [value, shapes, starts, torch.rand_like(offsets, dtype=torch.float32), logits.softmax(-1)]
        ours = workspace(OP.function, operands, (0, 4, 5))
        theirs = workspace(ops.ms_deform_attn, plain, (0, 3, 4))
        assert ours <= theirs + 4 * logits.numel() + 8 * logits[..., 0, 0].numel() + 2**16
