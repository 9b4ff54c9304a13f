"""Causal attention over packed sequences with grouped heads, exposing out and lse.

Each sequence attends to itself alone. Query rows go in blocks that see the keys up to their own
end, so a long sequence costs little more than the causal half of its square. The query heads of a
group are stacked along the rows of one product: k and v are never repeated. Kept for the backward:
q, k, v, out, lse; the probabilities are computed again from lse (Dao et al. 2022, arXiv 2205.14135,
section 3.1).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from xplus_kernels.numerics import widen

BLOCK = 128  # query rows


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q [T,N,D], k and v [T,K,D], cu_seqlens [S+1] int32 -> out [T,N,D], lse [N,T] fp32.

    `max_seqlen` bounds the longest sequence; `scale` multiplies the scores.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=widen(q[:0]).dtype, device=q.device)
    for start, a, b in _blocks(cu_seqlens):
        keys, values = k[start:b].transpose(0, 1), v[start:b].transpose(0, 1)  # [K, t, D]
        s = _scores(_group(q[a:b], k.shape[1]), keys, a - start, scale)  # [K, G*rows, t]
        block_lse = s.logsumexp(-1, keepdim=True)
        p = (s - block_lse).exp().to(q.dtype)
        out[a:b] = _ungroup(p @ values, b - a)
        lse[:, a:b] = block_lse.view(-1, b - a)
    return out, lse


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, out [T,N,D], lse [N,T] and the forward's inputs -> dq [T,N,D], dk, dv [T,K,D]."""
    kv_heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(widen(k)), torch.zeros_like(widen(v))
    delta = (widen(dout) * widen(out)).sum(-1)  # [T, N]
    for start, a, b in _blocks(cu_seqlens):
        keys, values = k[start:b].transpose(0, 1), v[start:b].transpose(0, 1)
        queries, douts = _group(q[a:b], kv_heads), _group(dout[a:b], kv_heads)
        s = _scores(queries, keys, a - start, scale)
        p = (s - lse[:, a:b].reshape(kv_heads, -1, 1)).exp()
        dp = widen(douts @ values.transpose(1, 2))
        block_delta = delta[a:b].T.reshape(kv_heads, -1, 1)
        ds = (p * (dp - block_delta) * scale).to(q.dtype)
        dq[a:b] = _ungroup(ds @ keys, b - a)
        dk[start:b] += (ds.transpose(1, 2) @ queries).transpose(0, 1)
        dv[start:b] += (p.to(q.dtype).transpose(1, 2) @ douts).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start of the sequence, first and past-last query row of a block) for every block."""
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        for a in range(start, end, BLOCK):
            yield start, a, min(a + BLOCK, end)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, N, D] -> [K, G*rows, D]: the G query heads of a key/value head, one under another."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1])


def _ungroup(x: Tensor, rows: int) -> Tensor:
    """[K, G*rows, D] -> [rows, N, D]."""
    return x.reshape(-1, rows, x.shape[-1]).transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, offset: int, scale: float) -> Tensor:
    """[K, G*rows, D] x [K, t, D] -> masked scores [K, G*rows, t]; row i sees keys to offset + i."""
    t = keys.shape[1]
    rows = t - offset
    s = widen(queries @ keys.transpose(1, 2)) * scale
    future = torch.ones(rows, t, dtype=torch.bool, device=s.device).triu(offset + 1)
    return s.view(keys.shape[0], -1, rows, t).masked_fill_(future, float("-inf")).view_as(s)
