"""Tiny models of transformers with random weights, one of each that has deformable attention. Nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from torch import nn

HEIGHT, WIDTH = 64, 96
CHANNELS, HEADS = 32, 4


@dataclass(frozen=True)
class Tiny:
    """A model: its class's name, its configuration, what it takes beside pixels, how many modules attend by our op.

    frozen: the names of modules that do not learn. traceable: whether no code of its own reads a tensor on the host,
    which no tracer follows.
    """

    name: str
    model: str
    config: Callable[[], transformers.PreTrainedConfig]
    modules: int
    besides: Callable[[int], dict[str, torch.Tensor]] = lambda batch: {}
    size: tuple[int, int] = (HEIGHT, WIDTH)
    frozen: tuple[str, ...] = ()
    traceable: bool = True

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        """Random weights, of a size that keeps the signal alive through all layers."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.4 / parameter[0].numel() ** 0.5)
            calibrated = copy.deepcopy(model).eval()  # a first call leaves hooks in a model
            norms = [module for module in calibrated.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.train().momentum = 1.0
            if norms:  # they learn what they shall normalise
                calibrated(**self.inputs(torch.float32))
                model.load_state_dict(calibrated.state_dict())
        for name in self.frozen:
            model.get_submodule(name).requires_grad_(False)
        return model.eval()

    def inputs(self, dtype: torch.dtype, batch: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 3, *self.size, generator=generator).to(dtype)
        return {"pixel_values": pixels, **self.besides(batch)}


def resnet():
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def rt_detr_resnet():
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def hgnet(*more_features):
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 32, 48],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 48, 64],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=[*more_features, "stage2", "stage3", "stage4"],
    )


def swin(*out_features):
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=list(out_features),
    )


def bert():
    return transformers.BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )


def deformable_detr(**settings):
    return transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet(),
        d_model=CHANNELS,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=17,
        num_labels=5,
        **settings,
    )


REAL_TIME = {
    "encoder_hidden_dim": CHANNELS,
    "d_model": CHANNELS,
    "decoder_in_channels": [CHANNELS] * 3,
    "feat_strides": [8, 16, 32],
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": HEADS,
    "num_queries": 17,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": HEADS,
    "num_labels": 5,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
}


def rt_detr():
    return transformers.RTDetrConfig(backbone_config=rt_detr_resnet(), encoder_in_channels=[16, 32, 64], **REAL_TIME)


def rt_detr_v2(**settings):
    return transformers.RTDetrV2Config(
        backbone_config=rt_detr_resnet(), encoder_in_channels=[16, 32, 64], decoder_n_points=4, **REAL_TIME, **settings
    )


def d_fine(**settings):
    return transformers.DFineConfig(
        backbone_config=hgnet(),
        encoder_in_channels=[32, 48, 64],
        depth_mult=0.34,
        decoder_n_points=[3, 6, 3],
        **REAL_TIME,
        **settings,
    )


def deimv2():
    return transformers.Deimv2Config(
        backbone_config=hgnet(),
        encoder_in_channels=[32, 48, 64],
        decoder_n_points=[4, 2, 4],
        depth_mult=0.34,
        **REAL_TIME,
    )


GROUNDING = {
    "d_model": CHANNELS,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 17,
    "max_text_len": 8,
}


def grounding_dino():
    return transformers.GroundingDinoConfig(
        backbone_config=swin("stage2", "stage3", "stage4"), text_config=bert(), **GROUNDING
    )


def mm_grounding_dino():
    return transformers.MMGroundingDinoConfig(
        backbone_config=swin("stage2", "stage3", "stage4"), text_config=bert(), **GROUNDING
    )


def lw_detr():
    return transformers.LwDetrConfig(
        backbone_config=transformers.LwDetrViTConfig(
            image_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            patch_size=16,
            num_windows=4,
            window_block_indices=[0],
            out_indices=[1, 2],
        ),
        projector_scale_factors=[2.0, 0.5],
        d_model=CHANNELS,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_self_attention_heads=HEADS,
        decoder_cross_attention_heads=HEADS,
        decoder_n_points=2,
        num_queries=17,
        group_detr=1,
        num_labels=5,
    )


def rf_detr():
    return transformers.RfDetrConfig(
        backbone_config=transformers.RfDetrDinov2Config(
            image_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=16,
            num_windows=1,
            out_indices=[1, 2],
        ),
        d_model=CHANNELS,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_self_attention_heads=HEADS,
        decoder_cross_attention_heads=HEADS,
        decoder_n_points=2,
        num_queries=9,
        group_detr=1,
        num_labels=5,
    )


def pp_doclayout_v2():
    return transformers.PPDocLayoutV2Config(
        backbone_config=hgnet(),
        encoder_in_channels=[32, 48, 64],
        class_thresholds=[0.5] * 5,
        class_order=list(range(5)),
        **REAL_TIME,
    )


def pp_doclayout_v3():
    return transformers.PPDocLayoutV3Config(
        backbone_config=hgnet("stage1"), encoder_in_channels=[32, 48, 64], x4_feat_dim=16, **REAL_TIME
    )


def pp_doclayout_v4():
    return transformers.PPDocLayoutV4Config(backbone_config=hgnet(), encoder_in_channels=[32, 48, 64], **REAL_TIME)


def omdet_turbo():
    return transformers.OmDetTurboConfig(
        backbone_config=swin("stage2", "stage3", "stage4"),
        use_timm_backbone=False,
        backbone=None,
        text_config=transformers.CLIPTextConfig(
            bos_token_id=1,
            eos_token_id=2,
            vocab_size=20,
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=48,
        text_projection_out_dim=48,
        class_embed_dim=48,
        task_encoder_hidden_dim=48,
        encoder_hidden_dim=CHANNELS,
        decoder_hidden_dim=CHANNELS,
        vision_features_channels=[CHANNELS] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_dim_feedforward=48,
        decoder_dim_feedforward=48,
        encoder_attention_heads=HEADS,
        decoder_num_heads=HEADS,
        decoder_num_layers=2,
        num_queries=17,
        image_size=64,
    )


def mask2former():
    return transformers.Mask2FormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        feature_size=CHANNELS,
        mask_feature_size=CHANNELS,
        hidden_dim=CHANNELS,
        encoder_feedforward_dim=48,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=HEADS,
        dim_feedforward=48,
        num_queries=7,
        num_labels=5,
    )


def oneformer():
    return transformers.OneFormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        is_training=False,
        conv_dim=CHANNELS,
        mask_dim=CHANNELS,
        hidden_dim=CHANNELS,
        encoder_feedforward_dim=48,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=HEADS,
        dim_feedforward=48,
        num_queries=7,
        task_seq_len=7,
        text_encoder_width=32,
        text_encoder_vocab_size=20,
    )


def text(batch: int):
    return {"input_ids": torch.tensor([[1, 5, 6, 3, 7, 3, 2]] * batch)}


def classes_and_tasks(batch: int):
    words = torch.tensor([[1, 5, 6, 2]])
    return {
        "classes_input_ids": words.repeat(2 * batch, 1),
        "classes_attention_mask": torch.ones(2 * batch, 4, dtype=torch.long),
        "tasks_input_ids": words.repeat(batch, 1),
        "tasks_attention_mask": torch.ones(batch, 4, dtype=torch.long),
        "classes_structure": torch.full((batch,), 2),
    }


def task(batch: int):
    return {"task_inputs": torch.ones(batch, 7)}


EVERY_MODEL = (
    Tiny("deformable_detr", "DeformableDetrForObjectDetection", deformable_detr, 4),
    Tiny(
        "deformable_detr-two-stage",
        "DeformableDetrForObjectDetection",
        lambda: deformable_detr(with_box_refine=True, two_stage=True, two_stage_num_proposals=17),
        4,
    ),
    Tiny("rt_detr", "RTDetrForObjectDetection", rt_detr, 2),
    Tiny("rt_detr_v2", "RTDetrV2ForObjectDetection", rt_detr_v2, 2),
    Tiny("rt_detr_v2-discrete", "RTDetrV2ForObjectDetection", lambda: rt_detr_v2(decoder_method="discrete"), 2),
    Tiny("d_fine", "DFineForObjectDetection", d_fine, 2),
    Tiny("deimv2", "Deimv2ForObjectDetection", deimv2, 2),
    Tiny("grounding_dino", "GroundingDinoForObjectDetection", grounding_dino, 4, text),
    Tiny("mm_grounding_dino", "MMGroundingDinoForObjectDetection", mm_grounding_dino, 4, text),
    Tiny(
        "omdet_turbo",
        "OmDetTurboForObjectDetection",
        omdet_turbo,
        2,
        classes_and_tasks,
        size=(64, 64),
        frozen=("language_backbone",),  # the model keeps what it makes of a text, also from one step to the next
        traceable=False,
    ),
    Tiny("lw_detr", "LwDetrForObjectDetection", lw_detr, 2, size=(64, 64)),
    Tiny("rf_detr", "RfDetrForObjectDetection", rf_detr, 2, size=(64, 64)),
    Tiny("pp_doclayout_v2", "PPDocLayoutV2ForObjectDetection", pp_doclayout_v2, 2),
    Tiny("pp_doclayout_v3", "PPDocLayoutV3ForObjectDetection", pp_doclayout_v3, 2),
    Tiny("mask2former", "Mask2FormerForUniversalSegmentation", mask2former, 2),
    Tiny("oneformer", "OneFormerForUniversalSegmentation", oneformer, 2, task, traceable=False),
    Tiny("pp_doclayout_v4", "PPDocLayoutV4ForObjectDetection", pp_doclayout_v4, 2),
)
MODELS = tuple(tiny for tiny in EVERY_MODEL if hasattr(transformers, tiny.model))
"""Those that the installed version has."""


@lru_cache
def _built(tiny: Tiny) -> nn.Module:
    return tiny.build()


def model_of(tiny: Tiny, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(_built(tiny)).to(dtype)


def outputs_of(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """The outputs that are numbers, with zeros in place of infinities, by which models mask what does not count."""
    found = model(**inputs)
    return {
        name: value.masked_fill(~value.isfinite(), 0)
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
