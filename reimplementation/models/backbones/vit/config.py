"""What a ViT is made of: one frozen dataclass, and its plain YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reimplementation.ops.dtypes import name_of

from .activations import ACTIVATIONS, is_glu
from .head_config import HEAD_TYPES, HeadSettings
from .settings import check_choice, check_fields, check_range, from_mapping, shown

if TYPE_CHECKING:
    from .vit import ViT

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
POSITION_ENCODINGS = ("rope", "fourier", "learnable", "none")
NORM_TYPES = ("rmsnorm", "layernorm")
ROPE_COORDINATES = ("min", "max", "separate")
POSITIVE = ("in_channels", "depth", "hidden_size", "ffn_hidden_size", "num_attention_heads")
RATES = ("hidden_dropout", "attention_dropout", "drop_path_rate")
TYPE = "ViT"  # of a configuration in YAML


@dataclass(frozen=True)
class ViTConfig:
    """The settings of a `ViT`.

    Attributes:
        in_channels: of the input.
        patch_size: pixels of a patch along each axis: (height, width), or (depth, height, width) for volumes.
        img_size: pixels of the usual input, likewise; multiples of the patch. Other sizes may be given to the model.
        depth: number of transformer layers.
        hidden_size: channels of a token.
        ffn_hidden_size: channels between an MLP's two linear layers; a GLU has twice as many before its product.
        num_attention_heads: divides ``hidden_size``.
        hidden_dropout: of the attention's output, inside the MLP and of its output.
        attention_dropout: of the attention weights.
        attention_bias, mlp_bias: whether those linear layers have biases.
        activation: relu, silu, gelu, srelu (the square of relu), or of a GLU: reglu, swiglu, geglu, openswiglu.
        drop_path_rate: share of the samples that skip a branch in training, in every layer alike.
        num_register_tokens, num_cls_tokens: learned tokens before the patches.
        pos_enc: rope, fourier, learnable or none.
        layer_scale: the initial factor of each branch (arXiv 2103.17239); None: no such factor.
        glu_limit, glu_extra_bias: see `activations.gated`.
        rope_normalize_coords: what divides a position: its own axis' length ("separate"), or the longer ("max") or
            shorter ("min") side for both axes.
        rope_base: ratio of the longest to the shortest period, nearly.
        rope_shift_coords, rope_jitter_coords, rope_rescale_coords: augmentation in training, see `RotaryPositions`.
        mlp_requires_grad, self_attention_requires_grad: False freezes those parts of every layer.
        activation_checkpointing: recompute each layer in the backward instead of keeping what it held.
        dtype: of the weights. Positions are computed in float32 whatever it is.
        norm_type: rmsnorm or layernorm.
        qk_normalization: normalise queries and keys, head by head.
        patch_embed_normalization: normalise the embedded patches.
        heads: by name; instances of `HeadConfig`, `AttentivePoolHeadConfig`, `TransposedConv2dHeadConfig`,
            `UpsampleHeadConfig`.

    Raises:
        ValueError: a setting is out of its range, does not go with another, or would have no effect.
        TypeError: a setting is of another type.
    """

    in_channels: int
    patch_size: Sequence[int]
    img_size: Sequence[int]
    depth: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention_bias: bool = True
    mlp_bias: bool = True
    activation: str = "srelu"
    drop_path_rate: float = 0.0
    num_register_tokens: int = 0
    num_cls_tokens: int = 0
    pos_enc: str = "rope"
    layer_scale: float | None = None
    glu_limit: float | None = None
    glu_extra_bias: float | None = None
    rope_normalize_coords: str = "separate"
    rope_base: float = 100.0
    rope_shift_coords: float | None = None
    rope_jitter_coords: float | None = None
    rope_rescale_coords: float | None = None
    mlp_requires_grad: bool = True
    self_attention_requires_grad: bool = True
    activation_checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    norm_type: str = "rmsnorm"
    qk_normalization: bool = False
    patch_embed_normalization: bool = False
    heads: Mapping[str, HeadSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in DTYPES.values():
            raise TypeError(f"dtype must be one of torch's {', '.join(DTYPES)}; got {shown(self.dtype)}")
        check_choice("activation", self.activation, list(ACTIVATIONS))
        check_choice("pos_enc", self.pos_enc, POSITION_ENCODINGS)
        check_choice("rope_normalize_coords", self.rope_normalize_coords, ROPE_COORDINATES)
        check_choice("norm_type", self.norm_type, NORM_TYPES)
        _check_sizes(self)
        _check_positions(self)
        _check_numbers(self)
        _check_heads(self)

    @property
    def tokenized_size(self) -> tuple[int, ...]:
        """Patches along each axis of an input of ``img_size``."""
        return tuple(side // patch for side, patch in zip(self.img_size, self.patch_size))

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_cls_tokens + self.num_register_tokens

    @property
    def sequence_length(self) -> int:
        """Tokens of an input of ``img_size``, the prefix included."""
        return self.num_prefix_tokens + math.prod(self.tokenized_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def replace(self, **changes: Any) -> ViTConfig:
        """A copy with other values of some fields."""
        return replace(self, **changes)

    def instantiate(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ViT:
        """The model with fresh weights, of ``dtype`` if that is given."""
        from .vit import ViT

        return ViT(self, device=device, dtype=dtype)

    @classmethod
    def from_dict(cls, mapping: Any, where: str = "the configuration") -> ViTConfig:
        """A configuration from plain values, as YAML or JSON has them.

        ``dtype`` is a name, each head a mapping with its class under ``type``. A ``type`` beside the fields may be
        there and must be "ViT".

        Raises:
            ValueError, TypeError: as of the class; or a key is unknown or missing. The message begins with ``where``.
        """
        if isinstance(mapping, Mapping):
            mapping = dict(mapping)
            if (kind := mapping.pop("type", TYPE)) != TYPE:
                raise ValueError(f"{where}: type must be {TYPE}; got {shown(kind)}")
            if isinstance(dtype := mapping.get("dtype"), str):
                check_choice(f"{where}: dtype", dtype, list(DTYPES))
                mapping["dtype"] = DTYPES[dtype]
            if "heads" in mapping:
                mapping["heads"] = _heads_from_dict(mapping["heads"], f"{where}: heads")
        return _named(where, lambda: from_mapping(cls, mapping, where))

    def to_dict(self) -> dict[str, Any]:
        """Plain values of the fields that differ from their defaults, as `from_dict` reads them."""
        values = {"type": TYPE, **_changed_fields(self)}
        if "dtype" in values:
            values["dtype"] = name_of(self.dtype)
        if self.heads:
            values["heads"] = {
                name: {"type": head.type_name, **_changed_fields(head)} for name, head in self.heads.items()
            }
        return values

    @classmethod
    def from_yaml(cls, source: str | Path) -> ViTConfig:
        """A configuration from a YAML file, or from YAML itself: a text of more than one line.

        Only plain YAML is read, as `yaml.safe_load` does: a tag that names a Python object is an error.

        Raises:
            ValueError, TypeError: it is no YAML, or as of `from_dict`.
            OSError: the file cannot be read.
            ModuleNotFoundError: PyYAML is missing, which the extra ``config`` brings.
        """
        import yaml

        is_text = isinstance(source, str) and "\n" in source
        where = "the YAML" if is_text else str(source)
        try:
            mapping = yaml.safe_load(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not plain YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(mapping, where)

    def to_yaml(self) -> str:
        """Plain YAML, which `from_yaml` reads."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_sizes(config: ViTConfig) -> None:
    for name in POSITIVE:
        check_range(name, getattr(config, name), 1)
    for name in ("num_register_tokens", "num_cls_tokens"):
        check_range(name, getattr(config, name), 0)
    patch, image = config.patch_size, config.img_size
    if len(patch) not in (2, 3) or len(patch) != len(image):
        raise ValueError(
            f"patch_size and img_size must both have two axes, or three; got {list(patch)} and {list(image)}"
        )
    if min(*patch, *image) < 1 or any(side % size for side, size in zip(image, patch)):
        raise ValueError(
            f"img_size must be a positive multiple of patch_size along every axis; got {list(image)} and {list(patch)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads={config.num_attention_heads}; "
            f"got {config.hidden_size}"
        )


def _check_positions(config: ViTConfig) -> None:
    if config.pos_enc == "rope":
        if len(config.patch_size) != 2:
            raise ValueError("pos_enc rope has two axes; for volumes take fourier, learnable or none")
        if config.head_dim % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 * num_attention_heads={4 * config.num_attention_heads} for "
                f"pos_enc rope; got {config.hidden_size}"
            )
    if config.pos_enc in ("fourier", "learnable") and config.hidden_size % 2:
        raise ValueError(f"hidden_size must be even for pos_enc {config.pos_enc}; got {config.hidden_size}")
    check_range("rope_base", config.rope_base, 1)
    for name, least in (("rope_shift_coords", 0), ("rope_jitter_coords", 1), ("rope_rescale_coords", 1)):
        if (value := getattr(config, name)) is not None:
            check_range(name, value, least)
            if config.pos_enc != "rope":
                raise ValueError(f"{name} has no effect with pos_enc {config.pos_enc}")


def _check_numbers(config: ViTConfig) -> None:
    for name in RATES:
        check_range(name, getattr(config, name), 0, 1)
    for name in ("layer_scale", "glu_extra_bias"):
        if (value := getattr(config, name)) is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite; got {value}")
    if config.glu_limit is not None and not config.glu_limit > 0:
        raise ValueError(f"glu_limit must be positive; got {config.glu_limit:g}")
    for name in ("glu_limit", "glu_extra_bias"):
        if getattr(config, name) is not None and not is_glu(config.activation):
            raise ValueError(f"{name} has no effect with activation {config.activation}, which is no GLU")


def _check_heads(config: ViTConfig) -> None:
    heads = config.heads
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must be a mapping from names to settings of heads; got {shown(heads)}")
    for name, head in heads.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the name of a head must be an identifier, as of a Python variable; got {shown(name)}")
        if not isinstance(head, HeadSettings):
            raise TypeError(f"heads.{name} must be settings of a head; got {shown(head)}")
        _named(f"heads.{name}", lambda head=head: head.check(config))


def _heads_from_dict(heads: Any, where: str) -> dict[str, Any]:
    if not isinstance(heads, Mapping):
        raise TypeError(f"{where} must be a mapping from names to settings of heads; got {shown(heads)}")
    return {name: _head_from_dict(head, f"{where}.{name}") for name, head in heads.items()}


def _head_from_dict(head: Any, where: str) -> HeadSettings:
    if isinstance(head, HeadSettings):
        return head
    if not isinstance(head, Mapping) or "type" not in head:
        raise ValueError(f"{where} must be a mapping with a type, one of {', '.join(HEAD_TYPES)}; got {shown(head)}")
    head = dict(head)
    kind = head.pop("type")
    check_choice(f"{where}: type", kind, list(HEAD_TYPES))
    return _named(where, lambda: from_mapping(HEAD_TYPES[kind], head, where))


def _named(where: str, build: Any) -> Any:
    """What ``build`` returns; an error of its says where the settings stand."""
    try:
        return build()
    except (ValueError, TypeError) as error:
        message = str(error)
        raise type(error)(message if message.startswith(where) else f"{where}: {message}") from None


def _changed_fields(settings: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, tuples as lists; heads are left out."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "heads"}
    return {
        f.name: list(values[f.name]) if isinstance(values[f.name], tuple) else values[f.name]
        for f in fields(settings)
        if f.name in values and values[f.name] != f.default
    }
