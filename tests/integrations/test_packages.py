"""Attention modules of other packages on our ops. Each package is skipped where it is not installed."""

from __future__ import annotations

import copy

import pytest
import torch

from reimplementation.integrations import accelerate
from reimplementation.integrations.libreyolo import empty_slot, fill_slot
from reimplementation.integrations.probe import Probe
from tests.integrations.stand_ins import import_or_skip
from tests.ops.agreement import KernelCalls
from tests.reference import TOLERANCE, relative_error

CHANNELS, HEADS, LEVELS = 32, 4, 3
MODULES = {
    "ultralytics": ("ultralytics.nn.modules.transformer", "MSDeformAttn", (CHANNELS, LEVELS, HEADS, 2), {}),
    "rfdetr": ("rfdetr.models.ops.modules.ms_deform_attn", "MSDeformAttn", (CHANNELS, LEVELS, HEADS, 2), {}),
    "groundingdino": (
        "groundingdino.models.GroundingDINO.ms_deform_attn",
        "MultiScaleDeformableAttention",
        (CHANNELS, HEADS, LEVELS, 2),
        {},
    ),
    "groundingdino batch first": (
        "groundingdino.models.GroundingDINO.ms_deform_attn",
        "MultiScaleDeformableAttention",
        (CHANNELS, HEADS, LEVELS, 2),
        {"batch_first": True},
    ),
    "mmcv": ("mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttention", (CHANNELS, HEADS, LEVELS, 2), {}),
    "mmcv ratio": (
        "mmcv.ops.multi_scale_deform_attn",
        "MultiScaleDeformableAttention",
        (CHANNELS, HEADS, LEVELS, 2),
        {"value_proj_ratio": 0.5, "batch_first": True},
    ),
    "dfine": ("dfine.backends.native.dfine_decoder", "MSDeformableAttention", (CHANNELS, HEADS, LEVELS, [3, 6, 3]), {}),
    "dfine discrete": (
        "dfine.backends.native.dfine_decoder",
        "MSDeformableAttention",
        (CHANNELS, HEADS, LEVELS, [4, 2, 4]),
        {"method": "discrete"},
    ),
    "libreyolo D-FINE": (
        "libreyolo.models.dfine.decoder",
        "MSDeformableAttention",
        (CHANNELS, HEADS, LEVELS, [3, 6, 3]),
        {},
    ),
    "libreyolo D-FINE discrete": (
        "libreyolo.models.dfine.decoder",
        "MSDeformableAttention",
        (CHANNELS, HEADS, LEVELS, [3, 6, 3]),
        {"method": "discrete"},
    ),
    "libreyolo DEIM": (
        "libreyolo.models.deim.decoder",
        "MSDeformableAttention",
        (CHANNELS, HEADS, LEVELS, [4, 2, 4]),
        {},
    ),
    "libreyolo RT-DETRv2": (
        "libreyolo.models.rtdetrv2.decoder",
        "MSDeformableAttention",
        (CHANNELS, HEADS, LEVELS, 4),
        {"method": "discrete"},
    ),
    "libreyolo RT-DETR": ("libreyolo.models.rtdetr.nn", "MSDeformableAttention", (CHANNELS, HEADS, LEVELS, 4), {}),
    "libreyolo Deformable DETR": (
        "libreyolo.models.deformable_detr.ms_deform_attn",
        "MSDeformAttn",
        (CHANNELS, LEVELS, HEADS, 2),
        {},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module(name, dtype):
    path, class_name, arguments, settings = MODULES[name]
    original = getattr(import_or_skip(path), class_name)(*arguments, **settings).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in original.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 4
    ours = copy.deepcopy(original)
    (replaced,) = accelerate(ours).replaced
    assert replaced.unchecked is None
    for given in replaced.kind.probes(original, Probe()):
        given = torch.utils._pytree.tree_map(
            lambda value: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value,
            given,
        )
        expected = results_of(original, given)
        with KernelCalls() as calls:
            got = results_of(ours, given)
        assert not calls.names or (len(calls.names) == 2 and calls.names[0].startswith("ms_deform_attn"))
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) <= 10 * TOLERANCE[dtype]


def results_of(module, given) -> list[torch.Tensor]:
    """The output, and all gradients as one vector: some are zero but for rounding."""
    module.zero_grad()
    output = module(**given)
    output.square().sum().backward()
    return [output.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])]


def test_ultralytics_rt_detr():
    tasks = import_or_skip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    model = tasks.RTDETRDetectionModel("rtdetr-resnet50.yaml", nc=5, verbose=False).eval()
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = model(images)[0]
        assert len(accelerate(model).replaced) == 6
        with KernelCalls() as calls:
            got = model(images)[0]
    assert len(calls.names) in (0, 6)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_rfdetr_exports():
    """The package's own switch to the arguments that an exporter can follow."""
    module = import_or_skip("rfdetr.models.ops.modules.ms_deform_attn").MSDeformAttn(CHANNELS, LEVELS, HEADS, 2).eval()
    (replaced,) = accelerate(module).replaced
    module.export()
    probe = Probe()
    given = next(iter(replaced.kind.probes(module, probe)))
    given = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
    given["input_spatial_shapes_hw"] = probe.shapes(LEVELS)
    program = torch.export.export(module, (), given)
    torch.testing.assert_close(program.module()(**given), module(**given))


def test_the_slot_of_libreyolo():
    """LW-DETR's core, of whose value (N, heads, channels, rows) the slot gets a transposed view."""
    core = import_or_skip("libreyolo.models.lwdetr.nn").ms_deform_attn_core_pytorch
    probe = Probe()
    shapes = probe.shapes(LEVELS)
    value = probe.rows(LEVELS, HEADS, 8).permute(0, 2, 3, 1).contiguous()
    samples = (value.shape[0], 5, HEADS, LEVELS, 2)
    given = value, shapes, probe.uniform(*samples, 2) * 1.4 - 0.2, probe.normal(*samples).flatten(3)
    expected = core(*given)
    fill_slot()
    try:
        with KernelCalls() as calls:
            got = core(*given)
    finally:
        empty_slot()
    assert not calls.names or calls.names == ["ms_deform_attn"]
    assert relative_error(got, expected) <= TOLERANCE[torch.float64]
    with KernelCalls() as calls:
        assert torch.equal(core(*given), expected)
    assert not calls.names


def test_the_door_that_transformers_has_for_kernels():
    kernels = pytest.importorskip("kernels", reason="needs the package kernels")
    import_or_skip("transformers", "5")
    from reimplementation.integrations.hub_kernels import kernel_mapping
    from tests.integrations.tiny import MODELS

    tiny = MODELS[0]
    model, inputs = tiny.build(), tiny.inputs(torch.float32)
    with torch.no_grad():
        expected = model(**inputs).logits
        with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
        with KernelCalls() as calls:
            got = model(**inputs).logits
    assert not calls.names or calls.names == ["ms_deform_attn"] * tiny.modules
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
