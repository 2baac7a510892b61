"""The models that are timed: real sizes, random weights, and nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 12  # of a text beside the image


@dataclass(frozen=True)
class ClientModel:
    """A model of transformers.

    model: the name of its class. config: makes its configuration, from the package. size: (height, width) of its
    images. besides: what it takes beside them, by name, for a batch. frozen: the names of modules that do not learn.
    """

    model: str
    config: Callable[[Any], Any]
    size: tuple[int, int]
    besides: Callable[[int], dict[str, Tensor]] = lambda batch: {}
    frozen: tuple[str, ...] = ()

    def build(self, device: torch.device) -> nn.Module:
        import transformers

        config = self.config(transformers)
        with torch.random.fork_rng(), device:  # random weights take a CPU longer than all that is timed
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).to(device)
        for name in self.frozen:
            model.get_submodule(name).requires_grad_(False)
        return model

    def inputs(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, *self.size, generator=generator)
        return {name: value.to(device) for name, value in {"pixel_values": images, **self.besides(batch)}.items()}


def _text(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, WORDS + 1).repeat(batch, 1)}


def _task(batch: int) -> dict[str, Tensor]:
    return {"task_inputs": torch.ones(batch, 77)}


def _classes(batch: int) -> dict[str, Tensor]:
    words = torch.arange(1, WORDS + 1).repeat(batch, 1)
    every = torch.ones_like(words)
    return {
        "classes_input_ids": words,
        "classes_attention_mask": every,
        "tasks_input_ids": words,
        "tasks_attention_mask": every,
        "classes_structure": torch.ones(batch, dtype=torch.long),
    }


def _resnet50(transformers: Any) -> Any:
    return transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])


def _deformable_detr(transformers: Any, **settings: Any) -> Any:
    return transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet50(transformers),
        **settings,
    )


def _resnet18(transformers: Any) -> dict[str, Any]:
    """A backbone of RT-DETR with 18 layers, and what goes with it."""
    backbone = transformers.RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        "backbone_config": backbone,
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
    }


def _swin_tiny(transformers: Any, first_stage: int) -> Any:
    stages = [f"stage{number}" for number in range(first_stage, 5)]
    return transformers.SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages)


def _mask2former(transformers: Any) -> Any:
    return transformers.Mask2FormerConfig(backbone_config=_swin_tiny(transformers, first_stage=1))


def _omdet_turbo(transformers: Any) -> Any:
    return transformers.OmDetTurboConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=_swin_tiny(transformers, first_stage=2),
        apply_layernorm_after_vision_backbone=False,
    )


def _lw_detr(transformers: Any) -> Any:
    backbone = transformers.LwDetrViTConfig(
        image_size=640,
        hidden_size=384,
        num_hidden_layers=10,
        num_attention_heads=12,
        window_block_indices=[0, 1, 3, 6, 7, 9],
        out_indices=[2, 4, 5, 9],
    )
    return transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[2.0, 0.5], d_model=384)


LANDSCAPE, SQUARE = (800, 1066), (640, 640)
MODELS = {
    "deformable_detr": ClientModel("DeformableDetrForObjectDetection", _deformable_detr, LANDSCAPE),
    "grounding_dino": ClientModel(
        "GroundingDinoForObjectDetection", lambda t: t.GroundingDinoConfig(), LANDSCAPE, _text
    ),
    "mask2former": ClientModel("Mask2FormerForUniversalSegmentation", _mask2former, LANDSCAPE),
    "oneformer": ClientModel(
        "OneFormerForUniversalSegmentation", lambda t: t.OneFormerConfig(is_training=False), (512, 512), _task
    ),
    "d_fine_l": ClientModel("DFineForObjectDetection", lambda t: t.DFineConfig(), SQUARE),
    "rt_detr_r50": ClientModel("RTDetrForObjectDetection", lambda t: t.RTDetrConfig(), SQUARE),
    "deimv2": ClientModel("Deimv2ForObjectDetection", lambda t: t.Deimv2Config(), SQUARE),
    "rt_detr_v2_r18": ClientModel("RTDetrV2ForObjectDetection", lambda t: t.RTDetrV2Config(**_resnet18(t)), SQUARE),
    "lw_detr": ClientModel("LwDetrForObjectDetection", _lw_detr, SQUARE),
    "rf_detr": ClientModel("RfDetrForObjectDetection", lambda t: t.RfDetrConfig(), (560, 560)),
    "omdet_turbo": ClientModel(
        "OmDetTurboForObjectDetection",
        _omdet_turbo,
        SQUARE,
        _classes,
        frozen=("language_backbone",),  # it keeps what it makes of a text, also from one step to the next
    ),
    "mm_grounding_dino": ClientModel(
        "MMGroundingDinoForObjectDetection", lambda t: t.MMGroundingDinoConfig(), LANDSCAPE, _text
    ),
    "pp_doclayout_v2": ClientModel(
        "PPDocLayoutV2ForObjectDetection",
        lambda t: t.PPDocLayoutV2Config(num_labels=20, class_thresholds=[0.5] * 20, class_order=list(range(20))),
        (800, 800),
    ),
    "pp_doclayout_v3": ClientModel("PPDocLayoutV3ForObjectDetection", lambda t: t.PPDocLayoutV3Config(), (800, 800)),
    "pp_doclayout_v4": ClientModel("PPDocLayoutV4ForObjectDetection", lambda t: t.PPDocLayoutV4Config(), (800, 800)),
    "deformable_detr_two_stage": ClientModel(
        "DeformableDetrForObjectDetection",
        lambda transformers: _deformable_detr(transformers, with_box_refine=True, two_stage=True),
        LANDSCAPE,
    ),
    "rt_detr_r18": ClientModel("RTDetrForObjectDetection", lambda t: t.RTDetrConfig(**_resnet18(t)), SQUARE),
}
"""Those that gain most come first, then those that are used most."""


def versions() -> dict[str, str]:
    """The version of the package that the models are from.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import transformers  # noqa: F401

    return {"transformers": metadata.version("transformers")}
