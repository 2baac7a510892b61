"""Which packages and repositories the integrations know, and with which versions they were tested."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from . import detr, mmcv, rtdetr, sparse4d, transformers
from .replacement import Accelerated

KINDS: tuple[type[Accelerated], ...] = (
    transformers.RTDetrV2,
    transformers.DFine,
    transformers.Detector,
    transformers.Mask2FormerPixelDecoder,
    transformers.OneFormerPixelDecoder,
    transformers.OneFormerPixelDecoderWithList,
    transformers.Core,
    detr.DeformableDetr,
    detr.RFDetr,
    detr.Ultralytics,
    rtdetr.RTDetr,
    rtdetr.RTDetrV2,
    rtdetr.RTDetrV2InBounds,
    rtdetr.DFine,
    rtdetr.DFineInBounds,
    mmcv.GroundingDino,
    mmcv.Mmcv,
    sparse4d.SparseAggregation,
)
"""Every form of a module that is known; where several fit, the first that computes the same as the original."""


@dataclass(frozen=True)
class Client:
    """A package, the versions that were tested, and what of it is known."""

    package: str
    tested: tuple[str, ...]
    models: str

    @property
    def installed(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


PACKAGES = (
    Client(
        "transformers",
        ("5.17.0", "5.24.0"),
        "Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, Grounding DINO, MM Grounding DINO, OmDet-Turbo, LW-DETR, "
        "RF-DETR, PP-DocLayoutV2, PP-DocLayoutV3, PP-DocLayoutV4, Mask2Former, OneFormer",
    ),
    Client("ultralytics", ("8.4.190",), "RT-DETR"),
    Client("rfdetr", ("1.11.2",), "RF-DETR"),
    Client("mmcv-lite", ("2.2.0",), "MultiScaleDeformableAttention"),
    Client("onedl-mmcv", ("2.3.6",), "MultiScaleDeformableAttention"),
    Client("groundingdino-py", ("0.4.0",), "Grounding DINO"),
    Client("pydfine", ("0.2.1",), "D-FINE"),
    Client("libreyolo", ("1.6.0",), "D-FINE, DEIM, RT-DETR, RT-DETRv2, Deformable DETR"),
)
REPOSITORIES = (
    "Deformable DETR, DINO, Mask2Former and DINOv3: MSDeformAttn",
    "RT-DETR, RT-DETRv2, D-FINE and DEIM: MSDeformableAttention",
    "SparseDrive and Sparse4D: DeformableFeatureAggregation",
)


def tested_versions() -> dict[str, str]:
    """{package: the versions that were tested, as text}."""
    return {client.package: " and ".join(client.tested) for client in PACKAGES}
