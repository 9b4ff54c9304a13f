"""Linear head and cross-entropy without ever holding all logits.

    logits = x @ W.T                               [R, V], a chunk of rows at a time
    loss   = sum(lse(logits) - logits[target]) / max(divisor, 1)
    dx     = (softmax(logits) - onehot) / max(divisor, 1) @ W,    dW = (...).T @ x

The GEMMs are torch.mm. One kernel turns a chunk of logits, in the GEMM's dtype, into its own
gradient in place. It reads the logits twice (statistics, gradient) and writes them once: 3 elements
moved where 2 are the minimum, the second reading walking back so that the row's end is still in
the cache; bf16: 6 bytes a logit, where the two GEMMs do 4 H operations. Softmax is fp32 inside;
the logits round to the dtype before it and the gradient after it, as in Hugging Face's loss.

A frozen head may be FP8 rows: an eighth of it at a time is read back into the dtype of x, for the
logits and for dx of each chunk, so that no card needs FP8 GEMMs for it and x stays exact.

Making the gradient in the forward is the idea of Liger-Kernel's FusedLinearCrossEntropy (arXiv
2410.10989); the online softmax is that of Milakov and Gimelshein (arXiv 1805.02867). Saved for the
backward: nothing but dx and dw.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton, use_triton
from xplus_kernels.fp8 import Fp8Rows, check_fp8_rows, dequantize_fp8
from xplus_kernels.numerics import widen
from xplus_kernels.weight_gradient import weight_gradient

# Cap for one chunk of logits, in their own dtype: 1024 rows of Qwen3's. On an H100 the gradient's
# GEMM over 1408 or 1664 rows leaves its last wave half empty.
LOGITS_BYTES = 300 * 2**20
FP8_LOGITS_BYTES = 512 * 2**20  # of a head that is unpacked for each chunk
LEAST_ROWS = 1024  # a chunk is not cut skinnier: a small GEMM would waste the hardware
ROW_TILE = 128  # chunks are multiples of a GEMM's tile
HEAD_TILES = 8  # pieces in which an FP8 head is read back
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def row_chunks(
    rows: int, vocabulary: int, element_size: int, logits_bytes: int
) -> list[tuple[int, int]]:
    """[start, end) of chunks: tiles of 128 rows, as many as the cap allows, then what is left."""
    most = max(LEAST_ROWS, logits_bytes // (element_size * vocabulary))
    most -= most % min(ROW_TILE, most)
    return [(a, min(rows, a + most)) for a in range(0, rows, most)]


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor | Fp8Rows, targets: Tensor, *, divisor: Tensor,
    need_dx: bool, need_dw: bool, ignore_index: int, logits_bytes: int, losses: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_cross_entropy` in PyTorch; divisor [] is at least 1."""
    loss = torch.zeros((), dtype=widen(x[:0]).dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    vocabulary = head_shape(weight)[0]
    dw = torch.zeros(head_shape(weight), dtype=loss.dtype, device=x.device) if need_dw else None
    head = _Head(weight, x.dtype)
    for a, b in row_chunks(x.shape[0], vocabulary, x.element_size(), logits_bytes):
        part, target = x[a:b], targets[a:b]
        counted = target != ignore_index
        at = target.where(counted, 0)[:, None]
        buffer = torch.empty(b - a, vocabulary, dtype=x.dtype, device=x.device)
        logits = widen(head.logits(part, buffer))  # [chunk, V]
        logits -= logits.amax(-1, keepdim=True)
        target_logits = logits.gather(1, at)
        total = logits.exp_().sum(-1, keepdim=True)
        of_rows = (total.log() - target_logits)[:, 0].where(counted, 0)
        loss += of_rows.sum()
        if losses is not None:
            losses[a:b] = of_rows
        if dx is None and dw is None:
            continue
        # d(loss)/d(logits) = softmax - onehot, over the chunk itself
        share = (counted.to(logits.dtype) / divisor)[:, None]
        grad = logits.mul_(share / total)
        grad.scatter_add_(1, at, -share)
        grad = grad.to(x.dtype)
        if dx is not None:
            head.dx(grad, dx[a:b])
        if dw is not None:
            dw += grad.T @ part  # [V, chunk] @ [chunk, H], summed over the chunks in fp32
    return loss / divisor, dx, None if dw is None else dw.to(x.dtype)


def head_shape(weight: Tensor | Fp8Rows) -> tuple[int, int]:
    """V, H."""
    v, h = (weight.data if isinstance(weight, Fp8Rows) else weight).shape
    return v, h


class _Head:
    """A head [V, H] as its products take it, chunk by chunk.

    FP8 rows are read back a piece at a time, each into the place of the one before. The pieces are
    gone through to and fro, so that the one which is there is used twice.
    """

    def __init__(self, weight: Tensor | Fp8Rows, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.at: tuple[int, int] | None = None  # rows of it that are in the buffer

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Rows [start, end), and these in `dtype`."""
        v, h = head_shape(self.weight)
        if isinstance(self.weight, Tensor):
            yield 0, v, self.weight
            return
        size = -(-v // HEAD_TILES)
        if self.at is None:
            self.buffer = torch.empty(size, h, dtype=self.dtype, device=self.weight.data.device)
        parts = [(a, min(v, a + size)) for a in range(0, v, size)]
        for a, b in parts if self.at in (None, parts[0]) else reversed(parts):
            tile = self.buffer[: b - a]
            if self.at != (a, b):
                rows = Fp8Rows(self.weight.data[a:b], self.weight.scale[a:b])
                dequantize_fp8(rows, out=tile)
            self.at = a, b
            yield a, b, tile

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """x [chunk, H] -> logits = x @ W.T in out [chunk, V]."""
        for a, b, tile in self.pieces():
            torch.mm(x, tile.T, out=out[:, a:b])
        return out

    def dx(self, grad: Tensor, out: Tensor) -> None:
        """grad [chunk, V] -> grad @ W in out [chunk, H]; of pieces the sum, in fp32."""
        if isinstance(self.weight, Tensor):
            torch.mm(grad, self.weight, out=out)
            return
        total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        for i, (a, b, tile) in enumerate(self.pieces()):
            weight_gradient(grad[:, a:b].T, tile, total, add=i > 0)
        out.copy_(total)


def head_logits(x: Tensor, weight: Tensor | Fp8Rows, out: Tensor) -> Tensor:
    """x [rows, H] -> logits = x @ W.T in out [rows, V]."""
    return _Head(weight, x.dtype).logits(x, out)


@jit(do_not_specialize_on_alignment=("targets_ptr", "losses_ptr"))  # a chunk of the rows each
def _softmax_gradient_kernel(
    logits_ptr,  # [rows, V], becomes the gradient
    targets_ptr,  # [rows] int64
    losses_ptr,  # [rows] fp32, lse - logits[target], 0 where ignored
    scale_ptr,  # [] fp32, 1 / divisor
    vocabulary,
    stride_row,
    stride_target,
    ignore_index,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row. 14 134 rows of 151 936 logits pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride_row
    lane = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row * stride_target)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRAD:
            zeros = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
            i = 0
            while i * BLOCK < vocabulary:
                o_x = i * BLOCK + lane
                tl.store(x_ptr + o_x, zeros, mask=o_x < vocabulary)
                i += 1
    else:
        # A target out of range makes the loss NaN, as nothing here may wait for the device to ask.
        inside = (target >= 0) & (target < vocabulary)
        b_target = tl.load(x_ptr + target, mask=inside, other=float("nan")).to(tl.float32)

        # Each lane keeps its own maximum and sum: no reduction across lanes within the loop.
        # Of exp(x - new_max) and exp(max - new_max) one is 1, the other exp(-|x - max|).
        b_max = tl.full([BLOCK], -3.0e38, dtype=tl.float32)  # finite: -inf - -inf is NaN
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        i = 0  # no range() over run-time bounds: the interpreter fails on it with numpy 2.4
        while i * BLOCK < vocabulary:
            o_x = i * BLOCK + lane
            b_x = tl.load(
                x_ptr + o_x, mask=o_x < vocabulary, other=-float("inf"),
                eviction_policy="evict_last",
            ).to(tl.float32)  # fmt: skip
            above = b_x - b_max
            smaller = tl.exp(-tl.abs(above))
            b_sum = tl.where(above > 0, b_sum * smaller + 1.0, b_sum + smaller)
            b_max = tl.where(above > 0, b_x, b_max)
            i += 1
        row_max = tl.max(b_max, axis=0)
        lse = row_max + tl.log(tl.sum(b_sum * tl.exp(b_max - row_max), axis=0))
        tl.store(losses_ptr + row, lse - b_target)

        if NEED_GRAD:
            scale = tl.load(scale_ptr)
            while i > 0:
                i -= 1
                o_x = i * BLOCK + lane
                m_x = o_x < vocabulary
                b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
                b_grad = tl.exp(b_x.to(tl.float32) - lse)
                b_grad = tl.where(o_x == target, b_grad - 1.0, b_grad) * scale
                tl.store(x_ptr + o_x, b_grad.to(logits_ptr.dtype.element_ty), mask=m_x)


def _launch_table(vocabulary: int, element_size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): 32 bytes a thread in flight, 512 threads where a row is that long."""
    block = min(16384 // element_size, max(128, triton.next_power_of_2(vocabulary)))
    return block, max(1, min(16, block // 256))


def _softmax_gradient(
    logits: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, ignore_index: int, grad: bool
) -> None:
    block, warps = _launch_table(logits.shape[1], logits.element_size())
    _softmax_gradient_kernel[(logits.shape[0],)](
        logits, targets, losses, scale, logits.shape[1], logits.stride(0), targets.stride(0),
        ignore_index, NEED_GRAD=grad, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _fused(
    x: Tensor, weight: Tensor | Fp8Rows, targets: Tensor, *, divisor: Tensor,
    need_dx: bool, need_dw: bool, ignore_index: int, logits_bytes: int, losses: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    rows, vocabulary = x.shape[0], head_shape(weight)[0]
    if losses is None:
        losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dw = torch.zeros(head_shape(weight), device=x.device) if need_dw else None
    chunks = row_chunks(rows, vocabulary, x.element_size(), logits_bytes)
    # one buffer for all chunks
    longest = max((b - a for a, b in chunks), default=0)
    buffer = torch.empty(longest, vocabulary, dtype=x.dtype, device=x.device)
    scale, head = divisor.reciprocal(), _Head(weight, x.dtype)
    for a, b in chunks:
        logits = head.logits(x[a:b], buffer[: b - a])
        _softmax_gradient(
            logits, targets[a:b], losses[a:b], scale, ignore_index, need_dx or need_dw
        )
        if dx is not None:
            head.dx(logits, dx[a:b])
        if dw is not None:
            dw += logits.T @ x[a:b]  # [V, chunk] @ [chunk, H], summed over the chunks in fp32
    return losses.sum() / divisor, dx, None if dw is None else dw.to(x.dtype)


@torch.no_grad()
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor | Fp8Rows,
    targets: Tensor,
    *,
    divisor: Tensor | float,
    need_dx: bool = True,
    need_dw: bool = False,
    ignore_index: int = -100,
    logits_bytes: int | None = None,
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the rows' cross-entropies over max(divisor, 1), and its gradients.

    Args:
        x: [R, H], the rows to predict from, in bf16, fp16, fp32 or fp64.
        weight: [V, H], the head, of x's dtype; or FP8 rows of it, frozen (x not fp64).
        targets: [R] int64, `ignore_index` where a row is not to be counted.
        divisor: what the sum is divided by: the supervised tokens of the whole optimizer step. A
            tensor [] on x's device is not waited for.
        need_dx, need_dw: which gradients to make.
        logits_bytes: cap for a chunk of logits, though one of 1024 rows is always allowed
            (at V = 151 936: 297 MiB in bf16, 594 MiB in fp32). None: 300 MiB, of an FP8 head 512.
        losses: [R] fp32, to be filled with each row's cross-entropy, 0 where it is not counted.

    Returns:
        loss [] fp32 (fp64 for fp64), dx [R, H] like x or None, dw [V, H] like weight or None.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit.
    """
    if logits_bytes is None:
        logits_bytes = FP8_LOGITS_BYTES if isinstance(weight, Fp8Rows) else LOGITS_BYTES
    _check(x, weight, targets, divisor, need_dw, logits_bytes, losses)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(divisor, Tensor):
        divisor = divisor.to(device=x.device, dtype=wide).reshape(())
    else:  # torch.full is a kernel; torch.tensor would be a copy that waits
        divisor = torch.full((), float(divisor), dtype=wide, device=x.device)
    run = _fused if x.dtype != torch.float64 and use_triton(x) else linear_cross_entropy_ref
    return run(
        x, weight, targets, divisor=divisor.clamp(min=1), need_dx=need_dx, need_dw=need_dw,
        ignore_index=ignore_index, logits_bytes=logits_bytes, losses=losses,
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor | Fp8Rows, targets: Tensor, divisor: Tensor | float, need_dw: bool,
    logits_bytes: int, losses: Tensor | None,
) -> None:  # fmt: skip
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: bfloat16, float16, float32, float64")
    head = weight.data if isinstance(weight, Fp8Rows) else weight
    if isinstance(weight, Fp8Rows):
        check_fp8_rows("weight", weight)
        if x.dtype == torch.float64 or need_dw:
            raise ValueError(f"weight is FP8: x is {x.dtype}, need_dw {need_dw}; it is frozen")
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}; it must be of x's dtype, {x.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}; allowed: int64")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [R, H]")
    if head.dim() != 2 or head.shape[1] != x.shape[1] or not head.shape[0]:
        raise ValueError(f"weight has shape {tuple(head.shape)}; it must be [V, {x.shape[1]}]")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; it must be [{x.shape[0]}]")
    if losses is not None and (losses.dtype, losses.shape) != (torch.float32, x.shape[:1]):
        found = f"{losses.dtype}, of shape {tuple(losses.shape)}"
        raise ValueError(f"losses is {found}; it must be float32, [{x.shape[0]}]")
    if losses is not None and not losses.is_contiguous():
        raise ValueError("losses is not contiguous")
    for name, tensor in (("weight", head), ("targets", targets), ("losses", losses)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")
    if isinstance(divisor, Tensor) and divisor.numel() != 1:
        raise ValueError(f"divisor has shape {tuple(divisor.shape)}; it must be one number")
    if logits_bytes < 1:
        raise ValueError(f"logits_bytes is {logits_bytes}; it must be positive")


def aot_cases() -> list[Any]:
    """What the launch table launches, for the ahead-of-time check."""
    from xplus_kernels.aot import AotCase

    cases = []
    # Qwen3's vocabulary is the same in all sizes
    for dtype, element_size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        block, warps = _launch_table(151_936, element_size)
        for grad in (True, False):
            cases.append(
                AotCase(
                    kernel=_softmax_gradient_kernel,
                    name=f"linear_cross_entropy {dtype}{'' if grad else ' loss only'}",
                    signature={
                        "logits_ptr": f"*{dtype}",
                        "targets_ptr": "*i64",
                        "losses_ptr": "*fp32",
                        "scale_ptr": "*fp32",
                        "vocabulary": "i32",
                        "stride_row": "i32",
                        "stride_target": "i32",
                        "ignore_index": "i32",
                    },
                    constexprs={"NEED_GRAD": grad, "BLOCK": block},
                    num_warps=warps,
                    aligned=("logits_ptr", "vocabulary", "stride_row"),
                )
            )
    return cases
