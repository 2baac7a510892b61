"""The flag of attention's backward that says whether sums in half precision may make the value's gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation import ops
from reimplementation.bench.inputs import AttentionInputs
from tests import reference
from tests.ops.inputs import random_attention_inputs

HALVES = [torch.float16, torch.bfloat16]
SWITCHES = [f"allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")]


@pytest.fixture
def switches():
    """Gives PyTorch's switches back as they were."""
    before = [getattr(torch.backends.cuda.matmul, switch) for switch in SWITCHES]
    yield
    for switch, value in zip(SWITCHES, before):
        setattr(torch.backends.cuda.matmul, switch, value)


def few_samples(dtype: torch.dtype, device: str) -> tuple[AttentionInputs, torch.Tensor]:
    """So few that half precision may add up in half precision, though pixels get several; and an output's gradient."""
    inputs = random_attention_inputs(5, num_queries=100, channels=32, num_points=4, shapes=((40, 40), (20, 20)))
    grad_output = torch.randn(2, 100, 3 * 32, generator=torch.Generator().manual_seed(6))
    return inputs.to(device, dtype), grad_output.to(device, dtype)


def value_gradient(inputs: AttentionInputs, grad_output: torch.Tensor, **flags: bool) -> torch.Tensor:
    backward = torch.ops.reimplementation.ms_deform_attn_backward
    return backward(grad_output, *inputs, True, False, False, **flags)[0].cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_cpu_never_sums_in_half_precision(dtype):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    call = few_samples(dtype, "cpu")
    assert torch.equal(value_gradient(*call, half_sums=False), value_gradient(*call, half_sums=True))
    assert torch.equal(value_gradient(*call, half_sums=False), value_gradient(*call))


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(("dtype", "short"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")], ids=str)
def test_the_backward_follows_pytorchs_switches(switches, dtype, short, allowed):
    """Each dtype its own: the other one's says the opposite."""
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    for switch in SWITCHES:
        setattr(torch.backends.cuda.matmul, switch, allowed == (short in switch))
    (value, *others), grad_output = few_samples(dtype, "cpu")
    output = ops.ms_deform_attn(value.requires_grad_(), *others)
    with LastArgument() as told:
        output.backward(grad_output)
    assert told.names == ["half_sums"] and told.values == [allowed]


class LastArgument(TorchDispatchMode):
    """Records the last argument of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names, self.values = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "reimplementation":
            place = len(func._schema.arguments) - 1
            self.names.append(func._schema.arguments[place].name)
            self.values.append(args[place] if len(args) > place else func._schema.arguments[place].default_value)
        return func(*args, **(kwargs or {}))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_without_them_a_sum_is_rounded_once(dtype):
    inputs, grad_output = few_samples(dtype, "cuda")
    value = inputs.value.double().cpu().requires_grad_()
    others = (operand.double().cpu() for operand in list(inputs)[3:])
    output = reference.ms_deform_attn(value, inputs.spatial_shapes.cpu(), inputs.level_start_index.cpu(), *others)
    (exact,) = torch.autograd.grad(output, value, grad_output.double().cpu())
    rounding = torch.finfo(dtype).eps / 2
    of_float32 = 1e-5 * exact.abs().max()  # some ten additions of terms that are not much larger

    def is_rounded_once(gradient: torch.Tensor) -> torch.Tensor:
        return (gradient - exact).abs() <= rounding * exact.abs() + of_float32

    assert is_rounded_once(value_gradient(inputs, grad_output, half_sums=False)).all()
    if torch.cuda.get_device_capability() >= (9, 0):
        assert not is_rounded_once(value_gradient(inputs, grad_output, half_sums=True)).all()
