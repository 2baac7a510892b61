"""The public models by name."""

from __future__ import annotations

from reimplementation.models.backbones.vit.config import ViTConfig

from .config import BoxHeadConfig, DenoisingConfig, SparseDriveConfig
from .detector import SparseDrive


def sparsedrive_small(stage: int = 1, backbone: ViTConfig | None = None) -> SparseDrive:
    """SparseDrive-S (arXiv 2405.19620): ResNet-50, 900 boxes and 100 map lines, random weights.

    Args:
        backbone: a ViT with patches of 16 pixels, in the ResNet's place.
        stage: 1, detection and map. Stage 2 adds a motion planner, which is not part of this package.

    Raises:
        ValueError: another stage.
    """
    if stage != 1:
        raise ValueError(
            f"stage must be 1, detection and map; the motion planner of stage 2 is not here; got {stage!r}"
        )
    return SparseDrive(SparseDriveConfig(backbone=backbone))


def sparse4d_v3() -> SparseDrive:
    """Sparse4Dv3 (arXiv 2311.11722) with a ResNet-50: 900 boxes, denoising in training, random weights."""
    return SparseDrive(
        SparseDriveConfig(
            family="sparse4d",
            det=BoxHeadConfig(denoising=DenoisingConfig(num_groups=5, num_temp_groups=3)),
            map=None,
        )
    )
