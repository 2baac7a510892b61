"""DeformableFeatureAggregation as one node of autograd's graph: the layers' numbers, and who makes it call them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation import ops
from reimplementation.models.deformable import aggregation, one_node
from tests.models.table import AGGREGATION, CHANNELS, trainable
from tests.ops.agreement import KernelCalls
from tests.reference import TOLERANCE, relative_error

MAP = {"type": "SparsePoint3DKeyPointsGenerator", "num_sample": 2, "num_learnable_pts": 2}
FORMS = {
    "none": {},
    "add": {"residual_mode": "add"},
    "cat": {"residual_mode": "cat"},
    "without cameras": {"use_camera_embed": False},
    "dropped": {"attn_drop": 0.3},
    "fixed points": {"kps_generator": {"type": "SparseBox3DKeyPointsGenerator"}},
    "map": {"kps_generator": MAP, "residual_mode": "add"},
}


@pytest.fixture(autouse=True)
def needs_kernels(kernels):
    """Without kernels the layers are called."""


def operands_of(module, device, dtype=torch.float32, features: torch.dtype | None = None) -> list:
    """The table's, in a dtype, with polylines where the module wants them; those that are trained require gradients."""
    operands = AGGREGATION.operands_on(device)
    if type(module.kps_generator).__name__ == "SparsePoint3DKeyPointsGenerator":
        operands[2] = operands[2].detach()[..., :4].clone().requires_grad_()
    moved = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in operands]
    moved[3] = moved[3].detach().to(features or dtype).requires_grad_()
    return moved


def layer_by_layer():
    return mock.patch.object(aggregation, "plain_tensors", lambda *_: None)


def run(module, operands, context=nullcontext) -> tuple[torch.Tensor, list]:
    """The output and every gradient."""
    torch.manual_seed(4)
    with context():
        output = AGGREGATION.call(module, operands)
    leaves = [*operands[: AGGREGATION.num_leaves], *trainable(module)]
    toward = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    return output, list(torch.autograd.grad(output, [t for t in leaves if t.requires_grad], toward))


def is_one_node(output: torch.Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_NodeBackward"


def assert_same_as_layers(module, operands, tolerance: float, context=nullcontext) -> None:
    output, gradients = run(module, operands, context)
    with layer_by_layer():
        expected_output, expected = run(module, operands)
    assert is_one_node(output) and not is_one_node(expected_output)
    for got, wanted in zip([output, *gradients], [expected_output, *expected], strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert wanted.any()
        assert relative_error(got.detach(), wanted.detach()) <= tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_layers_numbers(device, dtype, form):
    module = AGGREGATION.trained(device, **FORMS[form]).to(dtype)
    assert_same_as_layers(module, operands_of(module, device, dtype), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16], ids=str)
def test_features_in_half_precision(device, features):
    module = AGGREGATION.trained(device)
    assert_same_as_layers(module, operands_of(module, device, features=features), TOLERANCE[features])


def test_without_gradients_the_same_numbers(device):
    module = AGGREGATION.trained(device, residual_mode="cat")
    operands = operands_of(module, device)
    expected = AGGREGATION.call(module, operands)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(AGGREGATION.call(module, operands), expected)


@pytest.mark.parametrize("shape", [(CHANNELS,), (1, 12, CHANNELS), (2, 1, 1)])
def test_an_embedding_that_broadcasts(device, shape):
    module = AGGREGATION.trained(device)
    operands = operands_of(module, device)
    operands[1] = torch.randn(shape, device=device, requires_grad=True)
    assert_same_as_layers(module, operands, 10 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("frozen", ["encoder", "layers", "inputs", "all but one"])
def test_what_is_frozen_gets_no_gradient(device, frozen):
    module = AGGREGATION.trained(device, residual_mode="add")
    operands = operands_of(module, device)
    if frozen in ("inputs", "all but one"):
        operands[: AGGREGATION.num_leaves] = [t.detach() for t in operands[: AGGREGATION.num_leaves]]
    if frozen == "encoder":
        module.camera_encoder.requires_grad_(False)
    if frozen in ("layers", "all but one"):
        module.requires_grad_(False)
    if frozen == "all but one":
        module.camera_encoder[0].weight.requires_grad_()
    assert_same_as_layers(module, operands, 10 * TOLERANCE[torch.float32])


def test_several_output_gradients_at_once(device):
    module = AGGREGATION.trained(device, residual_mode="add")
    leaves = [*trainable(module)]
    output = AGGREGATION.call(module, operands_of(module, device))
    several = torch.stack([torch.ones_like(output), output.detach()])
    batched = torch.autograd.grad(output, leaves, several, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in several]
    for got, wanted in zip(batched, (torch.stack(gradients) for gradients in zip(*one_by_one)), strict=True):
        assert relative_error(got, wanted) <= 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"num_queries": 0}], ids=lambda sizes: next(iter(sizes)))
def test_nothing_to_aggregate(device, sizes):
    module = AGGREGATION.trained(device, residual_mode="cat")
    operands = AGGREGATION.operands_on(device, **sizes)
    output, gradients = run(module, operands)
    assert is_one_node(output) and output.numel() == 0
    with layer_by_layer():
        expected_output, expected = run(module, operands)
    assert output.shape == expected_output.shape
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.shape == wanted.shape and not got.any()


def test_kernels_are_not_asked_for_what_nothing_needs(device):
    """Of frozen boxes without learned places the key points need no gradient, as frozen maps do not."""
    generator = {"type": "SparseBox3DKeyPointsGenerator"}
    module = AGGREGATION.trained(device, kps_generator=generator)
    operands = [t.detach() for t in operands_of(module, device)]
    operands[0].requires_grad_()
    with KernelCalls() as calls:
        AGGREGATION.call(module, operands).sum().backward()
    assert calls.names == ["aggregation_module", "aggregation_module_backward"]
    *_, of_maps, of_points, of_encoder, _ = calls.arguments[1]
    assert (of_maps, of_points, of_encoder) == (False, False, True)


class Doubled(nn.Linear):
    def forward(self, tensor):
        return 2 * super().forward(tensor)


class Marked(torch.Tensor):
    """As a quantised weight is: a tensor of another class."""


def doubled_in_place(layer: nn.Linear) -> None:
    original = layer.forward
    layer.forward = lambda tensor: 2 * original(tensor)


def replace_weights_layer(module) -> None:
    module.weights_fc = Doubled(CHANNELS, module.weights_fc.out_features, device=module.weights_fc.weight.device)


def replace_weight(module) -> None:
    weight = module.output_proj.weight.detach().as_subclass(Marked)
    module.output_proj.weight = nn.Parameter(weight)


def drop_bias(module) -> None:
    module.output_proj.register_parameter("bias", None)


WATCHED = {
    "forward hook": lambda m: m.weights_fc.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.camera_encoder[0].register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.output_proj.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.camera_encoder.register_full_backward_pre_hook(lambda *_: None),
    "hook of the dropout": lambda m: m.proj_drop.register_forward_hook(lambda *_: None),
    "another forward": lambda m: doubled_in_place(m.output_proj),
    "another class": replace_weights_layer,
    "another class of weight": replace_weight,
    "parametrised": lambda m: parametrizations.orthogonal(m.camera_encoder[3]),
    "no bias": drop_bias,
    "dropout": lambda m: setattr(m.proj_drop, "p", 0.5),
    "plain PyTorch": lambda m: setattr(m, "use_deformable_func", False),
    "a layer more": lambda m: m.camera_encoder.append(nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("watch", WATCHED)
def test_layers_that_are_no_plain_ones_are_called(device, watch):
    module = AGGREGATION.trained(device)
    WATCHED[watch](module)
    operands = operands_of(module, device)
    output, gradients = run(module, operands)
    with layer_by_layer():
        expected_output, expected = run(module, operands)
    assert not is_one_node(output)
    assert torch.equal(output, expected_output)
    for got, wanted in zip(gradients, expected, strict=True):
        assert relative_error(got.detach(), wanted.detach()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("part", ["kps_generator", "kps_generator.learnable_fc"])
def test_a_generator_that_is_watched_is_called_once(device, part):
    """What follows it may be one node all the same."""
    module, seen = AGGREGATION.trained(device), []
    operands = operands_of(module, device)
    expected, _ = run(module, operands)
    module.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    output, _ = run(module, operands)
    assert seen == [part]
    assert is_one_node(output)
    assert relative_error(output, expected) <= TOLERANCE[torch.float32]


@contextmanager
def hook_on_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS = {"hooks on all modules": hook_on_all_modules, "a forced backend": lambda: ops.use_backend("grid_sample")}


@pytest.mark.parametrize("context", CONTEXTS)
def test_layers_are_called_within(device, context):
    module = AGGREGATION.trained(device)
    operands = operands_of(module, device)
    with CONTEXTS[context]():
        assert not is_one_node(AGGREGATION.call(module, operands))
    assert is_one_node(AGGREGATION.call(module, operands))


def test_cameras_that_need_a_gradient(device):
    module = AGGREGATION.trained(device)
    operands = operands_of(module, device)
    operands[4].requires_grad_()
    AGGREGATION.call(module, operands).sum().backward()
    assert operands[4].grad.any()


def test_transforms(device):
    """torch.func differentiates what it knows."""
    module = AGGREGATION.trained(device)
    feature, *others = [t.detach() for t in operands_of(module, device)]
    gradient = torch.func.grad(lambda feature: AGGREGATION.call(module, [feature, *others]).sum())(feature)
    feature.requires_grad_()
    (expected,) = torch.autograd.grad(AGGREGATION.call(module, [feature, *others]).sum(), feature)
    assert relative_error(gradient, expected) <= 10 * TOLERANCE[torch.float32]


class Casts(TorchDispatchMode):
    """Counts the calls that make another dtype of a tensor."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_no_weight_is_cast(device, half):
    """The layers stay in float32: to cast what they read takes longer than they do."""
    module = AGGREGATION.trained(device, residual_mode="add")
    for features in (torch.float32, half):
        operands = operands_of(module, device, features=features)
        with Casts() as counted:
            run(module, operands, lambda: torch.autocast(device.type, half))
        assert counted.number == 0
        assert_same_as_layers(module, operands, TOLERANCE[features], lambda: torch.autocast(device.type, half))


def test_under_autocast_a_backward_within_is_no_other(device):
    module = AGGREGATION.trained(device)
    operands = operands_of(module, device)
    _, expected = run(module, operands)
    with torch.autocast(device.type, torch.bfloat16):
        _, gradients = run(module, operands)
    for got, wanted in zip(gradients, expected, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


def test_what_is_large_is_made_again(device, monkeypatch):
    module = AGGREGATION.trained(device, residual_mode="add")
    operands = operands_of(module, device)
    expected = run(module, operands)
    monkeypatch.setattr(one_node, "_LARGE", 0)
    output, gradients = run(module, operands)
    assert torch.equal(output, expected[0])
    for got, wanted in zip(gradients, expected[1], strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


def test_little_is_kept_for_the_backward(device, monkeypatch):
    """Of what grows with the queries: key points, features, and two numbers a group; no large query, and no logits."""
    monkeypatch.setattr(one_node, "_LARGE", 0)
    module = AGGREGATION.trained(device)
    operands = [t.detach().requires_grad_(t.requires_grad) for t in AGGREGATION.operands(num_queries=500)]
    operands = [t.to(device) for t in operands]
    kept = {}
    given = {t.data_ptr() for t in [*operands, *module.parameters()]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        AGGREGATION.call(module, operands)
    own = sum(t.numel() for pointer, t in kept.items() if pointer not in given)
    a_query = CHANNELS + module.num_pts * 3 + 2 * module.num_groups + module.kps_generator.num_learnable_pts * 3
    of_cameras = 2 * 2 * (4 * CHANNELS + 4 + module.weights_fc.out_features)  # batch, cameras
    assert own <= 2 * 500 * a_query + of_cameras


def test_an_error_is_in_the_layers_words(device):
    module = AGGREGATION.trained(device)
    operands = operands_of(module, device)
    operands[5] = operands[5][:, :1]
    with pytest.raises(ValueError, match=r"image_wh must be \(bs, num_cams, 2\) with bs=2, num_cams=2; got"):
        AGGREGATION.call(module, operands)


def test_tensors_that_lie_within_larger_ones(device):
    """Views with an offset, and with steps of their own, are read where they lie."""
    module = AGGREGATION.trained(device, residual_mode="cat")
    operands = operands_of(module, device)
    expected = run(module, operands)
    for i in range(AGGREGATION.num_leaves):
        around = torch.full((2, *operands[i].shape[:-1], operands[i].shape[-1] + 3), torch.nan, device=device)
        around[1, ..., 2:-1] = operands[i].detach()
        operands[i] = around[1, ..., 2:-1].requires_grad_(operands[i].requires_grad)
    output, gradients = run(module, operands)
    for got, wanted in zip([output, *gradients], [expected[0], *expected[1]], strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


def test_direct_calls_of_the_gradients_are_checked(device):
    """What autograd hands to the operator always fits; who calls it directly learns what does not."""
    module = AGGREGATION.trained(device)
    with KernelCalls() as calls:
        run(module, operands_of(module, device))
    backward = torch.ops.reimplementation.aggregation_module_backward
    arguments = list(calls.arguments[1])
    backward(*arguments)
    names = [argument.name for argument in backward.default._schema.arguments]
    for place in (0, names.index("features")):  # the output's gradient, and a step of the forward
        for spoiled in (arguments[place][:, :1], arguments[place][..., :8], arguments[place].transpose(1, 2)):
            with pytest.raises(RuntimeError, match="must be|mm|matrix product"):
                backward(*arguments[:place], spoiled, *arguments[place + 1 :])
