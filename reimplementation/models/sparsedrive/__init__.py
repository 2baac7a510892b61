"""Sparse detectors: SparseDrive's perception and Sparse4Dv3, from images to boxes and map lines."""

from .checkpoint import load_checkpoint
from .config import SparseDriveConfig
from .detector import SparseDrive
from .inference import ReplayedDetector, for_inference
from .instance_bank import TemporalState
from .presets import sparse4d_v3, sparsedrive_small

__all__ = [
    "ReplayedDetector",
    "SparseDrive",
    "SparseDriveConfig",
    "TemporalState",
    "for_inference",
    "load_checkpoint",
    "sparse4d_v3",
    "sparsedrive_small",
]
