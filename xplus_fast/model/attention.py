"""Attention of a pack where sequences may share a prefix: the kernels' calls, and what joins them.

A suffix's softmax runs over its prefix and over itself. Each half is a call of its own, and

    lse = log(exp(lse of its own) + exp(lse to the prefix)),  out = sum of out * exp(its lse - lse)

is the whole. Handed the joined out and lse, each half's backward makes the whole softmax's
probabilities, exp(s - lse), and rowsum(dout * out); so their gradients add up to the exact ones.

Of short sequences one kernel goes over both.
"""

from typing import Any

from torch import Tensor

import xplus_kernels as ops
from xplus_fast.model.packing import Attend, ToPrefixes


def attention(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, *, scale: float
) -> tuple[Tensor, Tensor]:
    """q [Q, N, D], k and v [T, K, D] -> out [Q, N, D], lse [N, Q]."""
    if attend.sees is not None and ops.takes_short(q):
        return ops.short_attention(q, k, v, attend.sees, scale=scale)
    out, lse = ops.varlen_attention(q, k, v, **_own(attend), scale=scale)
    if to := attend.prefixes:
        at = slice(to.first, to.first + to.rows)
        other = ops.varlen_attention(q[at], k[: to.keys], v[: to.keys], **_across(to), scale=scale)
        ops.merge_attention(out[at], lse[:, at], *other)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attend: Attend, *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attention`: dq [Q, N, D], dk and dv [T, K, D]."""
    if attend.sees is not None and ops.takes_short(q):
        return ops.short_attention_backward(dout, q, k, v, out, lse, attend.sees, scale=scale)
    dq, dk, dv = ops.varlen_attention_backward(dout, q, k, v, out, lse, **_own(attend), scale=scale)
    if to := attend.prefixes:
        at = slice(to.first, to.first + to.rows)
        of_q, of_k, of_v = ops.varlen_attention_backward(
            dout[at], q[at], k[: to.keys], v[: to.keys], out[at], lse[:, at],
            **_across(to), scale=scale,
        )  # fmt: skip
        dq[at] += of_q
        dk[: to.keys] += of_k
        dv[: to.keys] += of_v
    return dq, dk, dv


def _own(a: Attend) -> dict[str, Any]:
    given = {"cu_seqlens": a.cu_seqlens_q, "max_seqlen": a.max_seqlen}
    if a.cu_seqlens_k is a.cu_seqlens_q:
        return given
    return given | {"cu_seqlens_k": a.cu_seqlens_k, "max_seqlen_k": a.max_seqlen}


def _across(to: ToPrefixes) -> dict[str, Any]:
    return {
        "cu_seqlens": to.cu_seqlens_q, "max_seqlen": to.max_seqlen_q,
        "cu_seqlens_k": to.cu_seqlens_k, "max_seqlen_k": to.max_seqlen_k, "causal": False,
    }  # fmt: skip
