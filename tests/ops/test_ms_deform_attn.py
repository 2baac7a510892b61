"""ms_deform_attn: channels, heads, levels and points in any number, sums in half precision, the words of its errors."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.inputs import ATTENTION_CASES, AttentionInputs, attention_inputs
from tests.ops.agreement import assert_agrees, run
from tests.ops.inputs import random_attention_inputs
from tests.ops.table import ATTENTION, FLOATING, off_the_edges
from tests.reference import ms_deform_attn, relative_error

CHANNELS = [1, 8, 30, 32, 64, 71, 1025, 2048, 3096]


@pytest.mark.parametrize("channels", CHANNELS)
def test_any_channels(backend_device, channels):
    inputs = random_attention_inputs(
        1, batch_size=1, num_queries=3, num_heads=2, channels=channels, shapes=((5, 7), (1, 3))
    )
    for dtype in FLOATING:
        assert_agrees(ATTENTION, inputs, backend_device, dtype)


@pytest.mark.parametrize("num_levels", [1, 9])
@pytest.mark.parametrize("num_heads", [1, 3, 16])
@pytest.mark.parametrize("num_points", [1, 8, 33])
def test_any_heads_levels_points(backend_device, num_points, num_heads, num_levels):
    shapes = [(2 + level % 5, 3 + level) for level in range(num_levels)]
    inputs = random_attention_inputs(
        2, batch_size=1, num_queries=3, num_heads=num_heads, channels=4, num_points=num_points, shapes=shapes
    )
    assert_agrees(ATTENTION, inputs, backend_device, torch.float64)


@pytest.mark.parametrize(("num_heads", "channels"), [(64, 1), (32, 2), (6, 8), (8, 16), (12, 32)])
def test_narrow_heads(backend_device, num_heads, channels):
    """Several heads fit into a line of a cache."""
    inputs = random_attention_inputs(
        16, batch_size=1, num_queries=5, num_heads=num_heads, channels=channels, num_points=4
    )
    for dtype in FLOATING:
        assert_agrees(ATTENTION, inputs, backend_device, dtype)


@pytest.mark.cuda
def test_many_queries_are_what_few_are():
    """The kernel gives several threads a share of a query where there are few, and many queries to a thread else."""
    inputs = random_attention_inputs(17, batch_size=1, num_queries=20000, num_heads=8, channels=32, num_points=2)
    value, shapes, starts, locations, weights = inputs.to("cuda", torch.float64)
    grad_output = torch.randn(1, 20000, 8 * 32, dtype=torch.float64, device="cuda")

    def gradients(of):
        few = AttentionInputs(value, shapes, starts, locations[:, of], weights[:, of])
        return run(ATTENTION, few, grad_output[:, of])

    parts = [gradients(slice(i, i + 500)) for i in range(0, 20000, 500)]
    output, grad_value, *others = zip(*parts)
    expected = torch.cat(output, 1), sum(grad_value), *(torch.cat(other, 1) for other in others)
    for got, wanted in zip(gradients(slice(None)), expected):
        assert relative_error(got, wanted) <= 1e-12


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("num_queries", "num_points", "channels", "dtypes"),
    [
        (1600, 8, 32, FLOATING),
        (4240, 3, 5, FLOATING[:1]),
        (43, 300, 4, FLOATING[1:2]),
        (12710, 1, 16, FLOATING[1:2]),
        (1600, 8, 160, FLOATING[1:2]),
        (2550, 5, 30, FLOATING[2:3]),
    ],
)
def test_many_samples_meet_in_a_row(num_queries, num_points, channels, dtypes):
    """So many that the kernel adds them up before it adds to memory; one level is larger than it looks at at a time."""
    inputs = random_attention_inputs(
        18,
        batch_size=1,
        num_queries=num_queries,
        num_heads=2,
        channels=channels,
        num_points=num_points,
        shapes=((70, 60), (5, 7)),
    )
    assert 4 * inputs.attention_weights[0, :, 0].numel() >= 24 * inputs.value.shape[1]
    for dtype in dtypes:
        assert_agrees(ATTENTION, inputs, torch.device("cuda"), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("places", [600, 12, 1])
@pytest.mark.parametrize(("num_points", "channels"), [(4, 32), (3, 8), (8, 160), (2, 40), (4, 264)])
def test_few_samples_for_so_many_rows(num_points, channels, places):
    """So few that half precision adds up in half precision, but where many are in one place."""
    shapes = ((70, 60), (19, 17))
    inputs = random_attention_inputs(
        20, batch_size=2, num_queries=600, num_heads=2, channels=channels, num_points=num_points, shapes=shapes
    )
    inputs.sampling_locations[:] = inputs.sampling_locations[:, torch.arange(600) % places]
    for dtype in FLOATING[2:]:
        assert_agrees(ATTENTION, inputs, torch.device("cuda"), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATING[2:], ids=str)
@pytest.mark.parametrize("a_pixel", [1, 8, 9, 32, 33, 1000])
def test_sums_of_half_precision_do_not_stand_still(dtype, a_pixel):
    """Equal terms around one pixel: in half precision alone, their sum ends where a term is half a last digit of it."""
    fractions = torch.tensor([[x, y] for x in (-0.4, 0.4) for y in (-0.4, 0.4)])  # of a pixel, in four footprints
    locations = ((50.5 + fractions) / 100).repeat(a_pixel, 1).to("cuda")
    value = torch.zeros(1, 100 * 100, 1, 8, dtype=dtype, device="cuda")
    inputs = AttentionInputs(
        value, torch.tensor([[100, 100]]), torch.tensor([0]), locations.view(1, -1, 1, 1, 1, 2),
        torch.full((1, len(locations), 1, 1, 1), 1.2, dtype=dtype, device="cuda"),
    )  # fmt: skip
    _, got, _, _ = run(ATTENTION, inputs, torch.ones(1, len(locations), 8))
    _, wanted, _, _ = run(ATTENTION, inputs.to("cuda", torch.float64), torch.ones(1, len(locations), 8))
    # One rounding of a term and one of a sum each, in half precision where the pixel is not crowded.
    at_once = 4 * a_pixel if a_pixel <= (32 if dtype == torch.float16 else 8) else 1
    assert relative_error(got, wanted) <= at_once * torch.finfo(dtype).eps


@pytest.mark.cuda
@pytest.mark.parametrize("places", [600, 12])
def test_half_precision_where_levels_overlap(places):
    inputs = random_attention_inputs(
        21, batch_size=2, num_queries=600, num_heads=2, channels=16, shapes=((60, 50), (50, 60), (9, 7))
    )
    starts = torch.tensor([200, 0, 100])
    locations = inputs.sampling_locations[:, torch.arange(600) % places]
    for dtype in FLOATING[2:]:
        assert_agrees(
            ATTENTION,
            AttentionInputs(inputs.value, inputs.spatial_shapes, starts, locations, inputs.attention_weights),
            torch.device("cuda"),
            dtype,
        )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [((9, 9), (3, 3)), ((99, 99), (33, 33))], ids=["many", "few"])
def test_a_gradient_that_is_not_finite_stays_where_it_belongs(shapes, dtype):
    value, shapes, starts, locations, weights = random_attention_inputs(
        19, batch_size=1, num_queries=500, num_heads=1, channels=8, num_points=4, shapes=shapes
    ).to("cuda", dtype)
    grad_output = torch.ones(1, 500, 8, device="cuda")
    grad_output[0, 7, 3] = float("inf")
    alone = AttentionInputs(value, shapes, starts, locations[:, 7:8], weights[:, 7:8])
    _, expected, _, _ = run(ATTENTION, alone, grad_output[:, 7:8])
    _, got, _, _ = run(ATTENTION, AttentionInputs(value, shapes, starts, locations, weights), grad_output)
    assert not expected.isfinite().all()
    assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("batch_size", [1, 3, 65])
@pytest.mark.parametrize("im2col_step", [1, 2, 64])
def test_batch_need_not_be_a_multiple_of_im2col_step(backend_device, batch_size, im2col_step):
    inputs = random_attention_inputs(3, batch_size=batch_size, num_queries=2).to(backend_device, torch.float64)
    output = ops.MSDeformAttnFunction.apply(*inputs, im2col_step)
    assert relative_error(output.cpu(), ms_deform_attn(*(t.cpu() for t in inputs))) <= 1e-12


@pytest.mark.parametrize("channels", CHANNELS)
def test_gradcheck(backend_device, channels):
    value, shapes, starts, locations, weights = off_the_edges(
        *random_attention_inputs(
            4, batch_size=1, num_queries=2, num_heads=1, channels=channels, num_points=2, shapes=((2, 3), (2, 1))
        ).to(backend_device, torch.float64)
    )
    leaves = [t.requires_grad_() for t in (value, locations, weights)]

    def function(value, locations, weights):
        return ops.ms_deform_attn(value, shapes, starts, locations, weights)

    # Many channels: random projections of the Jacobian instead of all its elements.
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12, fast_mode=channels > 100)


def touching(inputs: AttentionInputs) -> torch.Tensor:
    """(N, Lq, M, L, P) bool: the samples whose footprint touches their level."""
    size = inputs.spatial_shapes.flip(-1)[:, None].to(inputs.sampling_locations)
    pixel = inputs.sampling_locations * size - 0.5
    return ((pixel > -1) & (pixel < size)).all(-1)


def test_samples_outside_the_unit_square_count_while_they_touch(backend_device):
    """A quarter of a pixel outside, the border pixel still has a quarter of its weight."""
    value = torch.arange(1.0, 5.0, device=backend_device).view(1, 4, 1, 1)
    locations = torch.tensor([[-0.125, 0.25], [1.125, 0.25], [0.25, -0.125], [0.75, 1.125], [-0.25, 0.25]])
    output = ops.ms_deform_attn(
        value,
        torch.tensor([[2, 2]], device=backend_device),
        torch.tensor([0], device=backend_device),
        locations.view(1, 5, 1, 1, 1, 2).to(backend_device),
        torch.ones(1, 5, 1, 1, 1, device=backend_device),
    )
    assert output.flatten().tolist() == [0.25, 0.5, 0.25, 1.0, 0.0]


def wrong(**changes):
    """Valid arguments with some replaced."""
    inputs = random_attention_inputs(12)
    arguments = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            wrong(sampling_locations=lambda t: t[:, :, :, :2]),
            ValueError,
            r"sampling_locations must be \(N, Lq, M, L, P, 2\) with N=2, M=3, L=3; got \(2, 7, 3, 2, 3, 2\)",
        ),
        (wrong(value=lambda t: t.flatten(2)), ValueError, r"value must be \(N, S, M, D\); got \(2, 164, 24\)"),
        (wrong(spatial_shapes=lambda t: t[0]), ValueError, r"spatial_shapes must be \(L, 2\); got \(2,\)"),
        (
            wrong(level_start_index=lambda t: t[:1]),
            ValueError,
            r"level_start_index must be \(L,\) with L=3; got \(1,\)",
        ),
        (
            wrong(attention_weights=lambda t: t.flatten(3)),
            ValueError,
            r"attention_weights must be \(N, Lq, M, L, P\) with N=2, Lq=7, M=3, L=3, P=3; got \(2, 7, 3, 9\)",
        ),
        (
            wrong(sampling_locations=lambda t: t.long()),
            TypeError,
            r"sampling_locations must be float64 or float32 or float16 or bfloat16; got int64",
        ),
        (
            wrong(attention_weights=lambda t: t.half()),
            TypeError,
            r"attention_weights must be float64 or float32; got float16",
        ),
        (wrong(value=lambda t: t.long()), TypeError, r"value must be float64 or .*; got int64"),
        (wrong(spatial_shapes=lambda t: t.float()), TypeError, r"spatial_shapes must be int64 or .*; got float32"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.ms_deform_attn(**arguments)


@pytest.mark.parametrize("case", ["small-encoder", "small-decoder"])
@pytest.mark.parametrize("geometry", ["around", "uniform"])
def test_workloads(case, geometry):
    sizes = ATTENTION_CASES[case]
    inputs = attention_inputs(case, 2, geometry=geometry)
    output = ops.ms_deform_attn(*inputs)
    assert output.shape == (2, sizes.num_queries or sizes.num_values, sizes.num_heads * sizes.channels)
    assert touching(inputs).double().mean() > 0.5
    torch.testing.assert_close(inputs.attention_weights.sum((-1, -2)), torch.ones(output.shape[:2] + (4,)))
    with pytest.raises(ValueError, match="geometry must be"):
        attention_inputs(case, geometry="nowhere")
    with pytest.raises(ValueError, match="case must be one of encoder, decoder"):
        attention_inputs("huge")
