"""A ViT in plain PyTorch whose features feed the aggregation."""

from .attention import AttentivePool, CrossAttention, SelfAttention
from .config import ViTConfig
from .dinov3 import dinov3_config, from_dinov3
from .feature_map import ViTFeatureMap
from .features import ViTFeatures
from .head_config import AttentivePoolHeadConfig, HeadConfig, TransposedConv2dHeadConfig, UpsampleHeadConfig
from .heads import AttentivePoolHead, Head, TransposedConv2dHead, UpsampleHead
from .mlp import NormMLP
from .patch_embed import PatchEmbed
from .pos_enc import FourierPositions, LearnedPositions
from .rope import RotaryPositions
from .tokens import apply_mask, create_mask, generate_non_overlapping_mask, unapply_mask
from .transformer import CrossAttentionLayer, DecoderLayer, EncoderLayer
from .vit import ViT

__all__ = [
    "AttentivePool",
    "AttentivePoolHead",
    "AttentivePoolHeadConfig",
    "CrossAttention",
    "CrossAttentionLayer",
    "DecoderLayer",
    "EncoderLayer",
    "FourierPositions",
    "Head",
    "HeadConfig",
    "LearnedPositions",
    "NormMLP",
    "PatchEmbed",
    "RotaryPositions",
    "SelfAttention",
    "TransposedConv2dHead",
    "TransposedConv2dHeadConfig",
    "UpsampleHead",
    "UpsampleHeadConfig",
    "ViT",
    "ViTConfig",
    "ViTFeatureMap",
    "ViTFeatures",
    "apply_mask",
    "create_mask",
    "dinov3_config",
    "from_dinov3",
    "generate_non_overlapping_mask",
    "unapply_mask",
]
