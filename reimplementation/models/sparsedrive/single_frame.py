"""The detector of one frame as a function of tensors: what exporters take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .detector import SparseDrive


class SingleFrame(nn.Module):
    """A detector that looks at every frame as if it were the first, with plain tensors going in and out.

    Args:
        model: the detector; its parameters are shared.
    """

    def __init__(self, model: SparseDrive):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor, projection_mat: Tensor, image_wh: Tensor) -> tuple[Tensor, ...]:
        """The last layer's predictions.

        Args:
            images, projection_mat, image_wh: as `SparseDrive.forward` takes them.

        Returns:
            Box anchors (bs, n, 11), their class logits (bs, n, num_classes) and quality logits (bs, n, 2); with a map
            head also lines (bs, m, 2 * num_points) and their class logits.
        """
        metas = {
            "projection_mat": projection_mat,
            "image_wh": image_wh,
            "timestamp": images.new_zeros(images.shape[0], dtype=torch.float64),
            "T_global": torch.eye(4, dtype=torch.float64, device=images.device).repeat(images.shape[0], 1, 1),
        }
        outputs, _ = self.model.step(images, metas, state=None, every_layer=False)
        det = outputs["det"]
        found: tuple[Tensor, ...] = (det["prediction"][-1], det["classification"][-1], det["quality"][-1])
        if "map" in outputs:
            found += (outputs["map"]["prediction"][-1], outputs["map"]["classification"][-1])
        return found
