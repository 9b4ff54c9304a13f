"""Any batch a Hugging Face model accepts -> one row of T packed tokens.

Packed and padded input mean the same: padding is taken out before the first layer and put back
after the last. What attends to what is Hugging Face's rule: `cu_seq_lens_q` if it is given; else
rows, cut further where positions do not go on by one or, beside an attention mask, where they start
again (a mask's positions may jump and still be one sequence). What predicts what is its rule, too:
a token's label is predicted by the token before it in the row.

A row with a `PackLayout` may hold first tokens that several sequences share, once:

    prefix A, prefix B | suffixes of A, suffixes of B | sequences that share nothing

Each of these is a sequence of its own to the causal attention; a suffix attends to its prefix
besides, and its positions go on where the prefix ends.

Legend: T rows computed, S sequences in the sense above, G prefixes, R rows that predict something,
Q rows from the first of these to the end of their sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.errors import UserError


@dataclass(frozen=True, eq=False)
class PackLayout:
    """How a row of T tokens is made up, known on the host: no figure is asked of the device.

    Sequences stand in the order of the row: G prefixes, `members[g]` suffixes of each, the others.
    A prefix predicts nothing.
    """

    lengths: np.ndarray  # int64 [S]
    members: np.ndarray  # int64 [G]
    predicts: np.ndarray  # bool [T]: rows whose next token is supervised
    starts: np.ndarray | None = None  # int64 [S]: places of first tokens in the data, if known
    ids: np.ndarray | None = None  # int64 [T]: the tokens, where they are known on the host
    sources: np.ndarray | None = None  # int64 [S]: which source each is of, if known

    @cached_property
    def edges(self) -> np.ndarray:
        """int64 [S + 1]: where sequences begin and end."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def groups(self) -> np.ndarray:
        """int64 [G + 1]: prefix g has the sequences groups[g]:groups[g + 1]."""
        prefixes = len(self.members)
        return prefixes + np.concatenate([[0], np.cumsum(self.members)]).astype(np.int64)

    @property
    def prefix_tokens(self) -> int:
        return int(self.edges[len(self.members)])

    @cached_property
    def group_tokens(self) -> np.ndarray:
        """int64 [G]: tokens of each prefix's suffixes together."""
        return np.diff(self.edges[self.groups])

    @property
    def data_tokens(self) -> int:
        """Tokens of the sequences as the data have them, each with its own prefix."""
        prefixes = self.lengths[: len(self.members)]
        return int(self.edges[-1] + ((self.members - 1) * prefixes).sum())

    @cached_property
    def query_counts(self) -> np.ndarray:
        """int64 [S]: rows from a sequence's first that predicts something to its end."""
        rows = np.flatnonzero(self.predicts)
        first = np.append(rows, self.edges[-1])[np.searchsorted(rows, self.edges[:-1])]
        return self.edges[1:] - np.minimum(first, self.edges[1:])

    @property
    def mean_length(self) -> float:
        """Of the sequence that a token is in, on average over tokens."""
        return float((self.lengths**2).sum() / max(1, self.edges[-1]))

    @property
    def pairs(self) -> int:
        """Query-key pairs of attention."""
        own = (self.lengths * (self.lengths + 1) // 2).sum()
        return int(own + (self.group_tokens * self.lengths[: len(self.members)]).sum())

    @property
    def last_pairs(self) -> int:
        """Query-key pairs where only the rows that predict something and those after them ask."""
        q = self.query_counts
        own = (q * self.lengths - q * (q - 1) // 2).sum()
        of_groups = np.diff(np.concatenate([[0], np.cumsum(q)])[self.groups])
        return int(own + (of_groups * self.lengths[: len(self.members)]).sum())


@dataclass(frozen=True)
class ToPrefixes:
    """Attention of query rows first:first + rows, group by group, to the first `keys` key rows."""

    first: int
    rows: int
    keys: int
    cu_seqlens_q: Tensor  # [G + 1] int32
    cu_seqlens_k: Tensor  # [G + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Attend:
    """Which rows attend to which: causally to their own sequence, and suffixes to their prefix."""

    cu_seqlens_q: Tensor  # [S + 1] int32
    cu_seqlens_k: Tensor  # [S + 1] int32
    max_seqlen: int
    prefixes: ToPrefixes | None = None
    sees: ops.Sees | None = None  # the same row by row, where `ops.wants_sees`


@dataclass(frozen=True)
class LastRows:
    """The rows that the last layer computes beyond k and v."""

    rows: Tensor  # [R] int64, that predict something
    queries: Tensor  # [Q] int64, those and the rows after them in their sequences
    picked: Tensor | None  # [R] int64, `rows` within `queries`; None: they are the same
    attend: Attend  # of the queries to all rows


@dataclass(frozen=True)
class Pack:
    """Many sequences in one row, and what every layer needs to know about them."""

    positions: Tensor  # [T] int64, restart in every sequence that is no suffix
    attend: Attend
    cos: Tensor  # [T, D/2] fp32
    sin: Tensor  # [T, D/2] fp32
    at: Tensor | None  # [T] int64, index of each token in the flat [B * S] batch; None: no padding
    row_ends: Tensor  # int64, index of the last token of each row that has one


def make_pack(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    max_length: int | None,
    inv_freq: Tensor,
    scaling: float,
    layout: PackLayout | None = None,
) -> Pack:
    """Describe a [B, S] batch as one packed row.

    Args:
        shape: B and S.
        attention_mask: [B, S], 0 where padded, or None.
        position_ids: [B, S] or [1, S] int64, or None for 0..S-1 in every row.
        cu_seq_lens: [sequences + 1] int32, for a batch without padding, or None.
        max_length: the longest sequence, where the collator knows it (else found, with a sync).
        inv_freq: [D/2], RoPE's frequencies; `scaling` multiplies cos and sin.
        layout: of a single row without padding, which has cu_seq_lens and positions by it.

    Raises:
        ValueError: a mask that is not [B, S], a layout of another batch.
    """
    batch, length = shape
    if layout is not None and (batch, length) != (1, layout.edges[-1]):
        raise ValueError(f"layout: of {layout.edges[-1]} tokens, and the batch is {shape}")
    if layout is not None and (attention_mask is not None or position_ids is None):
        raise ValueError("layout: goes with position_ids, and without attention_mask")
    at = None
    columns = torch.arange(length, device=device).expand(batch, length)
    if attention_mask is not None and cu_seq_lens is None:
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; {shape} is wanted, with"
                " 0 where padded (a mask of another kind cannot be trained through)"
            )
        if not attention_mask.all():
            at = attention_mask.flatten().nonzero()[:, 0]
    given = position_ids is not None
    positions = (columns if position_ids is None else position_ids.expand(batch, length)).flatten()
    row = torch.arange(batch, device=device).repeat_interleave(length)
    if at is not None:
        positions, row = positions[at], row[at]
    if layout is not None:
        max_length = int(layout.lengths.max())
    if layout is not None and cu_seq_lens is None:
        cu_seq_lens = torch.from_numpy(layout.edges)
    if cu_seq_lens is not None:
        cu_seqlens = cu_seq_lens.to(device=device, dtype=torch.int32)
    else:
        new = row[1:] != row[:-1]
        if given and attention_mask is None:
            new = new | (positions[1:] != positions[:-1] + 1)
        elif given:
            new = new | (positions[1:] <= positions[:-1])
        edge = torch.tensor([0], device=device), torch.tensor([positions.numel()], device=device)
        cu_seqlens = torch.cat((edge[0], new.nonzero()[:, 0] + 1, edge[1])).int()
    if at is None:
        row_ends = torch.arange(1, batch + 1, device=device) * length - 1
    else:
        counts = torch.bincount(row, minlength=batch)
        row_ends = (counts.cumsum(0) - 1)[counts > 0]
    if max_length is None:
        max_length = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if positions.numel() else 0
    # model.to(bfloat16) narrows this buffer, too; the angles are computed in fp32 all the same
    wide = inv_freq if inv_freq.dtype == torch.float64 else inv_freq.float()
    cos, sin = ops.rope_tables(positions, wide, scaling=scaling)
    prefixes = None if layout is None else _to_prefixes(layout, layout.lengths, device)
    rows, longest = positions.numel(), int(max_length)
    sees = _sees(cu_seqlens, cu_seqlens, rows, rows, longest, layout)
    attend = Attend(cu_seqlens, cu_seqlens, longest, prefixes, sees)
    return Pack(positions, attend, cos, sin, at, row_ends)


def _to_prefixes(layout: PackLayout, counts: np.ndarray, device: torch.device) -> ToPrefixes | None:
    """The attention of suffixes to their prefixes; counts [S]: query rows of each sequence."""
    groups = len(layout.members)
    at = np.concatenate([[0], np.cumsum(counts)])[layout.groups]  # of the groups' queries
    if not groups or at[0] == at[-1]:
        return None
    edges = np.stack([at - at[0], layout.edges[: groups + 1]])
    cu_q, cu_k = send(torch.from_numpy(edges.astype(np.int32)), device)
    longest = int(layout.lengths[:groups].max())
    rows = int(at[-1] - at[0])
    return ToPrefixes(
        int(at[0]), rows, layout.prefix_tokens, cu_q, cu_k, int(np.diff(at).max()), longest
    )


def _sees(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, longest: int,
    layout: PackLayout | None, last: bool = False,
) -> ops.Sees | None:  # fmt: skip
    """Which row sees which, where that is asked for; last: of the rows that the last layer asks."""
    device = cu_seqlens_q.device
    length = longest if layout is None else layout.mean_length
    if not queries or not ops.wants_sees(device, length):
        return None
    sees = ops.sees_causally(cu_seqlens_q, cu_seqlens_k, queries, keys)
    if layout is None or not len(layout.members):
        return sees
    counts = layout.query_counts if last else layout.lengths
    return replace(sees, prefixes=_shared(layout, counts, device))


def _shared(layout: PackLayout, counts: np.ndarray, device: torch.device) -> ops.Prefixes | None:
    """The prefixes' rows, and their queries in chunks; counts [S]: queries of each sequence."""
    groups = len(layout.members)
    edges = np.concatenate([[0], np.cumsum(counts)])
    first, stop = edges[layout.groups[:-1]], edges[layout.groups[1:]]  # of a prefix's suffixes
    if first[0] == stop[-1]:
        return None
    begin, end = layout.edges[:groups], layout.edges[1 : groups + 1]
    sees = np.stack([np.full(edges[-1], ops.NOBODY), np.zeros(edges[-1], np.int64)])
    sees[:, first[0] : stop[-1]] = np.repeat(np.stack([begin, end]), stop - first, axis=1)
    chunks, of, rows = [], [0], 0
    for g in range(groups):
        length = end[g] - begin[g]
        size = max(ops.CHUNK, 8 * length)  # so that the chunks' shares take little memory
        asking = [(at, min(at + size, stop[g])) for at in range(first[g], stop[g], size)]
        if edges[g] < edges[g + 1] or not asking:
            asking.insert(0, (edges[g], edges[g + 1]))  # its own
        for a, b in asking:
            chunks.append((begin[g], end[g], a, b, rows))
            rows += length
        of.append(len(chunks))
    to_see, to_add, places = _send_together([sees, np.array(chunks), np.array(of)], device)
    return ops.Prefixes(
        to_see, to_add, places, longest=int(layout.lengths[:groups].max()),
        keys=layout.prefix_tokens, rows=int(rows),
    )  # fmt: skip


def _send_together(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int32 tables in one transfer. Each begins at a multiple of 16 bytes, whatever the lengths of
    those before it: Triton compiles a kernel anew for a pointer that does not."""
    starts = np.cumsum([0, *(-(-x.size // 4) * 4 for x in parts)]).tolist()
    flat = np.zeros(starts[-1], np.int32)
    for at, x in zip(starts, parts, strict=False):
        flat[at : at + x.size] = x.ravel()
    there = send(torch.from_numpy(flat), device)
    return [there[a : a + x.size].view(x.shape) for a, x in zip(starts, parts, strict=False)]


def last_rows(pack: Pack, rows: Tensor, layout: PackLayout | None) -> LastRows | None:
    """What the last layer computes where only `rows` [R] int64, ascending, are wanted of it.

    None: all of it, as there is nothing to leave out.
    """
    if not rows.numel():
        return None
    edges = pack.attend.cu_seqlens_k.long()
    prefixes = None
    if layout is None:  # asked of the device, which waits for it
        starts, ends = edges[:-1], edges[1:]
        at = torch.searchsorted(rows, starts)
        first = torch.cat((rows, edges[-1:]))[at].minimum(ends)
        counts = ends - first
        queries = _ranges(first, counts, int(counts.sum()))
        cu_seqlens_q = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    else:
        of = layout.query_counts
        cu = torch.from_numpy(np.concatenate([[0], np.cumsum(of)]).astype(np.int32))
        host = torch.from_numpy(of)
        queries = _ranges(torch.from_numpy(layout.edges[1:]) - host, host, int(of.sum()))
        cu_seqlens_q, queries = send(cu, rows.device), send(queries, rows.device)
        prefixes = _to_prefixes(layout, of, rows.device)
    picked = None if len(queries) == len(rows) else torch.searchsorted(queries, rows)
    a = pack.attend
    keys = len(pack.positions)
    sees = _sees(cu_seqlens_q, a.cu_seqlens_k, len(queries), keys, a.max_seqlen, layout, last=True)
    attend = Attend(cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen, prefixes, sees)
    return LastRows(rows, queries, picked, attend)


def _ranges(starts: Tensor, counts: Tensor, total: int) -> Tensor:
    """start, start + 1, ... of every range, end to end: int64 [total]."""
    offsets = starts - (counts.cumsum(0) - counts)
    at = torch.arange(total, device=starts.device)
    return at + offsets.repeat_interleave(counts, output_size=total)


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def next_tokens(labels: Tensor, row_ends: Tensor) -> Tensor:
    """labels [T] -> targets [T]: what each token must predict; -100 at the end of a row."""
    targets = torch.full_like(labels, -100)
    targets[:-1] = labels[1:]
    targets[row_ends] = -100
    return targets


def unpad_labels(
    labels: Tensor, attention_mask: Tensor | None, pack: Pack, *, shifted: bool
) -> Tensor:
    """labels [B, S] -> [T], those of the tokens that are not padding.

    Raises `UserError` for a label that only padding could predict, or a labelled padding: what
    Hugging Face's models make of these depends on the attention implementation.
    """
    flat = labels.flatten()
    if pack.at is None:
        return flat
    assert attention_mask is not None
    padded = attention_mask == 0
    counts = labels != -100
    if (counts & padded).any():
        raise UserError(
            "labels: a padded position carries a label, -100 is wanted there;"
            " DataCollatorForSeq2Seq pads labels so"
        )
    if not shifted and (counts[:, 1:] & padded[:, :-1]).any():
        raise UserError(
            "labels: a token that follows padding carries a label, and no token is there to"
            " predict it: set it to -100, or pad on the right"
        )
    return flat[pack.at]
