"""Which models the engine runs, and what their weights are called: a family is a row of one table.

Legend: L layers, H hidden, N query heads, K key/value heads, D head_dim, F ffn, V vocabulary.
"""

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


def shape_of(config: Any) -> Shape:
    """Read the sizes from a Hugging Face configuration; refuse what the block does not compute."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    refused = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "hidden_act": "" if config.hidden_act == "silu" else config.hidden_act,
        "layer_types": any(
            t != "full_attention" for t in getattr(config, "layer_types", None) or ()
        ),
    }
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    refused["rope_type"] = rope if rope in ("dynamic", "longrope") else ""
    for key, value in refused.items():
        if value:
            raise UserError(f"config.{key} = {value!r} is not supported for {kind} models")
    head_dim = getattr(config, "head_dim", None)
    return Shape(
        family=kind,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
    )
