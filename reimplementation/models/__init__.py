"""Modules built on the ops."""

from .ms_deform_attn import MSDeformAttn

__all__ = ["MSDeformAttn"]
