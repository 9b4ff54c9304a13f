"""Tiny stock models and batches, and what Hugging Face makes of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xplus_fast.model.families import HELD
from xplus_fast.model.layer import Block, unpack

LAYERS, HIDDEN, VOCABULARY = 6, 96, 320
KINDS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
SELECTIONS = {
    "bottom": [0, 1],
    "middle": [2, 3],
    "top": [4, 5],
    "joint": [0, 4, 5],
    "all": list(range(LAYERS)),
}


def tiny_model(kind: str = "qwen3", seed: int = 0, **changes: Any) -> Any:
    """A stock model in fp32 whose norms and biases are not all ones and zeros."""
    model_class, config_class, options = KINDS[kind]
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **options, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                p.normal_(0.0, 0.08)  # larger than the default, so that attention has an opinion
    return model


def packed_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """One row of several sequences; about half of the tokens are supervised."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.5, -100)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[0, starts] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def padded_batch(packed: dict[str, Tensor], lengths: list[int], side: str = "right") -> dict:
    """The same sequences as rows of one padded batch."""
    longest, batch = max(lengths), {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        flat = packed[name][0] if name in packed else torch.ones(sum(lengths), dtype=torch.int64)
        batch[name] = torch.full((len(lengths), longest), fill)
        for row, part in zip(batch[name], flat.split(lengths), strict=True):
            row[slice(len(part)) if side == "right" else slice(longest - len(part), None)] = part
    return batch


def stock_loss(model: Any, packed: dict[str, Tensor], lengths: list[int]) -> Tensor:
    """Stock Hugging Face, one sequence after another: the mean over all supervised tokens."""
    total, count = torch.zeros(()), 0
    ids, labels = packed["input_ids"][0].split(lengths), packed["labels"][0].split(lengths)
    for x, y in zip(ids, labels, strict=True):
        logits = model(input_ids=x[None], use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, y[1:], reduction="sum", ignore_index=-100
        )
        count += int((y[1:] != -100).sum())
    return total / count


def select(model: Any, layers: list[int], also: tuple[str, ...] = ()) -> Any:
    """Freeze a stock model but for some layers and tensors."""
    model.requires_grad_(False)
    for i in layers:
        model.model.layers[i].requires_grad_(True)
    for name in also:
        model.get_parameter(name).requires_grad_(True)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    """Every gradient of a stock or prepared model, under Hugging Face's names."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for block in (b for b in model.modules() if isinstance(b, Block)):
        for packed in block.packed:
            prefix = f"model.layers.{block.layer_idx}."
            if (grad := found.pop(prefix + HELD[packed], None)) is not None:
                parts = unpack(block.shape, packed, grad)
                found |= {prefix + part: g for part, g in parts.items()}
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to b's."""
    return ((a - b).double().norm() / b.double().norm().clamp(min=1e-30)).item()
