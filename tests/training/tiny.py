"""A training that takes a tenth of a second a step."""

from __future__ import annotations

import dataclasses

import torch
import yaml

from reimplementation.models.sparsedrive.config import BankConfig
from reimplementation.training import journal
from reimplementation.training.config import DataConfig, OptimizerConfig, TrainingConfig
from reimplementation.training.processes import Process
from tests.models.sparsedrive.small import BOX_HEAD, CONFIG, MAP_HEAD

MODEL = dataclasses.replace(
    CONFIG,
    num_cams=6,
    embed_dims=16,
    num_heads=2,
    num_groups=2,
    feedforward_dims=16,
    num_levels=2,
    num_depth_levels=2,
    det=dataclasses.replace(BOX_HEAD, num_decoders=2, min_score_for_boxes=0.0),
    map=dataclasses.replace(MAP_HEAD, num_decoders=1, bank=BankConfig(num_anchors=4, num_temp_instances=2)),
)
TINY = TrainingConfig(
    num_steps=4,
    batch_size=2,
    checkpoint_every=100,
    keep_checkpoints=2,
    data=DataConfig(image_wh=(64, 32), num_workers=0, num_drives=3, frames_per_drive=3, num_validation_drives=1),
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
    model=MODEL,
)
ALONE = Process(0, 1, torch.device("cpu"))


ALIKE = dataclasses.replace(  # both halves of a batch are the same frame, so that norms see the same in half of it
    TINY,
    num_steps=3,
    data=dataclasses.replace(TINY.data, num_drives=1, frames_per_drive=1),
    model=dataclasses.replace(TINY.model, dropout=0.0, attn_drop=0.0),
)


def numbers(folder) -> list[dict]:
    """The rows of a journal without what depends on the machine: times and memory."""
    rows = journal.read(folder)
    return [{name: row[name] for name in row if not name.startswith(("seconds", "peak_gb"))} for row in rows]


def written(config: TrainingConfig, path):
    """The path, where the configuration is now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path
