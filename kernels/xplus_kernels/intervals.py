"""Which query rows of a pack see which key rows, as intervals; and attention over them in PyTorch.

What `short_attention` is given and is tested against. The reference makes all scores at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xplus_kernels.numerics import widen

NOBODY = 2**30  # begin of an empty interval, past every row


@dataclass(frozen=True)
class Prefixes:
    """What many sequences share, G prefixes: rows of k and v before all others.

    A prefix's own queries, if it has any, stand before those of its sequences.
    """

    sees: Tensor  # [2, Tq] int32, key rows begin and end; NOBODY, 0 for a row that sees none
    # [C, 5] int32: begin and end of a prefix's key rows, and of query rows that see it; and where
    # this chunk's share of the prefix's dk and dv begins, among `rows` of such
    chunks: Tensor
    of: Tensor  # [G + 1] int32: prefix g has chunks of[g] to of[g + 1]
    longest: int  # rows of a prefix
    keys: int  # rows of all prefixes
    rows: int


@dataclass(frozen=True)
class Sees:
    """Which query rows see which key rows."""

    keys: Tensor  # [2, Tq] int32: begin and end of the keys that a query sees
    queries: Tensor  # [2, Tk] int32: begin and end of the queries that see a key; NOBODY, 0: none
    prefixes: Prefixes | None = None


def sees_causally(cu_seqlens: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int) -> Sees:
    """Of sequences that attend to themselves: bounds [S + 1] int32, rows of q and of k in all.

    The mask is aligned to the end of a sequence's keys, as in `varlen_attention`; no host sync.
    """
    device, count = cu_seqlens.device, len(cu_seqlens) - 1
    of = torch.arange(count, device=device)
    of_q = of.repeat_interleave(cu_seqlens.diff(), output_size=queries)
    of_k = of.repeat_interleave(cu_seqlens_k.diff(), output_size=keys)
    ahead = (cu_seqlens_k - cu_seqlens)[1:]  # a sequence's last query sees its last key
    row = torch.arange(max(queries, keys), dtype=torch.int32, device=device)
    seen = torch.stack((cu_seqlens_k[of_q], ahead[of_q] + row[:queries] + 1))
    first = torch.maximum(cu_seqlens[of_k], row[:keys] - ahead[of_k])
    end = cu_seqlens[of_k + 1]
    none = first >= end
    asked = torch.stack((first.masked_fill(none, NOBODY), end.masked_fill(none, 0)))
    return Sees(seen.int(), asked.int())


def _visible(sees: Sees, keys: int) -> Tensor:
    """[Tq, Tk] bool."""
    row = torch.arange(keys, device=sees.keys.device)
    both = [sees.keys] + ([sees.prefixes.sees] if sees.prefixes else [])
    found = [(begin[:, None] <= row) & (row < end[:, None]) for begin, end in both]
    return torch.stack(found).any(0)


def _scores(q: Tensor, k: Tensor, sees: Sees, scale: float) -> Tensor:
    """[N, Tq, Tk]."""
    heads = widen(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qnd,knd->nqk", widen(q), heads) * scale
    return s.masked_fill(~_visible(sees, len(k)), -torch.inf)


def short_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, sees: Sees, *, scale: float
) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, sees, scale)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp().nan_to_num(0)  # a row that sees nothing
    values = widen(v).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("nqk,knd->qnd", p, values).to(q.dtype), lse


def short_attention_backward_ref(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Sees, *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    p = (_scores(q, k, sees, scale) - lse[..., None]).exp().nan_to_num(0)
    dout, wide_q = widen(dout), widen(q)
    dp = torch.einsum("qnd,knd->nqk", dout, widen(v).repeat_interleave(groups, 1))
    ds = p * (dp - (dout * widen(out)).sum(-1).T[..., None]) * scale
    dq = torch.einsum("nqk,knd->qnd", ds, widen(k).repeat_interleave(groups, 1))
    dk, dv = (
        torch.einsum("nqk,qnd->knd", a, b).unflatten(1, (-1, groups)).sum(2)
        for a, b in ((ds, wide_q), (p, dout))
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
