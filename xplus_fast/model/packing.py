"""Any batch a Hugging Face model accepts -> one row of T packed tokens.

Packed and padded input mean the same: padding is taken out before the first layer and put back
after the last. Sequences are told apart by, in this order: `cu_seq_lens_q`, the attention mask,
positions that do not go on by one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import xplus_kernels as ops


@dataclass(frozen=True)
class Pack:
    """Many sequences in one row, and what every layer needs to know about them."""

    positions: Tensor  # [T] int64, restart in every sequence
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    cos: Tensor  # [T, D/2] fp32
    sin: Tensor  # [T, D/2] fp32
    at: Tensor | None  # [T] int64, index of each token in the flat [B * S] batch; None: no padding


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
) -> Pack:
    """Describe a [B, S] batch as one packed row.

    Args:
        shape: B and S.
        attention_mask: [B, S], 0 where padded, or None.
        position_ids: [B, S] or [1, S] int64, or None for 0..S-1 in every row.
        cu_seq_lens: [sequences + 1] int32, for a batch without padding, or None.
        max_length: the longest sequence, where the collator knows it (else found, with a sync).
        inv_freq: [D/2], RoPE's frequencies; `scaling` multiplies cos and sin.

    Raises:
        ValueError: a mask that is not [B, S].
    """
    batch, length = shape
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
    if cu_seq_lens is not None:
        cu_seqlens = cu_seq_lens.to(device=device, dtype=torch.int32)
    else:
        new = row[1:] != row[:-1]
        if given:
            new = new | (positions[1:] != positions[:-1] + 1)
        edge = torch.tensor([0], device=device), torch.tensor([positions.numel()], device=device)
        cu_seqlens = torch.cat((edge[0], new.nonzero()[:, 0] + 1, edge[1])).int()
    if max_length is None:
        max_length = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if positions.numel() else 0
    # model.to(bfloat16) narrows this buffer, too; the angles are computed in fp32 all the same
    wide = inv_freq if inv_freq.dtype == torch.float64 else inv_freq.float()
    cos, sin = ops.rope_tables(positions, wide, scaling=scaling)
    return Pack(positions, cu_seqlens, int(max_length), cos, sin, at)


def next_tokens(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """labels [T] -> targets [T]: what each row must predict; -100 at the end of a sequence."""
    targets = torch.full_like(labels, -100)
    targets[:-1] = labels[1:]
    targets[cu_seqlens[1:].long() - 1] = -100
    return targets
