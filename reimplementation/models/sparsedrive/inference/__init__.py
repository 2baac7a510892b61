"""A detector's form for inference: the same function of images, in fewer kernels and in one dtype."""

from .form import for_inference
from .replay import ReplayedDetector

__all__ = ["ReplayedDetector", "for_inference"]
