"""A ViT as formulas in float64, from the names of a state dict: what the modules are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.models.backbones.vit import ViTConfig

State = dict[str, Tensor]
ACTIVATIONS = {
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "srelu": lambda x: x**2 * (x > 0),
}
GATES = {
    "reglu": ACTIVATIONS["relu"],
    "swiglu": ACTIVATIONS["silu"],
    "geglu": ACTIVATIONS["gelu"],
    "openswiglu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def config(**changes) -> ViTConfig:
    """A small model, of the sizes in vit_state_dicts.txt, in float64 and without dropout."""
    settings = {
        "in_channels": 3,
        "patch_size": (8, 8),
        "img_size": (64, 96),
        "depth": 1,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "dtype": torch.float64,
    }
    return ViTConfig(**{**settings, **changes})


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a random value that matters, zeros and ones included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        with torch.no_grad():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1 + 0.3 * draw)
    return module


def below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def vit(config: ViTConfig, state: State, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N, C): the normalised tokens; ``mask`` keeps equally many patches of each image."""
    state = {name: tensor.double() for name, tensor in state.items()}
    size = tuple(side // patch for side, patch in zip(images.shape[2:], config.patch_size))
    tokens = patches(images.double(), config.patch_size) @ state["stem.patch.weight"].flatten(1).T
    tokens = tokens + state["stem.patch.bias"]
    if config.pos_enc == "fourier":
        tokens = tokens + fourier(size, below(state, "stem.pos_enc."))
    if config.pos_enc == "learnable":
        tokens = tokens + state["stem.pos_enc.positions"]
    if config.patch_embed_normalization:
        tokens = norm(tokens, below(state, "patch_embed_norm."), torch.finfo(torch.float64).eps)
    angles = None
    if config.pos_enc == "rope":
        centres = places(size, config.rope_normalize_coords)
        angles = rope_angles(centres, config.rope_base, config.head_dim).expand(len(images), -1, -1)
    if mask is not None:
        tokens = torch.stack([sample[kept] for sample, kept in zip(tokens, mask)])
        angles = torch.stack([sample[kept] for sample, kept in zip(angles, mask)])
    prefix = [state[name].expand(len(images), -1, -1) for name in ("cls_tokens", "register_tokens")]
    tokens = torch.cat([*prefix, tokens], 1)
    for index in range(config.depth):
        tokens = encoder_layer(config, below(state, f"blocks.{index}."), tokens, angles)
    return norm(tokens, below(state, "output_norm."), torch.finfo(torch.float64).eps)


def encoder_layer(config: ViTConfig, state: State, x: Tensor, angles: Tensor | None) -> Tensor:
    x = x + scale(state, "attn", self_attention(config, below(state, "self_attention."), x, angles))
    return x + scale(state, "mlp", mlp(config, below(state, "mlp."), x))


def cross_attention_layer(
    config: ViTConfig, state: State, x: Tensor, kv: Tensor, angles_q: Tensor | None, angles_k: Tensor | None
) -> Tensor:
    attended = cross_attention(config, below(state, "cross_attention."), x, kv, angles_q, angles_k)
    x = x + scale(state, "cross", attended)
    return x + scale(state, "mlp", mlp(config, below(state, "mlp."), x))


def scale(state: State, branch: str, update: Tensor) -> Tensor:
    return update * state.get(f"layer_scale_{branch}.gamma", 1)


def patches(images: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """(B, L, C_in * pixels of a patch), by cutting."""
    if len(patch_size) == 3:
        blocks = images.unfold(2, patch_size[0], patch_size[0])
        blocks = blocks.unfold(3, patch_size[1], patch_size[1]).unfold(4, patch_size[2], patch_size[2])
        return blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
    blocks = images.unfold(2, patch_size[0], patch_size[0]).unfold(3, patch_size[1], patch_size[1])
    return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def norm(x: Tensor, state: State, eps: float) -> Tensor:
    if "bias" in state:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["weight"] + state["bias"]
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state["weight"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def places(size: tuple[int, int], normalize: str = "separate") -> Tensor:
    """(L, 2) centres of the patches, row and column, in [-1, 1] of what divides them."""
    rows, columns = {
        "separate": size,
        "max": (max(size), max(size)),
        "min": (min(size), min(size)),
    }[normalize]
    return torch.tensor(
        [
            [(2 * row + 1) / rows - 1, (2 * column + 1) / columns - 1]
            for row in range(size[0])
            for column in range(size[1])
        ],
        dtype=torch.float64,
    )


def rope_angles(centres: Tensor, base: float, head_dim: int) -> Tensor:
    """(L, d / 2): a full turn for each period; first the row's angles, then the column's."""
    quarter = head_dim // 4
    periods = torch.tensor([base ** (2 * i / (head_dim / 2)) for i in range(quarter)], dtype=torch.float64)
    return torch.cat([2 * math.pi * centres[:, :1] / periods, 2 * math.pi * centres[:, 1:] / periods], 1)


def turn(x: Tensor, angles: Tensor | None) -> Tensor:
    """(B, heads, S, d), channels i and i + d / 2 as one complex number, turned; tokens before the patches are not."""
    if angles is None:
        return x
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half:])
    turned = numbers[..., -angles.shape[-2] :, :] * torch.exp(1j * angles)[:, None]
    numbers = torch.cat([numbers[..., : x.shape[-2] - angles.shape[-2], :], turned], -2)
    return torch.cat([numbers.real, numbers.imag], -1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Merged heads (B, S, C), and the weights."""
    products = torch.einsum("bhsd,bhtd->bhst", query, key) / math.sqrt(query.shape[-1])
    weights = products.exp() / products.exp().sum(-1, keepdim=True)
    return torch.einsum("bhst,bhtd->bshd", weights, value).flatten(2), weights


def split(x: Tensor, config: ViTConfig) -> Tensor:
    return torch.stack(x.split(config.head_dim, -1), 1)


def head_norms(config: ViTConfig, state: State, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    if not config.qk_normalization:
        return query, key
    return norm(query, below(state, "q_norm."), 1e-5), norm(key, below(state, "k_norm."), 1e-5)


def self_attention_and_weights(
    config: ViTConfig, state: State, x: Tensor, angles: Tensor | None
) -> tuple[Tensor, Tensor]:
    qkv = linear(norm(x, below(state, "norm."), 1e-5), state, "qkv_proj")
    query, key, value = (split(part, config) for part in qkv.split(config.hidden_size, -1))
    query, key = head_norms(config, state, query, key)
    attended, weights = attend(turn(query, angles), turn(key, angles), value)
    return linear(attended, state, "out_proj"), weights


def self_attention(config: ViTConfig, state: State, x: Tensor, angles: Tensor | None) -> Tensor:
    return self_attention_and_weights(config, state, x, angles)[0]


def cross_attention(
    config: ViTConfig,
    state: State,
    x: Tensor,
    kv: Tensor,
    angles_q: Tensor | None = None,
    angles_k: Tensor | None = None,
) -> Tensor:
    query = split(linear(norm(x, below(state, "norm."), 1e-5), state, "q_proj"), config)
    key, value = (split(part, config) for part in linear(kv, state, "kv_proj").split(config.hidden_size, -1))
    query, key = head_norms(config, state, query, key)
    attended, _ = attend(turn(query, angles_q), turn(key, angles_k), value)
    return linear(attended, state, "out_proj")


def mlp(config: ViTConfig, state: State, x: Tensor) -> Tensor:
    hidden = linear(norm(x, below(state, "norm."), 1e-5), state, "fc1")
    if config.activation in GATES:
        straight, gate = hidden.split(config.ffn_hidden_size, -1)
        if config.glu_limit is not None:
            gate = torch.minimum(gate, torch.tensor(config.glu_limit))
            straight = torch.maximum(
                torch.minimum(straight, torch.tensor(config.glu_limit)), torch.tensor(-config.glu_limit)
            )
        hidden = GATES[config.activation](gate) * (straight + (config.glu_extra_bias or 0))
    else:
        hidden = ACTIVATIONS[config.activation](hidden)
    return linear(hidden, state, "fc2")


def fourier(size: tuple[int, ...], state: State) -> Tensor:
    weights = state["w_fourier"]
    axes = [[-1 + 2 * i / (side - 1) for i in range(side)] for side in size]
    grid = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in axes))
    angles = grid @ weights
    features = torch.cat([angles.sin(), angles.cos()], -1) / weights.shape[1] ** 0.5
    return linear(features, state, "w_fc1")


def bicubic(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(rows * columns, C) resized by cubic convolution (Keys 1981, a = -3/4), pixel centres aligned, edges repeated."""
    grid = positions.double().unflatten(0, old)
    return torch.einsum("ri,cj,ijk->rck", cubic_matrix(old[0], new[0]), cubic_matrix(old[1], new[1]), grid).flatten(
        0, 1
    )


def cubic_matrix(old: int, new: int, a: float = -0.75) -> Tensor:
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return matrix


def dinov3(state: State, images: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) from DINOv3's names: patches of 16, LayerNorm, layer scale, RoPE of base 100."""
    state = {name: tensor.double() for name, tensor in state.items()}
    size = tuple(side // 16 for side in images.shape[2:])
    x = patches(images.double(), (16, 16)) @ state["patch_embed.proj.weight"].flatten(1).T
    x = x + state["patch_embed.proj.bias"]
    x = torch.cat([state[name].expand(len(x), -1, -1) for name in ("cls_token", "storage_tokens")] + [x], 1)
    angles = rope_angles(places(size), 100.0, x.shape[-1] // num_heads)[None]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        block = below(state, f"blocks.{index}.")
        bias = block.get("attn.qkv.bias", torch.zeros(())) * block.get("attn.qkv.bias_mask", 1)
        qkv = norm(x, below(block, "norm1."), 1e-5) @ block["attn.qkv.weight"].T + bias
        heads = (torch.stack(part.chunk(num_heads, -1), 1) for part in qkv.chunk(3, -1))
        query, key, value = heads
        attended, _ = attend(turn(query, angles), turn(key, angles), value)
        x = x + block["ls1.gamma"] * linear(attended, block, "attn.proj")
        normed = norm(x, below(block, "norm2."), 1e-5)
        if "mlp.w1.weight" in block:
            hidden = F.silu(linear(normed, block, "mlp.w1")) * linear(normed, block, "mlp.w2")
            update = linear(hidden, block, "mlp.w3")
        else:
            update = linear(F.gelu(linear(normed, block, "mlp.fc1")), block, "mlp.fc2")
        x = x + block["ls2.gamma"] * update
    return norm(x, below(state, "norm."), 1e-5)
