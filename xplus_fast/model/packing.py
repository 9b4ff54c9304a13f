"""Any batch a Hugging Face model accepts -> one row of T packed tokens.

Packed and padded input mean the same: padding is taken out before the first layer and put back
after the last. What attends to what is Hugging Face's rule: `cu_seq_lens_q` if it is given; else
rows, cut further where positions do not go on by one or, beside an attention mask, where they start
again (a mask's positions may jump and still be one sequence). What predicts what is its rule, too:
a token's label is predicted by the token before it in the row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.errors import UserError


@dataclass(frozen=True)
class Pack:
    """Many sequences in one row, and what every layer needs to know about them."""

    positions: Tensor  # [T] int64, restart in every sequence
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
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
    return Pack(positions, cu_seqlens, int(max_length), cos, sin, at, row_ends)


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
