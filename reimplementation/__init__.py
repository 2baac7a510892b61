"""Fused deformable sampling for multi-camera perception: the ops, and the modules built on them."""

__version__ = "0.1.0"
