"""FP8 (e4m3): rows quantized with a scale each, read back, and a weight transposed.

For a row x of W columns, amax = max(max |x_i|, 1e-12):
scale = amax / 448, data_i = e4m3(clamp(x_i * (1 / scale), -448, 448)), x ~ data * scale.
Both divisions are IEEE's, one each a row, and an element takes a product with the reciprocal, in
the reference and in the kernels alike: the same bits wherever the op runs. The cast rounds to
nearest even. A row with inf or NaN gets that as its scale and reads back as NaN throughout: an
overflow stays seen.

| bytes an element | ours = minimum | read | written |
|---|---|---|---|
| quantize_fp8 of bf16 | 3 | x | data |
| transpose_fp8 | 2 | w | out |
| dequantize_fp8 to bf16 | 3 | data | out |

A row stays in registers between its amax and the cast. Nothing here is differentiated.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton, use_triton
from xplus_kernels.rms_norm import _tiles, as_rows, check_rows, on_triton

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3
AMAX_FLOOR = 1e-12  # a row of zeros has a scale too
WIDEST = 1 << 16  # columns: a program holds a whole row in registers


class Fp8Rows(NamedTuple):
    """x [T, W] ~ data * scale[:, None]."""

    data: Tensor  # [T, W] e4m3, contiguous
    scale: Tensor  # [T] fp32: max(amax of the row, AMAX_FLOOR) / FP8_MAX


def quantize_fp8_ref(x: Tensor, column_scale: Tensor | None = None) -> Fp8Rows:
    f = x.reshape(-1, x.shape[-1]).float()
    if column_scale is not None:
        f = f * column_scale
    amax = f.abs().amax(-1).clamp_min(AMAX_FLOOR)
    # CUDA divides by a Python number through its reciprocal, which rounds once more
    scale = amax / torch.full_like(amax, FP8_MAX)
    q = f * scale.reciprocal()[:, None]
    return Fp8Rows(q.clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous(), scale)


def transpose_fp8_ref(w: Tensor, out: Tensor) -> Tensor:
    out.view(torch.uint8).copy_(w.view(torch.uint8).T)
    return out


def dequantize_fp8_ref(rows: Fp8Rows, out: Tensor) -> Tensor:
    return out.copy_(rows.data.float() * rows.scale[:, None])


@jit
def amax_bits(x):
    """x [ROWS, COLUMNS] fp32 -> the bits of its rows' max |x|, as int32: [ROWS, 1], of one row a
    scalar.

    Without the sign, floats lie in the order of their bits, NaN above all: a maximum of floats
    would drop NaN. A scalar has no layout: where two tiles of a row have two, Triton 3.9 would
    bring the wide one into the other's, through shared memory, to compare [1, 1] with [1, 1].
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if x.shape[0] == 1:
        return tl.max(bits)
    else:
        return tl.max(bits, 1, keep_dims=True)


@jit
def scale_of(bits, FLOOR: tl.constexpr = AMAX_FLOOR, LARGEST: tl.constexpr = FP8_MAX):
    """`amax_bits` -> the row's scale."""
    amax = bits.to(tl.float32, bitcast=True)
    amax = tl.maximum(amax, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.div_rn(amax, LARGEST)


@jit
def to_fp8(x, inverse, dtype: tl.constexpr, LARGEST: tl.constexpr = FP8_MAX):
    """x fp32, `inverse` = 1 / scale -> e4m3."""
    q = x * inverse
    return tl.clamp(q, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@jit(do_not_specialize=("T",))
def _quantize_fp8_kernel(
    x_ptr, c_ptr, q_ptr, s_ptr, T, x_row, x_col, c_col,
    W: tl.constexpr, COLUMN_SCALE: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """x [T, W], c [W] where COLUMN_SCALE -> q [T, W] e4m3, s [T]; ROWS rows a program."""
    dtype = q_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    m = rows < T
    # Said to be contiguous by 8, the stores take the layout of the bf16 loads, 8 columns a thread.
    # By 16, as 128 bits of e4m3 would be, they would impose theirs on the loads and, in a norm, on
    # the order of its sum.
    a = tl.max_contiguous(tl.arange(0, MAIN)[None, :], (1, 8))
    x_a = tl.load(x_ptr + rows * x_row + a * x_col, m, 0.0).to(tl.float32)
    if REST:  # all loads before the maximum, which they need not wait for
        b = tl.max_contiguous(MAIN + tl.arange(0, REST)[None, :], (1, 8))
        m_b = m & (b < W)
        x_b = tl.load(x_ptr + rows * x_row + b * x_col, m_b, 0.0).to(tl.float32)
    if COLUMN_SCALE:
        x_a *= tl.load(c_ptr + a * c_col)
        if REST:
            x_b *= tl.load(c_ptr + b * c_col, b < W, 0.0)
    bits = amax_bits(x_a)
    if REST:
        bits = tl.maximum(bits, amax_bits(x_b))
    scale = scale_of(bits)
    tl.store(s_ptr + rows, scale, m)
    inverse = tl.div_rn(1.0, scale)
    tl.store(q_ptr + rows * W + a, to_fp8(x_a, inverse, dtype), m)
    if REST:
        tl.store(q_ptr + rows * W + b, to_fp8(x_b, inverse, dtype), m_b)


@jit
def _transpose_kernel(
    w_ptr, out_ptr, N, K, w_row, w_col, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    """w [N, K] -> out [K, N], bytes; a program for each tile, through shared memory."""
    pid = tl.program_id(0).to(tl.int64)
    # Neighbours share rows of the output: their stores complete its lines in the L2 cache
    n = (pid % tl.cdiv(N, TILE_N)) * TILE_N + tl.arange(0, TILE_N)
    k = (pid // tl.cdiv(N, TILE_N)) * TILE_K + tl.arange(0, TILE_K)
    m = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(w_ptr + n[:, None] * w_row + k[None, :] * w_col, m, 0)
    tl.store(out_ptr + k[:, None] * N + n[None, :], tl.trans(tile), tl.trans(m))


@jit
def _dequantize_fp8_kernel(q_ptr, s_ptr, y_ptr, W: tl.constexpr, BLOCK: tl.constexpr):
    """q [T, W] as bytes, s [T] -> y [T, W]; a program for each BLOCK columns of a row.

    Decodes by bits, exactly, since sm_80 has no e4m3: its 4 + 3 bits of exponent and mantissa at
    the head of fp16's 5 + 10 are the value times 2^-8, subnormals included.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tl.cdiv(W, BLOCK)
    cols = (pid % tl.cdiv(W, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    m = cols < W
    byte = tl.load(q_ptr + row * W + cols, m, 0).to(tl.uint16)
    magnitude = byte & 0x7F
    half = ((byte & 0x80) << 8) | (magnitude << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    value = tl.where(magnitude == 0x7F, float("nan"), value)  # e4m3 has one NaN, no inf
    y = value * tl.load(s_ptr + row)
    tl.store(y_ptr + row * W + cols, y.to(y_ptr.dtype.element_ty), m)


def row_tiles(width: int) -> dict[str, int]:
    """How a program holds rows of `width`: as the norms do, so that a norm's sum is in one order
    with FP8 and without; twice the warps above what they meet."""
    tiles = _tiles(width)
    if tiles["MAIN"] + tiles["REST"] > 20480:
        tiles["num_warps"] = 32
    return tiles


def empty_rows(rows: int, width: int, device: torch.device) -> Fp8Rows:
    """For a kernel to fill."""
    data = torch.empty((rows, width), dtype=FP8, device=device)
    return Fp8Rows(data, torch.empty(rows, device=device))


def quantize_fp8(x: Tensor, *, column_scale: Tensor | None = None) -> Fp8Rows:
    """Quantize each row to e4m3 with a scale of its own.

    x [..., W], floating point, any strides, 0 included; leading axes are flattened.
    column_scale [W] fp32 is multiplied in, in fp32, before the row's amax is taken: with the
    frozen weight W's own row scales, quantized dy is dX's left operand, dX = dy @ data of W.

    Raises TypeError or ValueError, naming the argument, where x or column_scale is not so, where
    W > 65536, and where x is on a card without FP8.
    """
    check_rows("x", x)
    width = x.shape[-1]
    check_width("x", x, width)
    if column_scale is not None:
        check_column_scale(column_scale, "x", x, width)
    require_fp8(x.device)
    if not on_triton(x):
        return quantize_fp8_ref(x, column_scale)
    rows, tiles = as_rows(x), row_tiles(width)
    made = empty_rows(len(rows), width, x.device)
    c = made.scale if column_scale is None else column_scale
    _quantize_fp8_kernel[(triton.cdiv(len(rows), tiles["ROWS"]),)](
        rows, c, *made, len(rows), *rows.stride(), *c.stride(),
        W=width, COLUMN_SCALE=column_scale is not None, **tiles,
    )  # fmt: skip
    return made


def transpose_fp8(w: Tensor, *, out: Tensor | None = None) -> Tensor:
    """w [N, K] e4m3, any strides -> [K, N] e4m3, contiguous, the same bits; in `out` where given.

    Raises TypeError or ValueError, naming the argument, where w or out is not so. Works on every
    card: bytes are moved.
    """
    if w.dtype != FP8:
        raise TypeError(f"w: dtype {w.dtype}; allowed: {FP8}")
    if w.dim() != 2:
        raise ValueError(f"w: shape {list(w.shape)}; allowed: [N, K]")
    n, k = w.shape
    if out is None:
        out = torch.empty((k, n), dtype=FP8, device=w.device)
    else:
        if out.dtype != FP8:
            raise TypeError(f"out: dtype {out.dtype}; allowed: {FP8}")
        _check_out(out, "w", w, (k, n))
    if w.numel() == 0 or not use_triton(w):
        return transpose_fp8_ref(w, out)
    tiles = _transpose_tiles()
    programs = triton.cdiv(n, tiles["TILE_N"]) * triton.cdiv(k, tiles["TILE_K"])
    _transpose_kernel[(programs,)](
        w.view(torch.uint8), out.view(torch.uint8), n, k, *w.stride(), **tiles
    )
    return out


def dequantize_fp8(rows: Fp8Rows, *, out: Tensor) -> Tensor:
    """data * scale, in fp32 and rounded once, into out [T, W] bf16, fp16 or fp32, contiguous.

    For cards without an FP8 GEMM, and for tests; works on every card. Returns out. Raises
    TypeError or ValueError, naming the argument, where rows or out are not so.
    """
    check_fp8_rows("rows", rows)
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"out: dtype {out.dtype}; allowed: bfloat16, float16, float32")
    _check_out(out, "rows.data", rows.data, tuple(rows.data.shape))
    if rows.data.numel() == 0 or not use_triton(out):
        return dequantize_fp8_ref(rows, out)
    t, width = rows.data.shape
    tile = _dequantize_tile(width)
    _dequantize_fp8_kernel[(t * triton.cdiv(width, tile["BLOCK"]),)](
        rows.data.view(torch.uint8), rows.scale, out, W=width, **tile
    )
    return out


def require_fp8(device: torch.device) -> None:
    """Raises ValueError where `device` is a CUDA card whose capability is below 8.9."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"{device}: {name} has capability {capability[0]}.{capability[1]}; FP8 needs 8.9 or "
            "higher (Ada, Hopper, Blackwell): use the bf16 or nf4 format"
        )


def check_width(name: str, x: Tensor, width: int) -> None:
    if width > WIDEST:
        raise ValueError(
            f"{name}: shape {list(x.shape)}; FP8 rows of {width} columns, allowed: up to {WIDEST}"
        )


def check_column_scale(scale: Tensor, name: str, x: Tensor, width: int) -> None:
    """[width] fp32, on x's device."""
    if scale.dtype != torch.float32:
        raise TypeError(f"column_scale: dtype {scale.dtype}; allowed: torch.float32")
    if scale.shape != (width,):
        raise ValueError(
            f"column_scale: shape {list(scale.shape)}; with {name} of {list(x.shape)} it must be "
            f"{[width]}"
        )
    if scale.device != x.device:
        raise ValueError(f"column_scale: on {scale.device}; {name} is on {x.device}")


def check_fp8_rows(name: str, rows: Fp8Rows) -> None:
    """What `quantize_fp8` makes."""
    data, scale = rows
    if data.dtype != FP8:
        raise TypeError(f"{name}.data: dtype {data.dtype}; allowed: {FP8}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}.scale: dtype {scale.dtype}; allowed: torch.float32")
    if data.dim() != 2 or scale.shape != data.shape[:1]:
        raise ValueError(
            f"{name}: data {list(data.shape)}, scale {list(scale.shape)}; allowed: [T, W] and [T]"
        )
    if not (data.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"{name}: strides {data.stride()} and {scale.stride()}; they must be contiguous"
        )
    if scale.device != data.device:
        raise ValueError(f"{name}.scale: on {scale.device}; {name}.data is on {data.device}")


def _check_out(out: Tensor, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise ValueError(
            f"out: shape {list(out.shape)}; with {name} of {list(t.shape)} it must be {list(shape)}"
        )
    if out.device != t.device:
        raise ValueError(f"out: on {out.device}; {name} is on {t.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: strides {out.stride()}; it must be contiguous")


def _transpose_tiles() -> dict[str, int]:
    return {"TILE_N": 128, "TILE_K": 64, "num_warps": 4}


def _dequantize_tile(width: int) -> dict[str, int]:
    """16 bytes, one load of 128 bits, a thread; 1024 divides the K of every Qwen3's weights."""
    block = 1024 if width % 1024 == 0 else 512
    return {"BLOCK": block, "num_warps": block // 512}


# Qwen3's hidden, heads * head_dim, (heads + 2 kv_heads) * head_dim, ffn
AOT_SIZES = {
    "0.6B": (1024, 2048, 4096, 3072),
    "8B": (4096, 4096, 6144, 12288),
    "14B": (5120, 5120, 7168, 17408),
}


def aot_cases() -> list[Any]:
    """The launches of Qwen3 0.6B, 8B and 14B, contiguous."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    pointers: tuple[str, ...]
    for size, (_, attention, qkv, f) in AOT_SIZES.items():
        # Attention's output, the gradient of qkv, the widest weight
        for what, width, column in (("o", attention, 0), ("dqkv", qkv, 1), ("weight", f, 0)):
            tiles = row_tiles(width)
            pointers = ("x_ptr", "c_ptr", "q_ptr", "s_ptr")
            types = ("*bf16", "*fp32", "*fp8e4nv", "*fp32")
            cases.append(
                AotCase(
                    _quantize_fp8_kernel,
                    f"quantize_fp8 {what} {size}",
                    {**dict(zip(pointers, types, strict=True)), "T": "i32", "x_row": "i32"},
                    {"x_col": 1, "c_col": 1, "W": width, "COLUMN_SCALE": bool(column)}
                    | {name: tiles[name] for name in ("ROWS", "MAIN", "REST")},
                    num_warps=tiles["num_warps"],
                    least=89,
                    aligned=(*pointers, "x_row"),
                )
            )
        tile = _dequantize_tile(f)
        cases.append(
            AotCase(
                _dequantize_fp8_kernel,
                f"dequantize_fp8 {size}",
                {"q_ptr": "*u8", "s_ptr": "*fp32", "y_ptr": "*bf16"},
                {"W": f, "BLOCK": tile["BLOCK"]},
                num_warps=tile["num_warps"],
                aligned=("q_ptr", "s_ptr", "y_ptr"),
            )
        )
    tiles = _transpose_tiles()
    cases.append(
        AotCase(
            _transpose_kernel,
            "transpose_fp8",  # N and K are run-time: one compilation for every weight
            {"w_ptr": "*u8", "out_ptr": "*u8", "N": "i32", "K": "i32", "w_row": "i32"},
            {"w_col": 1, "TILE_N": tiles["TILE_N"], "TILE_K": tiles["TILE_K"]},
            num_warps=tiles["num_warps"],
            aligned=("w_ptr", "out_ptr", "N", "K", "w_row"),
        )
    )
    return in_all_dtypes(cases)
