"""What a training is put together from: its frames, and its detector as it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reimplementation.models.sparsedrive import SparseDrive

from .anchors import clustered
from .batches import Frames, HeldOutFrames
from .config import TrainingConfig
from .file_frames import FileTraining, FrameReader, HeldOutFiles
from .processes import Process
from .recordings import Recordings
from .synthetic_frames import HeldOutDrives, training_drives


def training_frames(config: TrainingConfig, data: Path | None, slots: Sequence[int], device: torch.device) -> Frames:
    """What to learn from, for some slots of a batch: a folder's frames, or synthetic drives."""
    if data is None:
        return training_drives(config.data, config.model, device, slots, config.batch_size)
    return FileTraining(_reader(config, data), slots, config.batch_size, device)


def held_out_frames(config: TrainingConfig, data: Path | None, device: torch.device) -> HeldOutFrames:
    """What a detector of this training is judged by: a folder's frames, or drives."""
    if data is None:
        return HeldOutDrives(config.data, config.model, device)
    return HeldOutFiles(_reader(config, data), device)


@torch.no_grad()
def new_model(config: TrainingConfig, frames: Frames | None) -> SparseDrive:
    """The detector as a training begins with it, the same in every process.

    Args:
        config: of the training.
        frames: where boxes are, for anchors that are to start there; None: parameters will be loaded anyway.
    """
    torch.manual_seed(config.seed)
    model = SparseDrive(config.model)
    if frames is not None and config.anchors == "clusters":
        anchor = model.heads["det"].instance_bank.anchor
        anchor.copy_(clustered(anchor, frames.boxes(), config.model.det, config.seed))
    return model


def compile_parts(model: SparseDrive, parts: Sequence[str]) -> None:
    """Let `torch.compile` take some parts of a model."""
    modules = {"images": (model.img_backbone, model.img_neck), "heads": tuple(model.heads.values())}
    for module in (module for part in parts for module in modules[part]):
        module.compile()


def share_norms(model: SparseDrive, process: Process) -> None:
    """Let the backbone's norms see all of the batch, where GPUs share it."""
    if process.world_size > 1 and process.device.type == "cuda":
        model.img_backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.img_backbone)


def distributed(model: SparseDrive, process: Process) -> nn.Module:
    """The model, whose gradients become the mean over all processes while the backward goes on."""
    if process.world_size == 1:
        return model
    # A detector of fewer levels than a ResNet has stages leaves the last stages without gradients.
    backbone: Any = model.img_backbone
    is_cut = model.config.backbone is None and model.config.num_levels < len(backbone.out_channels)
    settings: dict = {"find_unused_parameters": is_cut}
    if process.device.type == "cuda":
        settings["device_ids"] = [process.device.index]
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)


def _reader(config: TrainingConfig, data: Path) -> FrameReader:
    return FrameReader(Recordings(data), config.data, config.model, config.seed)
