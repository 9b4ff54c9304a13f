"""Which models the engine runs, and what their weights are called: a family is a row of one table.

Legend: L layers, H hidden, N query heads, K key/value heads, D head_dim, F ffn, V vocabulary.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from xplus_fast.errors import UserError

# Packed weight of a block -> the Hugging Face tensors of a layer that make it, stacked along axis
# 0.
PACKED = {
    "input_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "post_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
# Packed weight -> the parameter of a block that it is, in the order of a stock layer's: by Hugging
# Face's name, and where it has several, by one of their kind.
HELD = {
    "qkv": "self_attn.qkv_proj.weight",
    "qkv_bias": "self_attn.qkv_proj.bias",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate_up": "mlp.gate_up_proj.weight",
    "down": "mlp.down_proj.weight",
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
}
# What may train beside the blocks -> its Hugging Face tensor.
BESIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture's decoder block from another's."""

    qk_norm: bool = False  # per-head RMSNorm of q and k before RoPE
    qkv_bias: bool = False


FAMILIES = {
    "qwen3": Family(qk_norm=True),
    "qwen2": Family(qkv_bias=True),  # Qwen2 and Qwen2.5
    "llama": Family(),  # Llama 2 and 3, SmolLM2
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one model, all that FLOPs, bytes and the block need to know."""

    family: str
    layers: int  # L
    hidden: int  # H
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # D
    ffn: int  # F
    vocabulary: int  # V
    eps: float
    tied: bool  # embedding and head are one tensor

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Packed weights of one block and their shapes: [out, in] for matrices."""
        family = FAMILIES[self.family]
        h, d, f = self.hidden, self.head_dim, self.ffn
        qkv = (self.heads + 2 * self.kv_heads) * d
        shapes: dict[str, tuple[int, ...]] = {
            "input_norm": (h,),
            "qkv": (qkv, h),
            "qkv_bias": (qkv,),
            "q_norm": (d,),
            "k_norm": (d,),
            "o": (h, self.heads * d),
            "post_norm": (h,),
            "gate_up": (2 * f, h),
            "down": (h, f),
        }
        if not family.qkv_bias:
            del shapes["qkv_bias"]
        if not family.qk_norm:
            del shapes["q_norm"], shapes["k_norm"]
        return shapes

    def rows(self, packed: str) -> tuple[int, ...]:
        """How many rows of a packed weight belong to each of its Hugging Face tensors."""
        if packed in ("qkv", "qkv_bias"):
            return (self.heads * self.head_dim, *2 * (self.kv_heads * self.head_dim,))
        if packed == "gate_up":
            return (self.ffn, self.ffn)
        return (self.packed_shapes()[packed][0],)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under its Hugging Face name, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {BESIDE["embedding"]: (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            for packed, shape in self.packed_shapes().items():
                for name, rows in zip(PACKED[packed], self.rows(packed), strict=True):
                    shapes[f"model.layers.{layer}.{name}"] = (rows, *shape[1:])
        shapes[BESIDE["final_norm"]] = (self.hidden,)
        if not self.tied:
            shapes[BESIDE["head"]] = (self.vocabulary, self.hidden)
        return shapes


def stage_shapes(
    shape: Shape, layers: Collection[int], also: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors that a stage trains under their Hugging Face names, with their shapes."""
    blocks = tuple(f"model.layers.{i}." for i in layers)
    tied = {"head": "embedding"} if shape.tied else {}
    beside = {BESIDE[tied.get(kind, kind)] for kind in also}
    return {
        name: size
        for name, size in shape.tensor_shapes().items()
        if name in beside or name.startswith(blocks)
    }


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor's Hugging Face name; None for embedding, final norm, head."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def place_of(name: str) -> str:
    """Of a tensor: "21" for a layer, else "embedding", "final_norm" or "head"."""
    layer = layer_of(name)
    beside = {tensor: kind for kind, tensor in BESIDE.items()}
    return beside[name] if layer is None else str(layer)


# The most that config.json may say of a size: beyond any model, and harmless to compute with.
_SIZES = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 40,
}
_OPTIONAL = ("head_dim", "num_key_value_heads", "max_position_embeddings")
# RoPE's kinds that the block computes -> the numbers that they need.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip

_ROPE_NUMBERS = ("theta", "factor", "embeddings", "fast", "slow")  # how their names end


def shape_of(config: Any) -> Shape:
    """Read the sizes from a Hugging Face configuration.

    Raises `UserError` for what the block does not compute and for values that no model can have.
    """
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"model type {kind!r:.80} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    refused = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "hidden_act": "" if config.hidden_act == "silu" else config.hidden_act,
        "layer_types": _other_layers(getattr(config, "layer_types", None)),
    }
    for key, value in refused.items():
        if value:
            raise UserError(f"config.{key} = {value!r:.80} is not supported for {kind} models")
    for key, most in _SIZES.items():
        value = getattr(config, key, None)
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"{key}: a whole number from 1 to {most:,} is wanted, found {value!r:.80}"
            )
    eps = config.rms_norm_eps
    if not _is_number(eps) or not 0 <= eps < 1:
        raise UserError(f"rms_norm_eps: a number from 0 to below 1 is wanted, found {eps!r:.80}")
    tied = config.tie_word_embeddings
    if not isinstance(tied, bool):
        raise UserError(f"tie_word_embeddings: true or false is wanted, found {tied!r:.80}")
    _check_rope(config)
    heads = config.num_attention_heads
    shape = Shape(
        family=kind,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        eps=eps,
        tied=tied,
    )
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"num_key_value_heads: {shape.kv_heads} does not divide num_attention_heads,"
            f" {shape.heads}"
        )
    if shape.head_dim < 2 or shape.head_dim % 2:
        raise UserError(f"head_dim: an even number is wanted, found {shape.head_dim}")
    return shape


def _other_layers(types: Any) -> Any:
    """The first type of layer that is no full attention, if any."""
    if types is None:
        return None
    if not isinstance(types, list):
        raise UserError(f"layer_types: a list is wanted, found {types!r:.80}")
    return next((t for t in types if t != "full_attention"), None)


def _check_rope(config: Any) -> None:
    """See that the block's position encoding can be computed from what is given."""
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters: a mapping is wanted, found {rope!r:.80}")
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE:
        raise UserError(
            f"config.rope_type = {kind!r:.80} is not supported; supported: {', '.join(_ROPE)}"
        )
    numbers = {f"rope_parameters.{k}": v for k, v in rope.items() if k.endswith(_ROPE_NUMBERS)}
    numbers |= {f"rope_parameters.{k}": rope.get(k) for k in _ROPE[kind]}
    if hasattr(config, "rope_theta"):
        numbers["rope_theta"] = config.rope_theta
    for key, value in numbers.items():
        needed = key.rpartition(".")[2] in _ROPE[kind]
        if (value is not None or needed) and not (_is_number(value) and 0 < value < 1e15):
            raise UserError(f"{key}: a number above 0 is wanted, found {value!r:.80}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError("rope_parameters.low_freq_factor: less than high_freq_factor is wanted")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
