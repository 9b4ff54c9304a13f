"""`varlen_attention` and its gradient in PyTorch: the CPU's own, and what the flash kernels are
tested against.

A pack of many short sequences is many small products, whose calls would cost more than they
compute. So the query rows are cut into blocks that see the keys up to their own end, and blocks of
about one size are computed together: gathered, padded to the largest of them, multiplied as one
batch, and put back into order at the end. Blocks being short beside their sequence, that costs
little more than the causal part of its square. The G = N / K query heads of a key/value head are
stacked along the rows of a product, so k and v are never repeated.

Where everything lies depends on the bounds alone: it is made at a batch's first layer and found
again at all others, and in the backward.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from xplus_kernels.numerics import widen

BLOCK = 16  # query rows at least: the fewer, the nearer to the causal part of the square
LONG_BLOCK = 64  # and at most, a sixteenth of the sequence between the two
STEP = 8  # blocks that differ by less, in rows and in keys, are computed together
PAIRS = 1 << 15  # of a query and a key at once, at most, where there are several blocks


@dataclass(frozen=True)
class _Blocks:
    """B blocks of R query rows over C keys, the smaller ones padded."""

    size: tuple[int, int, int]  # B, R, C
    first: int  # of their rows among all blocks' rows
    queries: Tensor  # [B*K*G*R] rows of q as [Tq*N, D]
    keys: Tensor  # [B*K*C] rows of k and v as [Tk*K, D]
    hidden: Tensor | None  # [B, 1, 1, R, C]: where a row does not see a key, or is padding


@dataclass(frozen=True)
class _Layout:
    blocks: list[_Blocks]
    rows: int  # of all blocks, padding included
    where: Tensor  # [Tq*N]: a row's place among them; `rows`, past the end, where it is in none


def varlen_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` in any floating dtype; lse in fp64 for fp64."""
    (t, n, d), kv_heads = q.shape, k.shape[1]
    layout = _layout_of(q, k, cu_seqlens, cu_seqlens_k, causal)
    q, k, v = (x.reshape(-1, d) for x in (q, k, v))
    out = q.new_empty(layout.rows + 1, d)
    lse = widen(q[:0]).new_empty(layout.rows + 1)
    out[-1], lse[-1] = 0, -torch.inf  # of a row without keys
    for b in layout.blocks:
        queries, keys, values = _heads(b, q, kv_heads), _keys(b, k, kv_heads), _keys(b, v, kv_heads)
        s = _scores(queries, keys, b, scale)
        logp = s.log_softmax(-1)
        here = slice(b.first, b.first + len(b.queries))
        lse[here] = (s[..., 0] - logp[..., 0]).view(-1)  # whichever key: a row sees its first
        p = logp.exp_().to(q.dtype)
        torch.bmm(p, values, out=out[here].view(queries.shape))
    return (
        out.index_select(0, layout.where).view(t, n, d),
        lse.index_select(0, layout.where).view(t, n).T.contiguous(),
    )


def varlen_attention_backward_ref(
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`varlen_attention_backward` in any floating dtype."""
    (t, n, d), kv_heads = q.shape, k.shape[1]
    layout = _layout_of(q, k, cu_seqlens, cu_seqlens_k, causal)
    delta = (widen(dout) * widen(out)).sum(-1).view(-1, 1)  # [Tq*N, 1]
    lse = lse.T.reshape(-1, 1)
    dout, q, k, v = (x.reshape(-1, d) for x in (dout, q, k, v))
    dq = q.new_empty(layout.rows + 1, d)
    dq[-1] = 0
    dk, dv = torch.zeros_like(widen(k)), torch.zeros_like(widen(v))
    for b in layout.blocks:
        queries, keys, values = _heads(b, q, kv_heads), _keys(b, k, kv_heads), _keys(b, v, kv_heads)
        douts = _heads(b, dout, kv_heads)
        p = _scores(queries, keys, b, scale).sub_(_heads(b, lse, kv_heads)).exp_()
        dp = widen(douts @ values.transpose(1, 2)).sub_(_heads(b, delta, kv_heads))
        ds = dp.mul_(p).mul_(scale).to(q.dtype)
        torch.bmm(ds, keys, out=dq[b.first : b.first + len(b.queries)].view(queries.shape))
        dk.index_add_(0, b.keys, widen(ds.transpose(1, 2) @ queries).view(-1, d))
        dv.index_add_(0, b.keys, widen(p.to(q.dtype).transpose(1, 2) @ douts).view(-1, d))
    return (
        dq.index_select(0, layout.where).view(t, n, d),
        dk.to(k.dtype).view(-1, kv_heads, d),
        dv.to(v.dtype).view(-1, kv_heads, d),
    )


def _heads(b: _Blocks, x: Tensor, kv_heads: int) -> Tensor:
    """[Tq*N, ...] -> [B*K, G*R, ...]: the query heads of a key/value head, one under another."""
    return x.index_select(0, b.queries).view(b.size[0] * kv_heads, -1, x.shape[1])


def _keys(b: _Blocks, x: Tensor, kv_heads: int) -> Tensor:
    """[Tk*K, D] -> [B*K, C, D]."""
    return x.index_select(0, b.keys).view(b.size[0] * kv_heads, b.size[2], -1)


def _scores(queries: Tensor, keys: Tensor, b: _Blocks, scale: float) -> Tensor:
    """[B*K, G*R, D] x [B*K, C, D] -> masked scores [B*K, G*R, C]."""
    s = widen(queries @ keys.transpose(1, 2)).mul_(scale)
    if b.hidden is not None:
        count, rows, c = b.size
        s.view(count, len(s) // count, -1, rows, c).masked_fill_(b.hidden, -torch.inf)
    return s


def _layout_of(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, causal: bool
) -> _Layout:
    bounds = tuple(cu_seqlens.tolist())
    bounds_k = bounds if cu_seqlens_k is None else tuple(cu_seqlens_k.tolist())
    return _layout(bounds, bounds_k, *q.shape[:2], k.shape[1], causal, BLOCK, q.device)


@lru_cache(maxsize=8)  # a pack's own and cross attention, and the last layer's, of a few batches
def _layout(
    bounds: tuple[int, ...],
    bounds_k: tuple[int, ...],
    t: int,
    n: int,
    kv_heads: int,
    causal: bool,
    block: int,
    device: torch.device,
) -> _Layout:
    """The blocks of sequences with these bounds."""
    more = int(causal)  # keys that a row sees beside those of the row above
    least = block if causal else max(block, LONG_BLOCK)  # where all see the same, length is free
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    sequences = zip(bounds[:-1], bounds[1:], bounds_k[:-1], bounds_k[1:], strict=True)
    for start, end, start_k, end_k in sequences:
        count, keys = end - start, end_k - start_k
        height = max(least, min(count // 16, LONG_BLOCK))
        for a in range(0, count if keys else 0, height):
            rows = min(height, count - a)
            seen = keys - count + a + 1 if causal else keys  # by the first row
            reach = seen + more * (rows - 1)
            kind = (-(-rows // STEP), -(-reach // STEP))
            groups.setdefault(kind, []).append((start + a, rows, start_k, reach, seen))
    made: list[_Blocks] = []
    where = torch.full((t * n,), -1, device=device)
    first = 0
    for alike in groups.values():
        high, wide = max(b[1] for b in alike), max(b[3] for b in alike)
        together = max(1, PAIRS // (high * wide))
        for i in range(0, len(alike), together):
            some = torch.tensor(alike[i : i + together], device=device)
            row, rows, key, reach, seen = some.T[..., None]  # [B, 1] each
            r, c = torch.arange(high, device=device), torch.arange(wide, device=device)
            real = r < rows  # [B, R]
            sees = (seen + more * r) * real
            hidden = c >= sees[..., None]  # [B, R, C]
            of_rows = (row + torch.minimum(r, rows - 1))[:, None] * n  # [B, 1, R]
            queries = of_rows + torch.arange(n, device=device)[:, None]  # [B, N, R]
            of_keys = (key + torch.minimum(c, reach - 1))[:, None] * kv_heads
            keys = of_keys + torch.arange(kv_heads, device=device)[:, None]  # [B, K, C]
            place = torch.arange(first, first + queries.numel(), device=device).view_as(queries)
            real = real[:, None].expand_as(queries)
            where[queries[real]] = place[real]
            made.append(
                _Blocks(
                    (len(some), high, wide),
                    first,
                    queries.flatten(),
                    keys.flatten(),
                    hidden[:, None, None] if hidden.any() else None,
                )
            )
            first += queries.numel()
    where[where < 0] = first
    return _Layout(made, first, where)
