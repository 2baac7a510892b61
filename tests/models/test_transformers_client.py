"""A real client: Hugging Face's Deformable DETR with its attention op replaced by ours. Nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reimplementation.ops import MSDeformAttnFunction
from tests.reference import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="needs the extra `transformers`")

from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig  # noqa: E402
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention  # noqa: E402

TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 17}
CALLS = 4  # encoder and decoder layers of the model below


class FusedAttention(nn.Module):
    """The arguments of transformers' op, less the list of shapes, are Deformable DETR's."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        self.calls += 1
        return MSDeformAttnFunction.apply(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step
        )


def tiny_detector(**settings) -> DeformableDetrForObjectDetection:
    """Random weights: a small ResNet, two encoder and two decoder layers, and offsets that depend on the query."""
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=17,
        num_labels=5,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        **settings,
    )
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def outputs_and_gradients(model, device, dtype):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 96, generator=generator).to(device, dtype)
    mask = torch.ones(2, 64, 96, dtype=torch.long, device=device)
    mask[1, 40:] = 0  # the second image is padded
    model.zero_grad()
    found = model(pixel_values=pixels, pixel_mask=mask)
    outputs = {"logits": found.logits, "pred_boxes": found.pred_boxes}
    sum(output.square().sum() for output in outputs.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{}, TWO_STAGE], ids=["plain", "two-stage"])
def test_deformable_detr(backend_device, dtype, settings):
    model = tiny_detector(**settings).to(backend_device, dtype).eval()
    expected_outputs, expected_gradients = outputs_and_gradients(model, backend_device, dtype)
    fused = FusedAttention()
    for module in list(model.modules()):
        if isinstance(getattr(module, "attn", None), MultiScaleDeformableAttention):
            module.attn = fused
    outputs, gradients = outputs_and_gradients(model, backend_device, dtype)
    assert fused.calls == CALLS

    # Rounding grows through the layers: some hundred times that of one call of the op.
    tolerance = 100 * TOLERANCE[dtype]
    compared = [(name, output, expected_outputs[name]) for name, output in outputs.items()]
    # Some gradients are zero but for rounding, as that of a bias before a normalisation: all are compared together.
    assert gradients.keys() == expected_gradients.keys()
    compared += [("all gradients", joined(gradients), joined(expected_gradients))]
    of_the_op = [name for name in gradients if "sampling_offsets" in name or "value_proj" in name]
    assert len(of_the_op) == 4 * CALLS
    compared += [(name, gradients[name], expected_gradients[name]) for name in of_the_op]
    for name, got, expected in compared:
        error = relative_error(got, expected)
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e} > {tolerance:.0e}"


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
