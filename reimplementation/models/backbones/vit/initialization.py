"""Fresh weights: truncated normal, as ViTs have them, and residual branches that begin at zero."""

from __future__ import annotations

from torch import Tensor, nn

STD = 0.02


def truncated_normal_(weight: Tensor) -> None:
    """Normal with a standard deviation of 0.02, cut at two deviations."""
    nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)


def init_layers(*layers: nn.Linear | nn.Conv2d | nn.Conv3d) -> None:
    """Truncated normal weights, biases of zero."""
    for layer in layers:
        truncated_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def zero_layers(*layers: nn.Linear) -> None:
    """Weights and biases of zero: a residual branch that ends in such a layer leaves its input as it is."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def wake_branches(model: nn.Module) -> None:
    """Give every linear layer random weights, those of zeros too, so that the model's layers are not the identity.

    What runs or checks a model without trained weights would see nothing of its layers otherwise.
    """
    init_layers(*(module for module in model.modules() if isinstance(module, nn.Linear)))
