"""Hugging Face's models without padding: flat rows of sequences, FlashAttention over each.

What `DataCollatorWithFlattening` makes and flash_attention_2 takes, for machines without the
flash-attn package too: attention is the flash kernels that `xplus_kernels.varlen_attention` finds
(ours takes the same for long sequences), so that no peer is slower for a library that is missing.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.training.workloads import Sequence as Sentence
from xplus_kernels import varlen_attention, varlen_attention_backward

ATTENTION = "benchmark_varlen"


class _Attention(torch.autograd.Function):
    """q [T, N, D], k and v [T, K, D] -> [T, N, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
    ) -> Tensor:
        out, lse = varlen_attention(q, k, v, cu_seqlens, max_seqlen=longest, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = varlen_attention_backward(
            dout, *ctx.saved_tensors, max_seqlen=ctx.longest, scale=ctx.scale
        )
        return *grads, None, None, None


@torch.compiler.disable
def _varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *,
    scaling: float, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers asks of an attention: [1, heads, T, D] in, [1, T, heads, D] out."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _Attention.apply(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def register() -> str:
    """Make the attention known to transformers, which makes no mask for it; returns its name."""
    AttentionInterface.register(ATTENTION, _varlen)
    return ATTENTION


def flat(sentences: list[Sentence]) -> dict[str, Any]:
    """[1, T]: one sentence after the other; no one predicts a sentence's first token."""
    lengths = [len(s) for s in sentences]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels = torch.cat([s.labels for s in sentences])
    labels[bounds[:-1].long()] = -100
    return {
        "input_ids": torch.cat([s.ids for s in sentences])[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
