"""What PyTorch offers around any function and any module works with these, or says why it does not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from reimplementation import ops
from tests.models.table import trainable
from tests.ops.agreement import KernelCalls, leaves_of, of_leaves
from tests.reference import TOLERANCE, relative_error


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


class TestGraph:
    """Autograd's graph holds the operands as it does for any function of PyTorch's."""

    @pytest.fixture
    def operands(self, op, kernels) -> list:
        return op.on(kernels, torch.float32)

    @pytest.fixture
    def leaves(self, op, operands) -> list:
        """The operands that the kernel differentiates, in the list of the operands too."""
        return leaves_of(op, operands)

    def test_backward_twice(self, op, operands, leaves):
        loss = op.function(*operands).square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_same(torch.autograd.grad(loss, leaves), first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves)

    def test_operands_kept_on_the_cpu(self, op, operands, leaves):
        with torch.autograd.graph.save_on_cpu():
            offloaded = op.function(*operands)
        gradients = (torch.autograd.grad(output.sum(), leaves) for output in (offloaded, op.function(*operands)))
        assert_same(*gradients)

    def test_an_operand_overwritten_before_the_backward_is_an_error(self, op, operands, leaves):
        for i in op.differentiable:
            overwritten = list(operands)
            overwritten[i] = operands[i].clone()
            output = op.function(*overwritten)
            overwritten[i].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


class TestModules:
    def test_behind_a_frozen_backbone(self, case, kernels):
        """The kernels are not asked for the gradient of features that need none."""
        module, operands = case.trained(kernels), [t.detach() for t in case.operands_on(kernels)]
        if case.name == "MSDeformAttn":  # whose value is projected by a parameter of its own
            module.value_proj.requires_grad_(False)
        with KernelCalls() as calls:
            case.call(module, operands).sum().backward()
        backward, before = {  # the operator of the gradients, and of its flags those of what has none
            "ms_deform_attn_from_offsets": (
                "ms_deform_attn_from_offsets_backward",
                [False, False],
            ),  # value, references
            "deformable_feature_aggregation": ("aggregation_module_backward", [False]),  # the features
        }[case.op]
        [arguments] = [args for name, args in zip(calls.names, calls.arguments) if name == backward]
        flags = [argument for argument in arguments if isinstance(argument, bool)]
        assert flags[: len(before) + 2] == [*before, True, True]
        assert all(parameter.grad is not None for parameter in trainable(module))

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

    def test_activation_checkpointing(self, case, backend, backend_device):
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


class TestTransforms:
    """torch.func, and forward mode: plain PyTorch steps in for the kernels."""

    @pytest.fixture
    def function(self, op, device):
        """The op of what its kernel differentiates, and that."""
        operands = op.on(device)
        leaves = leaves_of(op, operands)
        return of_leaves(op, operands), tuple(leaf.detach() for leaf in leaves)

    def test_grad(self, function):
        function, leaves = function
        argnums = tuple(range(len(leaves)))
        actual = torch.func.grad(lambda *leaves: function(*leaves).square().sum(), argnums)(*leaves)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted)

    def test_vmap(self, function):
        function, leaves = function
        factors = torch.tensor([1.0, 0.5, -2.0]).to(leaves[0])
        several = [torch.stack([leaf * factor for factor in factors]) for leaf in leaves]
        expected = torch.stack([function(*leaves) for leaves in zip(*several)])
        torch.testing.assert_close(torch.func.vmap(function)(*several), expected)

    def test_per_sample_gradients(self, function):
        function, (*others, last) = function
        several = torch.stack([last, 2 * last])
        gradient = torch.func.grad(lambda last: function(*others, last).square().sum())
        torch.testing.assert_close(torch.func.vmap(gradient)(several), torch.stack([*map(gradient, several)]))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # as PyTorch does there
    @pytest.mark.parametrize("forward_mode", ["jvp", "dual tensors"])
    def test_forward_mode(self, op, function, forward_mode):
        """Elementwise arithmetic has it; grid_sample has not, and says so."""
        function, leaves = function

        def derivative():
            if forward_mode == "jvp":
                return torch.func.jvp(function, leaves, leaves)[1]
            with forward_ad.dual_level():
                duals = (forward_ad.make_dual(leaf, leaf) for leaf in leaves)
                return forward_ad.unpack_dual(function(*duals)).tangent

        if not op.is_pointwise:
            with pytest.raises(NotImplementedError, match="forward AD"):
                derivative()
            return
        moved = [function(*(leaf * (1 + step) for leaf in leaves)) for step in (1e-6, -1e-6)]
        assert relative_error((moved[0] - moved[1]) / 2e-6, derivative()) <= 1e-6

    def test_forced_kernels_refuse(self, function, kernels):
        function, leaves = function
        with ops.use_backend(kernels.type), pytest.raises(RuntimeError, match="need grid_sample"):
            torch.func.vmap(function)(*(leaf[None] for leaf in leaves))
