"""What PyTorch offers around any function and any module works with these, or says why it does not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from reimplementation import ops
from tests.models.cases import trainable
from tests.reference import TOLERANCE, relative_error


class BackwardCalls(TorchDispatchMode):
    """Records which gradients the kernels of the sampling ops are asked for: (features, locations, weights)."""

    def __init__(self):
        super().__init__()
        self.needs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("reimplementation::")
        if name in ("deformable_aggregation_backward", "ms_deform_attn_backward"):
            self.needs.append(tuple(args[6:9]))  # behind the gradient and five operands
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(device):
    """The device, where its kernels are built."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    return device


def through_file(thing, **settings):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **settings)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: through_file(module, weights_only=False),
}


def assert_same(actual, expected):
    """The same bits on the CPU; on a GPU the same up to the order in which atomics add."""
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got, wanted) <= (TOLERANCE[torch.float32] if got.is_cuda else 0)


class TestGradientsOnDemand:
    """Frozen operands get no gradient, and the kernels are not asked for one."""

    @pytest.mark.parametrize("frozen", range(3))
    def test_op(self, op, kernels, frozen):
        features, shapes, starts, locations, weights = op.inputs().to(kernels, torch.float32)
        leaves = [features, locations, weights]
        needs = tuple(i != frozen for i in range(3))
        for leaf, needed in zip(leaves, needs):
            leaf.requires_grad_(needed)
        with BackwardCalls() as calls:
            op.function(leaves[0], shapes, starts, *leaves[1:]).sum().backward()
        assert calls.needs == [needs]
        assert [leaf.grad is not None for leaf in leaves] == list(needs)

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_that_are_not_asked_for_take_no_memory(self, op, kernels, needs):
        operands = list(op.inputs().to(kernels, torch.float32))
        results = op.backward(torch.ones_like(op.forward(*operands)), *operands, *needs)
        wanted = [operands[i].numel() if needed else 0 for i, needed in zip((0, 3, 4), needs)]
        assert [gradient.numel() for gradient in results] == wanted

    def test_module_behind_a_frozen_backbone(self, case, kernels):
        module, operands = case.trained(kernels), [t.detach() for t in case.operands_on(kernels)]
        if case.name == "MSDeformAttn":  # whose value is projected by a parameter of its own
            module.value_proj.requires_grad_(False)
        with BackwardCalls() as calls:
            case.call(module, operands).sum().backward()
        assert calls.needs == [(False, True, True)]
        assert all(parameter.grad is not None for parameter in trainable(module))


class TestGraph:
    """Autograd's graph holds the operands as it does for any function of PyTorch's."""

    @pytest.fixture
    def leaves(self, op, kernels):
        features, shapes, starts, locations, weights = op.inputs().to(kernels, torch.float32)
        return [features.requires_grad_(), shapes, starts, locations.requires_grad_(), weights.requires_grad_()]

    def test_backward_twice(self, op, leaves):
        floating = [leaf for leaf in leaves if leaf.requires_grad]
        loss = op.function(*leaves).square().sum()
        first = torch.autograd.grad(loss, floating, retain_graph=True)
        assert_same(torch.autograd.grad(loss, floating), first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, floating)

    def test_operands_kept_on_the_cpu(self, op, leaves):
        floating = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.autograd.graph.save_on_cpu():
            offloaded = op.function(*leaves)
        gradients = (torch.autograd.grad(output.sum(), floating) for output in (offloaded, op.function(*leaves)))
        assert_same(*gradients)

    @pytest.mark.parametrize("operand", [0, 3, 4])
    def test_an_operand_overwritten_before_the_backward_is_an_error(self, op, leaves, operand):
        leaves[operand] = leaves[operand].clone()
        output = op.function(*leaves)
        leaves[operand].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_several_output_gradients_at_once(self, op, leaves):
        floating = [leaf for leaf in leaves if leaf.requires_grad]
        output = op.function(*leaves)
        several = torch.stack([torch.ones_like(output), output.detach()])
        batched = torch.autograd.grad(output, floating, several, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(output, floating, one, retain_graph=True) for one in several]
        assert_same(batched, [torch.stack(gradients) for gradients in zip(*one_by_one)])


class TestModules:
    def test_functional_call(self, case, backend_device):
        operands = case.operands_on(backend_device)
        module, other = case.trained(backend_device), case.trained(backend_device, seed=1)
        parameters = dict(other.named_parameters())
        actual = torch.func.functional_call(module, parameters, case.arguments(*operands))
        expected = case.call(other, operands)
        assert torch.equal(actual, expected)
        assert_same(*(torch.autograd.grad(output.sum(), trainable(other)) for output in (actual, expected)))

    @pytest.mark.parametrize("way", COPIES)
    def test_copies(self, case, device, way):
        module, operands = case.trained(device), case.operands_on(device)
        twin = COPIES[way](module)
        assert torch.equal(case.call(twin, operands), case.call(module, operands))
        twin.output_proj.weight.data.zero_()
        assert module.output_proj.weight.count_nonzero() > 0

    def test_state_dict(self, case, device):
        module, other, operands = case.trained(device), case.trained(device, seed=1), case.operands_on(device)
        other.load_state_dict(through_file(module.state_dict(), weights_only=True))
        assert torch.equal(case.call(other, operands), case.call(module, operands))

    def test_inference_mode(self, case, backend_device):
        module, operands = case.trained(backend_device), case.operands_on(backend_device)
        with torch.inference_mode():
            output = case.call(module, operands)
        assert output.is_inference()
        assert torch.equal(output, case.call(module, operands))

    def test_full_backward_hook(self, case, backend_device):
        module, operands = case.trained(backend_device), case.operands_on(backend_device)
        seen = []
        module.register_full_backward_hook(lambda _, *gradients: seen.append(gradients))
        output = case.call(module, operands)
        output.backward(torch.ones_like(output))
        (((grad_query, *_), (grad_output,)),) = seen
        assert torch.equal(grad_output, torch.ones_like(output))
        assert torch.equal(grad_query, operands[0].grad)

    def test_meta_device(self, case, device):
        """Built without memory or numbers, then given both."""
        module, operands = case.trained(device), case.operands_on(device)
        with torch.device("meta"):
            other = case.build()
            assert all(parameter.is_meta for parameter in other.parameters())
        other.to_empty(device=device).load_state_dict(module.state_dict())
        assert torch.equal(case.call(other, operands), case.call(module, operands))

    def test_shapes_on_the_meta_device(self, case, kernels):
        output = case.call(case.trained("meta"), case.operands_on("meta"))
        assert output.is_meta
        assert output.shape == case.operands()[0].shape

    def test_activation_checkpointing(self, case, backend_device):
        backend = ops.backends.select_backend(backend_device)

        def contexts():
            """For the forward and for the recomputation, which on a GPU runs in another thread."""
            return ops.use_backend(backend), ops.use_backend(backend)

        module, operands = case.trained(backend_device), case.operands_on(backend_device)
        leaves = [*operands[: case.num_leaves], *trainable(module)]
        checkpointed = checkpoint(module, *case.arguments(*operands), use_reentrant=False, context_fn=contexts)
        outputs = checkpointed, case.call(module, operands)
        assert torch.equal(*outputs)
        assert_same(*(torch.autograd.grad(output.square().sum(), leaves) for output in outputs))

    def test_second_derivatives_are_refused(self, case, kernels):
        module, operands = case.trained(kernels), case.operands_on(kernels)
        (gradient,) = torch.autograd.grad(case.call(module, operands).sum(), operands[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            gradient.sum().backward()


def test_meta_tensors(op, kernels):
    """Shapes and dtypes without numbers."""
    inputs = op.inputs()
    on_meta = op.function(*inputs.to("meta", torch.bfloat16))
    assert on_meta.is_meta
    assert on_meta.dtype == torch.bfloat16
    assert on_meta.shape == op.function(*inputs).shape


class TestTransforms:
    """torch.func, and forward mode: plain PyTorch steps in for the kernels."""

    @pytest.fixture
    def function(self, op, device):
        """The op of its three floating operands, and these."""
        features, shapes, starts, locations, weights = op.inputs().to(device, torch.float64)
        return lambda *leaves: op.function(leaves[0], shapes, starts, *leaves[1:]), (features, locations, weights)

    def test_grad(self, function):
        function, leaves = function
        actual = torch.func.grad(lambda *leaves: function(*leaves).square().sum(), argnums=(0, 1, 2))(*leaves)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for got, wanted in zip(actual, expected):
            torch.testing.assert_close(got, wanted)

    def test_vmap(self, function):
        function, leaves = function
        factors = torch.tensor([1.0, 0.5, -2.0]).to(leaves[0])
        several = [torch.stack([leaf * factor for factor in factors]) for leaf in leaves]
        expected = torch.stack([function(*leaves) for leaves in zip(*several)])
        torch.testing.assert_close(torch.func.vmap(function)(*several), expected)

    def test_per_sample_gradients(self, function):
        function, (features, locations, weights) = function
        several = torch.stack([weights, 2 * weights])
        gradient = torch.func.grad(lambda weights: function(features, locations, weights).square().sum())
        torch.testing.assert_close(torch.func.vmap(gradient)(several), torch.stack([*map(gradient, several)]))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # as PyTorch does there
    @pytest.mark.parametrize("forward_mode", ["jvp", "dual tensors"])
    def test_forward_mode_is_refused(self, function, forward_mode):
        function, leaves = function

        def derivative():
            if forward_mode == "jvp":
                return torch.func.jvp(function, leaves, leaves)
            with forward_ad.dual_level():
                return function(*(forward_ad.make_dual(leaf, leaf) for leaf in leaves))

        with pytest.raises(NotImplementedError, match="forward AD"):
            derivative()

    def test_forced_kernels_refuse(self, function, device):
        function, leaves = function
        if device.type not in ops.available_backends(device):
            pytest.skip(f"the {device.type} kernels are not built")
        with ops.use_backend(device.type), pytest.raises(RuntimeError, match="need grid_sample"):
            torch.func.vmap(function)(*(leaf[None] for leaf in leaves))
