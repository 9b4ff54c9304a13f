"""Two attentions of the same queries over different keys, put together into one over all of them.

A softmax over the keys of both is the mean of the two, weighted by their sums of exponentials (Dao
et al. 2022, arXiv 2205.14135, section 3.1):

    lse' = log(exp(lse) + exp(other_lse))
    out' = out exp(lse - lse') + other_out exp(other_lse - lse')

Handed lse' and out', each attention's own backward makes its share of the gradients: nothing is
merged there but by adding up dq. A side without keys has lse -inf and an out of zeros.

bf16 bytes an element of out, in place, ours = the minimum: 6, and 12 / D of the two lse. Computes
in fp32 and rounds once. Nothing is kept for the backward.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import check_like, check_rows, on_triton


def merge_attention_ref(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    whole = torch.logaddexp(lse, other_lse)  # [N, S]
    at = whole.masked_fill(whole == -torch.inf, 0)  # no key on either side: weights of 0
    mine, others = ((x - at).exp().T[..., None] for x in (lse, other_lse))  # [S, N, 1]
    out.copy_(widen(out) * mine + widen(other_out) * others)
    lse.copy_(whole)


@jit(
    do_not_specialize=("S", "lse_head", "other_lse_head"),
    do_not_specialize_on_alignment=("lse_ptr", "other_lse_ptr"),  # slices of columns
)
def _merge_attention_kernel(
    out_ptr, lse_ptr, other_ptr, other_lse_ptr, S, out_row, lse_head, other_row, other_lse_head,
    N: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out, other [S, N, D], lse, other_lse [N, S]; a program for ROWS rows x GROUP heads."""
    pid = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = N // GROUP
    head = (pid % groups) * GROUP + tl.arange(0, GROUP)[None, :, None]
    s = (pid // groups) * ROWS + tl.arange(0, ROWS)[:, None, None]
    d = tl.arange(0, WIDE)[None, None, :]
    m_s = s < S
    m = m_s & (d < D)  # [ROWS, 1, WIDE]
    lse_ptr += head * lse_head + s
    out_ptr += s * out_row + head * D + d
    a = tl.load(lse_ptr, m_s, 0.0)  # [ROWS, GROUP, 1]
    b = tl.load(other_lse_ptr + head * other_lse_head + s, m_s, 0.0)
    x = tl.load(out_ptr, m, 0.0).to(tl.float32)
    y = tl.load(other_ptr + s * other_row + head * D + d, m, 0.0).to(tl.float32)
    # An lse belongs to all threads of a row: none may store it before all have read it
    tl.debug_barrier()
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    mine = tl.exp(a - top)
    others = tl.exp(b - top)
    total = mine + others  # 1 to 2, or 0 without keys
    tl.store(lse_ptr, top + tl.log(total), m_s)
    merged = (x * mine + y * others) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr, merged.to(out_ptr.dtype.element_ty), m)


def _tiles(heads: int, d: int) -> dict[str, int]:
    """4096 elements a program, 32 a thread: of bf16 four loads of 128 bits from either tensor."""
    group = 8
    while heads % group:
        group //= 2
    wide = triton.next_power_of_2(d)
    return {"ROWS": max(1, 4096 // (group * wide)), "GROUP": group, "WIDE": wide, "num_warps": 4}


def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Turn out and lse, of attention over some keys, into those over the others' keys as well.

    out: [S, N, D], written in place; rows of any stride, contiguous within: a slice of the rows
    of a larger one. lse: [N, S] fp32 (fp64 with fp64), written in place; inner stride 1: a slice of
    the columns. other_out [S, N, D] and other_lse [N, S]: the same queries' over the other keys,
    not changed. Where a side has no keys its lse is -inf and its out 0; where neither has, so is
    the result.

    Raises TypeError or ValueError, naming the argument, where one does not match.
    """
    _check(out, lse, other_out, other_lse)
    if not on_triton(out):
        merge_attention_ref(out, lse, other_out, other_lse)
        return
    s, n, d = out.shape
    if other_out.stride()[1:] != (d, 1):
        other_out = other_out.contiguous()
    if other_lse.stride(1) != 1:
        other_lse = other_lse.contiguous()
    tiles = _tiles(n, d)
    _merge_attention_kernel[(n // tiles["GROUP"] * triton.cdiv(s, tiles["ROWS"]),)](
        out, lse, other_out, other_lse, s,
        out.stride(0), lse.stride(0), other_out.stride(0), other_lse.stride(0), N=n, D=d, **tiles,
    )  # fmt: skip


def _check(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    check_rows("out", out)
    if out.dim() != 3 or out.shape[1] == 0:
        raise ValueError(f"out: shape {list(out.shape)}; allowed: [S, N, D]")
    s, n, d = out.shape
    check_like("other_out", other_out, "out", out, out.shape)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    for name, x in (("lse", lse), ("other_lse", other_lse)):
        if x.shape != (n, s) or x.device != out.device:
            raise ValueError(
                f"{name}: shape {list(x.shape)} on {x.device}; with out of {list(out.shape)} on "
                f"{out.device} it must be {[n, s]} there"
            )
        if x.dtype != wide:
            raise TypeError(f"{name}: dtype {x.dtype}; allowed: float32 (float64 with float64)")
    # What is written in place cannot be copied first
    if s > 0 and out.stride()[1:] != (d, 1):
        raise ValueError(f"out: strides {list(out.stride())}; a row must be contiguous")
    if s > 1 and (lse.stride(1) != 1 or out.stride(0) < n * d):
        strides = f"{list(out.stride())} and {list(lse.stride())}"
        raise ValueError(
            f"out, lse: strides {strides}; rows of out must lie apart, and lse's inner stride must "
            "be 1"
        )


def aot_cases() -> list[Any]:
    """The launches at the heads of Qwen3 0.6B, 8B and 14B: S rows of a pack."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    for size, n in (("0.6B", 16), ("8B", 32), ("14B", 40)):
        tiles = _tiles(n, 128)
        warps = tiles.pop("num_warps")
        out, lse = ("out_ptr", "other_ptr"), ("lse_ptr", "other_lse_ptr")
        numbers = ("S", "out_row", "lse_head", "other_row", "other_lse_head")
        cases.append(
            AotCase(
                _merge_attention_kernel,
                f"merge_attention {size}",
                {
                    **dict.fromkeys(out, "*bf16"),
                    **dict.fromkeys(lse, "*fp32"),
                    **dict.fromkeys(numbers, "i32"),
                },
                {"N": n, "D": 128, **tiles},
                num_warps=warps,
                aligned=(*out, "out_row", "other_row"),  # a slice of lse begins anywhere
            )
        )
    return in_all_dtypes(cases)
