"""What is asked of kernels that could add in any order."""

from __future__ import annotations

import torch


def must_be_deterministic() -> bool:
    """Whether PyTorch is asked for the same bits every time."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
