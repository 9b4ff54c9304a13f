"""RMSNorm, alone and after a residual sum: y = w * x / sqrt(mean(x^2) + eps).

Zhang and Sennrich 2019, arXiv 1910.07467. Rounds x * rstd to x's dtype before multiplying by w,
as Hugging Face's Llama and Qwen norms do. The backward rounds once, at the end:
dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dy * w;  dw = sum over rows of dy * x * rstd.

| bf16 bytes an element | ours = minimum | read | written |
|---|---|---|---|
| rms_norm, backward | 4, 6 | x; dy, x | y; dx |
| add_rms_norm, backward | 8, 8 | x, residual; dsummed, dnormed, summed | summed, normed; d |

Kept for the backward: x (or the sum) alone; rstd is one reduction over a row that the backward
reads anyway. A row stays in registers between its reduction and its use: no second read.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton, use_triton
from xplus_kernels.numerics import widen

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def rms_norm_ref(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    f = widen(x)
    rstd = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
    return weight * (f * rstd).to(x.dtype)


def rms_norm_backward_ref(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    dx, dw = _wide_backward(dy, x, weight, eps, need_dw)
    return dx.to(x.dtype), dw


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, rms_norm_ref(summed, weight, eps=eps)


def add_rms_norm_backward_ref(
    dsummed: Tensor | None,
    dnormed: Tensor,
    summed: Tensor,
    weight: Tensor,
    *,
    eps: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None]:
    d, dw = _wide_backward(dnormed, summed, weight, eps, need_dw)
    if dsummed is not None:
        d = d + widen(dsummed)
    return d.to(summed.dtype), dw


def _wide_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    f = widen(x)
    rstd = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    xhat = f * rstd
    dy = widen(dy)
    g = dy * widen(weight)
    dw = (dy * xhat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if need_dw else None
    return (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd, dw


# A row of H columns is two tiles: MAIN, the largest power of two in H, and REST, what is left
# rounded up to one (0: nothing). 5120 = 4096 + 1024: both exact, where one tile would be 8192.
# H is constexpr (one or two values a model), so that a mask vanishes where its tile is exact.


@jit
def normed(x, rstd, w, dtype: tl.constexpr):
    """x * rstd * w, rounded as Hugging Face rounds: before the product with w, and after it."""
    return ((x * rstd).to(dtype).to(tl.float32) * w).to(dtype)


@jit(do_not_specialize=("T",))
def _rms_norm_fwd_kernel(
    x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, T, x_row, x_col, r_row, r_col,
    H: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """x [T, H], residual r [T, H] where ADD -> sum s where ADD, y [T, H]; ROWS rows a program."""
    dtype = y_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    m = rows < T
    a = tl.arange(0, MAIN)[None, :]  # [1, MAIN]
    x_a = tl.load(x_ptr + rows * x_row + a * x_col, m, 0.0).to(tl.float32)
    w_a = tl.load(w_ptr + a).to(tl.float32)
    if ADD:
        x_a += tl.load(r_ptr + rows * r_row + a * r_col, m, 0.0).to(tl.float32)
        tl.store(s_ptr + rows * H + a, x_a.to(dtype), m)
        x_a = x_a.to(dtype).to(tl.float32)  # the norm is of the sum as rounded
    if REST:  # all loads before the first sum, which they need not wait for
        b = MAIN + tl.arange(0, REST)[None, :]
        m_b = m & (b < H)
        x_b = tl.load(x_ptr + rows * x_row + b * x_col, m_b, 0.0).to(tl.float32)
        w_b = tl.load(w_ptr + b, b < H, 0.0).to(tl.float32)
        if ADD:
            x_b += tl.load(r_ptr + rows * r_row + b * r_col, m_b, 0.0).to(tl.float32)
            tl.store(s_ptr + rows * H + b, x_b.to(dtype), m_b)
            x_b = x_b.to(dtype).to(tl.float32)
    squares = tl.sum(x_a * x_a, 1, keep_dims=True)  # [ROWS, 1]
    if REST:
        squares += tl.sum(x_b * x_b, 1, keep_dims=True)
    rstd = tl.rsqrt(squares / H + EPS)
    y_a = normed(x_a, rstd, w_a, dtype)
    tl.store(y_ptr + rows * H + a, y_a, m)
    if REST:
        y_b = normed(x_b, rstd, w_b, dtype)
        tl.store(y_ptr + rows * H + b, y_b, m_b)


@jit(do_not_specialize=("T",))
def _rms_norm_bwd_kernel(
    ds_ptr, dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, T, ds_row, ds_col, dy_row, dy_col, x_row, x_col,
    H: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, NEED_DW: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dy, x [T, H], ds [T, H] where ADD -> dx [T, H]; where NEED_DW, dw [programs, H] fp32.

    Frozen, the grid has a program for each ROWS rows and the loop runs once. Trained, the grid is
    a few programs a multiprocessor, each summing its own rows' dw in registers.
    """
    dtype = dx_ptr.dtype.element_ty
    a = tl.arange(0, MAIN)[None, :]
    if NEED_DW:
        dw_a = tl.zeros((ROWS, MAIN), tl.float32)
    if REST:
        b = MAIN + tl.arange(0, REST)[None, :]
        if NEED_DW:
            dw_b = tl.zeros((ROWS, REST), tl.float32)
    block = tl.program_id(0).to(tl.int64)
    while block * ROWS < T:  # a range over run-time bounds fails in the interpreter on numpy 2.4
        rows = block * ROWS + tl.arange(0, ROWS)[:, None]
        m = rows < T
        x_a = tl.load(x_ptr + rows * x_row + a * x_col, m, 0.0).to(tl.float32)
        dy_a = tl.load(dy_ptr + rows * dy_row + a * dy_col, m, 0.0).to(tl.float32)
        if ADD:  # before the sums, which the loads need not wait for
            ds_a = tl.load(ds_ptr + rows * ds_row + a * ds_col, m, 0.0)
        # From the L1 cache after a program's first rows: in registers it would cost residency
        g_a = dy_a * tl.load(w_ptr + a).to(tl.float32)
        if REST:
            m_b = m & (b < H)
            x_b = tl.load(x_ptr + rows * x_row + b * x_col, m_b, 0.0).to(tl.float32)
            dy_b = tl.load(dy_ptr + rows * dy_row + b * dy_col, m_b, 0.0).to(tl.float32)
            if ADD:
                ds_b = tl.load(ds_ptr + rows * ds_row + b * ds_col, m_b, 0.0)
            g_b = dy_b * tl.load(w_ptr + b, b < H, 0.0).to(tl.float32)
        # Two sums that do not wait for each other: mean(g * xhat) = rstd * mean(g * x)
        squares = tl.sum(x_a * x_a, 1, keep_dims=True)  # [ROWS, 1]
        gx = tl.sum(g_a * x_a, 1, keep_dims=True)
        if REST:
            squares += tl.sum(x_b * x_b, 1, keep_dims=True)
            gx += tl.sum(g_b * x_b, 1, keep_dims=True)
        rstd = tl.rsqrt(squares / H + EPS)
        c = rstd * rstd * rstd * (gx / H)
        dx_a = g_a * rstd - x_a * c
        if ADD:
            dx_a += ds_a.to(tl.float32)
        tl.store(dx_ptr + rows * H + a, dx_a.to(dtype), m)
        if NEED_DW:
            dw_a += dy_a * (x_a * rstd)
        if REST:
            dx_b = g_b * rstd - x_b * c
            if ADD:
                dx_b += ds_b.to(tl.float32)
            tl.store(dx_ptr + rows * H + b, dx_b.to(dtype), m_b)
            if NEED_DW:
                dw_b += dy_b * (x_b * rstd)
        block += tl.num_programs(0)
    if NEED_DW:
        dw_row = dw_ptr + tl.program_id(0).to(tl.int64) * H
        tl.store(dw_row + a, tl.sum(dw_a, 0, keep_dims=True))
        if REST:
            tl.store(dw_row + b, tl.sum(dw_b, 0, keep_dims=True), b < H)


def _tiles(width: int) -> dict[str, int]:
    """How a program walks rows of `width`: tiles, rows at once, warps."""
    main = 1 << (width.bit_length() - 1)
    rest = 1 << (width - main - 1).bit_length() if width > main else 0
    tile = main + rest
    # 8 elements, 128 bits of bf16, are one load of a thread: 4 warps take 1024 at once, which
    # divides both parts of 5120; with 8 warps the part of 1024 would be loads of 64 bits.
    warps = 4 if tile <= 5120 else 8 if tile <= 10240 else 16
    rows = 16
    while rows > 1 and rows * tile > 4096:
        rows //= 2
    return {"ROWS": rows, "MAIN": main, "REST": rest, "num_warps": warps}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 2 where there is none, so that the interpreter walks persistent grids too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    tiles = _tiles(width)
    rows = as_rows(x)
    r = rows if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_fwd_kernel[(triton.cdiv(len(rows), tiles["ROWS"]),)](
        rows, r, weight.contiguous(), s, y, len(rows), *rows.stride(), *r.stride(),
        H=width, EPS=eps, ADD=residual is not None, **tiles,
    )  # fmt: skip
    return s, y


def _launch_bwd(
    ds: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    width = x.shape[-1]
    tiles = _tiles(width)
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    ds_rows = dy_rows if ds is None else as_rows(ds)
    programs = triton.cdiv(len(x_rows), tiles["ROWS"])
    if need_dw:
        # As many as reside at once by their registers (sm_90: 155 a thread at H = 4096, 215 at
        # 5120, more with a sum on older cards): one more would run alone in a second wave.
        per_sm = 2 if ds is not None or width > 4096 else 3
        programs = min(programs, per_sm * multiprocessors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Partial sums, a row a program: no atomics, so that the same batch gives the same bits
    partial = torch.empty((programs, width), device=x.device) if need_dw else dx
    _rms_norm_bwd_kernel[(programs,)](
        ds_rows, dy_rows, x_rows, weight.contiguous(), dx, partial, len(x_rows),
        *ds_rows.stride(), *dy_rows.stride(), *x_rows.stride(),
        H=width, EPS=eps, ADD=ds is not None, NEED_DW=need_dw, **tiles,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dw else None


def as_rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H] of inner stride 0 or 1: a view where strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) in (0, 1) else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalize the last axis. x [..., H], weight [H] -> y [..., H] in x's dtype.

    Raises TypeError or ValueError, naming the argument, where x is not floating point or weight
    does not match it.
    """
    check_rows("x", x)
    check_like("weight", weight, "x", x, x.shape[-1:])
    if not on_triton(x):
        return rms_norm_ref(x, weight, eps=eps)
    return _launch_fwd(x, None, weight, eps)[1]


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `rms_norm`. dy, x [..., H], weight [H] -> dx like x, dw [H] or None.

    Any strides, 0 included. Raises as `rms_norm` does.
    """
    check_rows("x", x)
    check_like("dy", dy, "x", x, x.shape)
    check_like("weight", weight, "x", x, x.shape[-1:])
    if not on_triton(x):
        return rms_norm_backward_ref(dy, x, weight, eps=eps, need_dw=need_dw)
    return _launch_bwd(None, dy, x, weight, eps, need_dw)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [..., H], weight [H] -> summed = x + residual, rms_norm(summed), in x's dtype.

    The norm is of the sum as rounded to x's dtype. Raises as `rms_norm` does.
    """
    check_rows("x", x)
    check_like("residual", residual, "x", x, x.shape)
    check_like("weight", weight, "x", x, x.shape[-1:])
    if not on_triton(x):
        return add_rms_norm_ref(x, residual, weight, eps=eps)
    return _launch_fwd(x, residual, weight, eps)


def add_rms_norm_backward(
    dsummed: Tensor | None,
    dnormed: Tensor,
    summed: Tensor,
    weight: Tensor,
    *,
    eps: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `add_rms_norm`: dsummed or None, dnormed, summed [..., H] -> d, dw [H] or None.

    d [..., H] is the gradient of x and of residual alike: dsummed and the norm's, added before the
    one rounding. Raises as `rms_norm` does.
    """
    check_rows("summed", summed)
    check_like("dnormed", dnormed, "summed", summed, summed.shape)
    check_like("weight", weight, "summed", summed, summed.shape[-1:])
    if dsummed is not None:
        check_like("dsummed", dsummed, "summed", summed, summed.shape)
    if not on_triton(summed):
        return add_rms_norm_backward_ref(dsummed, dnormed, summed, weight, eps=eps, need_dw=need_dw)
    return _launch_bwd(dsummed, dnormed, summed, weight, eps, need_dw)


def on_triton(x: Tensor) -> bool:
    """fp64 is for gradcheck and an empty grid cannot be launched: both take the reference."""
    return x.dtype != torch.float64 and x.numel() > 0 and use_triton(x)


def check_rows(name: str, x: Tensor) -> None:
    """[..., width] with width > 0, of a dtype that the kernels take."""
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: dtype {x.dtype}; allowed: {allowed}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: shape {list(x.shape)}; allowed: [..., width], width > 0")


def check_like(name: str, t: Tensor, model_name: str, model: Tensor, shape: Any) -> None:
    """t has `shape`, and the dtype and device of `model`."""
    if t.shape != shape:
        raise ValueError(
            f"{name}: shape {list(t.shape)}; with {model_name} of {list(model.shape)} it must be "
            f"{list(shape)}"
        )
    if t.dtype != model.dtype:
        raise TypeError(f"{name}: dtype {t.dtype}; {model_name} has {model.dtype}")
    if t.device != model.device:
        raise ValueError(f"{name}: on {t.device}; {model_name} is on {model.device}")


def aot_cases() -> list[Any]:
    """The launches at the hidden sizes of Qwen3 0.6B, 8B and 14B, contiguous."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    pointers: tuple[str, ...]
    rows: tuple[str, ...]
    for size, width in (("0.6B", 1024), ("8B", 4096), ("14B", 5120)):
        tiles = _tiles(width)
        warps = tiles.pop("num_warps")
        for add in (False, True):
            name = "add_rms_norm" if add else "rms_norm"
            fixed = {"H": width, "EPS": 1e-6, "ADD": add, **tiles}
            pointers = ("x_ptr", "r_ptr", "w_ptr", "s_ptr", "y_ptr")
            rows = ("x_row", "r_row")
            cases.append(
                AotCase(
                    _rms_norm_fwd_kernel,
                    f"{name} forward {size}",
                    {**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(("T", *rows), "i32")},
                    {"x_col": 1, "r_col": 1, **fixed},
                    num_warps=warps,
                    aligned=(*pointers, *rows),
                )
            )
            pointers = ("ds_ptr", "dy_ptr", "x_ptr", "w_ptr", "dx_ptr", "dw_ptr")
            rows = ("ds_row", "dy_row", "x_row")
            for need_dw in (False, True):
                signature = dict.fromkeys(pointers, "*bf16")
                signature |= {"dw_ptr": "*fp32" if need_dw else "*bf16"}
                signature |= dict.fromkeys(("T", *rows), "i32")
                columns = {"ds_col": 1, "dy_col": 1, "x_col": 1, "NEED_DW": need_dw}
                cases.append(
                    AotCase(
                        _rms_norm_bwd_kernel,
                        f"{name} backward {'trained' if need_dw else 'frozen'} {size}",
                        signature,
                        {**columns, **fixed},
                        num_warps=warps,
                        aligned=(*pointers, *rows),
                    )
                )
    return in_all_dtypes(cases)
