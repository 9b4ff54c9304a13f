"""AdamW in one pass over memory: fp32 or 8-bit states, fp32 master or stochastic rounding.

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    p = p - lr decay p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

That is torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), operation for operation.

Bytes moved a bf16 parameter, each read and written once, which is the minimum: fp32 states and
master 28 (2 + 2 parameter and gradient, 24 m, v and master); 8-bit states without a master 10.03.

8-bit states are codes by blocks of 256 (`blockwise.py`): signed for m, unsigned for v.

Without a master, a bf16 parameter is rounded up with the probability of the part cut off, by 16
random bits out of Philox 4x32-10 (Salmon and others 2011): one call serves 8 neighbours. Its key
is made of seed, step and parameter, its counter is the place: a resumed run draws the same bits.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, use_triton
from xplus_kernels.blockwise import (
    QUANTUM,
    code_tables,
    dequantize_blockwise,
    quantize_blockwise,
    quantize_codes,
)

WIDE = (torch.float32, torch.float64)


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Philox 4x32-10: four random words of 32 bits, in int64; counter: ints or int64 tensors."""
    c0, c1, c2, c3 = counter
    mask = 0xFFFFFFFF
    k0, k1 = key & mask, key >> 32 & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # their 64 bits are right though int64 wraps
        c0, c1 = (b >> 32 & mask) ^ c1 ^ k0, b & mask
        c2, c3 = (a >> 32 & mask) ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0, c1, c2, c3


def _stream_key(seed: int, step: int, parameter: int) -> int:
    """63 bits that name the random stream of one parameter at one step.

    Always odd and above 2^62: Triton makes a kernel of its own for an argument that is 1, or
    divides by 16, or fits 32 bits.
    """
    low, high, _, _ = philox((step & 0xFFFFFFFF, step >> 32, parameter, 0), seed)
    return (high << 32 | low) & 2**62 - 1 | 2**62 | 1


def _random_bits(n: int, key: int, device: torch.device) -> Tensor:
    """[n] int64 under 2^16: element i takes half i % 2 of word i % 8 // 2 of counter i // 8."""
    at = torch.arange(-(-n // 8), device=device)
    words = philox((at & 0xFFFFFFFF, at >> 32, 0 * at, 0 * at), key)
    halves = [h for word in words for h in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).view(-1)[:n]


def round_stochastic_ref(x: Tensor, key: int) -> Tensor:
    """x, fp32 -> bf16 up or down, so that the mean over keys is x."""
    random = _random_bits(x.numel(), key, x.device).view(x.shape)
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + random & 0xFFFF0000
    signed = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    return torch.where(x.isnan(), x, signed).to(torch.bfloat16)


def adamw_update_ref(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, absmax: Tensor | None,
    absmax_sq: Tensor | None, master: Tensor | None, grad_scale: Tensor | None, key: int,
    s: dict[str, float],
) -> None:  # fmt: skip
    """`adamw_update` in PyTorch, bit for bit but for the compiler's fused multiply-adds."""
    if grad_scale is not None and not grad_scale.isfinite():
        return
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p = (param if master is None else master).to(wide)
    g = grad.to(wide)
    if grad_scale is not None:
        g = g * grad_scale
    m, v = exp_avg, exp_avg_sq
    if absmax is not None and absmax_sq is not None:
        m = dequantize_blockwise(m, absmax, signed=True)
        v = dequantize_blockwise(v, absmax_sq, signed=False)
    m = s["beta1"] * m + s["rest1"] * g
    v = s["beta2"] * v + s["rest2"] * g * g
    p = p - s["decay"] * p
    p = p - s["step_size"] * (m / (v.sqrt() * s["root"] + s["eps"]))
    if absmax is not None and absmax_sq is not None:
        for state, scale, x in ((exp_avg, absmax, m), (exp_avg_sq, absmax_sq, v)):
            codes, largest = quantize_blockwise(x, signed=state is exp_avg)
            state.copy_(codes)
            scale.copy_(largest)
    else:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    if master is not None:
        master.copy_(p)
    if master is None and param.dtype == torch.bfloat16:
        p = round_stochastic_ref(p, key)
    param.copy_(p)


@jit
def _adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, master_ptr, grad_scale_ptr, tables_ptr,
    n, key, beta1, rest1, beta2, rest2, eps, decay, step_size, root, BLOCKS: tl.constexpr,
):  # fmt: skip
    """p, g, master [n], m, v [n] fp32, or uint8 with absmax [ceil(n / 256)]; grad_scale [].

    BLOCKS blocks a program. None where there is no absmax and no tables [4, 256], no master, no
    grad_scale.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    o_x = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
        n = tl.where(tl.abs(grad_scale) < float("inf"), n, 0)  # else nothing is read or written
    m_x = o_x < n
    m_block = block * 256 < n

    g = tl.load(g_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g = g * grad_scale
    if master_ptr is not None:
        p = tl.load(master_ptr + o_x, mask=m_x, other=0.0)
    else:
        p = tl.load(p_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    if m_absmax_ptr is not None:
        m = tl.load(tables_ptr + tl.load(m_ptr + o_x, mask=m_x, other=0).to(tl.int32))
        v = tl.load(tables_ptr + 256 + tl.load(v_ptr + o_x, mask=m_x, other=0).to(tl.int32))
        m = m * tl.load(m_absmax_ptr + block, mask=m_block, other=0.0)[:, None]
        v = v * tl.load(v_absmax_ptr + block, mask=m_block, other=0.0)[:, None]
    else:
        m = tl.load(m_ptr + o_x, mask=m_x, other=0.0)
        v = tl.load(v_ptr + o_x, mask=m_x, other=0.0)

    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p - decay * p
    p = p - step_size * (m / (tl.sqrt(v) * root + eps))

    if m_absmax_ptr is not None:
        # What lies beyond n came as code 0, which is not zero: it must not raise the absmax.
        m_codes, m_absmax = quantize_codes(tl.where(m_x, m, 0.0), tables_ptr + 512, True)
        v_codes, v_absmax = quantize_codes(tl.where(m_x, v, 0.0), tables_ptr + 768, False)
        tl.store(m_ptr + o_x, m_codes, mask=m_x)
        tl.store(v_ptr + o_x, v_codes, mask=m_x)
        tl.store(m_absmax_ptr + block, m_absmax, mask=m_block)
        tl.store(v_absmax_ptr + block, v_absmax, mask=m_block)
    else:
        tl.store(m_ptr + o_x, m, mask=m_x)
        tl.store(v_ptr + o_x, v, mask=m_x)
    if master_ptr is not None:
        tl.store(master_ptr + o_x, p, mask=m_x)
    elif p_ptr.dtype.element_ty == tl.bfloat16:
        at = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # a counter for 8 elements
        low = at.to(tl.uint32)
        zero = low * 0
        w0, w1, w2, w3 = tl.philox(key, low, (at >> 32).to(tl.uint32), zero, zero)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., i, j] is word 2 i + j
        random = tl.join(words & 0xFFFF, words >> 16).reshape(BLOCKS, 256)
        bits = (p.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
        # A NaN's bits could carry over into a number's.
        p = tl.where(p == p, bits.to(tl.float32, bitcast=True), p)
    tl.store(p_ptr + o_x, p.to(p_ptr.dtype.element_ty), mask=m_x)


BLOCKS, WARPS = 8, 8  # 8 elements a thread: 16 bytes of bf16


def _launch(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, absmax: Tensor | None,
    absmax_sq: Tensor | None, master: Tensor | None, grad_scale: Tensor | None, key: int,
    s: dict[str, float],
) -> None:  # fmt: skip
    n = param.numel()
    _adamw_kernel[(-(-n // (BLOCKS * QUANTUM)),)](
        param, grad.contiguous(), exp_avg, exp_avg_sq, absmax, absmax_sq, master, grad_scale,
        None if absmax is None else code_tables(param.device), n, key, **s,
        BLOCKS=BLOCKS, num_warps=WARPS,
    )  # fmt: skip


@torch.no_grad()
def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    master: Tensor | None = None,
    grad_scale: Tensor | None = None,
    exp_avg_absmax: Tensor | None = None,
    exp_avg_sq_absmax: Tensor | None = None,
    seed: int | None = None,
    parameter: int = 0,
) -> None:
    """One AdamW step in place: param, both states, their absmax and master are updated.

    Args:
        param: any shape of n elements. fp32 is its own master; bf16 and fp16 are the rounding of
            `master`; bf16 without one is rounded stochastically, by `seed`.
        grad: like param in shape, bf16, fp16 or fp32, any strides. Not written.
        exp_avg, exp_avg_sq: like param in shape; fp32, or uint8 codes (zeros to start with).
        step: of this update, from 1.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        master: fp32 like param in shape, or None.
        grad_scale: [] fp32 on param's device, by which grad is multiplied: clipping that waits
            for nothing. Where it is not finite, nothing is changed.
        exp_avg_absmax, exp_avg_sq_absmax: [ceil(n / 256)] fp32 (zeros to start with), where the
            states are uint8.
        seed: at least 0, under 2^64; parameter: at least 0, under 2^32, another for every tensor.
            With step they name the random bits: the same again after a resumption.

    fp64 takes the reference, with states in fp64.

    Raises:
        TypeError, ValueError: an argument's dtype, shape, device, layout or range does not fit.
    """
    tensors = (
        param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, master, grad_scale
    )  # fmt: skip
    _check(*tensors, step, seed, parameter)
    if param.numel() == 0:
        return
    # differences of nearly equal numbers: in Python's double, then fp32
    scalars = {
        "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps,
        "decay": lr * weight_decay, "step_size": lr / (1 - beta1**step),
        "root": 1 / math.sqrt(1 - beta2**step),
    }  # fmt: skip
    update = _launch if param.dtype != torch.float64 and use_triton(param) else adamw_update_ref
    update(*tensors, _stream_key(seed or 0, step, parameter), scalars)


def _check(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, absmax: Tensor | None,
    absmax_sq: Tensor | None, master: Tensor | None, grad_scale: Tensor | None, step: int,
    seed: int | None, parameter: int,
) -> None:  # fmt: skip
    narrow = (torch.bfloat16, torch.float16)
    if param.dtype not in (*narrow, *WIDE):
        raise TypeError(f"param is {param.dtype}; allowed: bfloat16, float16, float32, float64")
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    eight_bit = exp_avg.dtype == torch.uint8 and wide == torch.float32
    state = torch.uint8 if eight_bit else wide
    shape = tuple(param.shape)
    blocks = (-(-param.numel() // QUANTUM),) if eight_bit else None
    # name, tensor, allowed dtypes, shape or None where there must be no such tensor
    wanted: list[tuple[str, Tensor | None, tuple[torch.dtype, ...], tuple[int, ...] | None]] = [
        ("param", param, (param.dtype,), shape),
        ("grad", grad, (*narrow, wide), shape),
        ("exp_avg", exp_avg, (state,), shape),
        ("exp_avg_sq", exp_avg_sq, (state,), shape),
        ("exp_avg_absmax", absmax, (wide,), blocks),
        ("exp_avg_sq_absmax", absmax_sq, (wide,), blocks),
    ]
    if master is not None:
        wanted.append(("master", master, (wide,), shape if param.dtype in narrow else None))
    if grad_scale is not None:
        wanted.append(("grad_scale", grad_scale, (wide,), ()))
    for name, tensor, dtypes, size in wanted:
        if (size is None) != (tensor is None):
            why = f"param is {param.dtype}, exp_avg {exp_avg.dtype}"
            raise ValueError(f"{name} is {'missing' if tensor is None else 'not for'}: {why}")
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} is {tensor.dtype}; allowed with {param.dtype}: {allowed}")
        if tensor.shape != size:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {size}")
        if tensor.device != param.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {param.device}")
        if name != "grad" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if master is None and param.dtype == torch.float16:
        raise TypeError("param is torch.float16: it needs a master (bfloat16 can do with a seed)")
    if master is None and param.dtype == torch.bfloat16 and seed is None:
        raise ValueError("param is torch.bfloat16: it needs a master, or a seed for its rounding")
    if step < 1:
        raise ValueError(f"step is {step}; it must be at least 1")
    if seed is not None and not 0 <= seed < 2**64 or not 0 <= parameter < 2**32:
        raise ValueError(f"seed is {seed}, parameter {parameter}; allowed: [0, 2^64), [0, 2^32)")


def aot_cases() -> list[Any]:
    """What `_launch` launches, for the ahead-of-time check; n divides by 16 at every size."""
    from xplus_kernels.aot import AotCase

    numbers = dict.fromkeys(
        ("beta1", "rest1", "beta2", "rest2", "eps", "decay", "step_size", "root"), "fp32"
    )
    cases = []
    narrow = [("bf16", 8, False), ("bf16", 8, True), ("bf16", 32, False), ("bf16", 32, True)]
    narrow += [("fp16", 8, True), ("fp16", 32, True)]
    plain = [*narrow, ("fp32", 8, False), ("fp32", 32, False)]
    launched = [(*kind, kind[0], "i32") for kind in plain]
    launched += [(*kind, "fp32", "i32") for kind in narrow]  # gradients that are summed in fp32
    launched.append(("bf16", 8, False, "bf16", "i64"))  # past 2^31 elements
    for dtype, bits, master, of_gradient, n in launched:
        pointers = {"p_ptr": f"*{dtype}", "g_ptr": f"*{of_gradient}"}
        pointers |= dict.fromkeys(("m_ptr", "v_ptr"), "*u8" if bits == 8 else "*fp32")
        given = {"m_absmax_ptr": bits == 8, "v_absmax_ptr": bits == 8, "tables_ptr": bits == 8}
        given |= {"master_ptr": master, "grad_scale_ptr": True}
        pointers |= {name: "*fp32" for name, there in given.items() if there}
        absent = {name: None for name, there in given.items() if not there}
        cases.append(
            AotCase(
                kernel=_adamw_kernel,
                name=(
                    f"adamw {dtype}, gradient {of_gradient}, {bits}-bit states"
                    f"{', master' if master else ''}, n {n}"
                ),
                signature={**pointers, "n": n, "key": "i64", **numbers},
                constexprs={**absent, "BLOCKS": BLOCKS},
                num_warps=WARPS,
                aligned=(*pointers, "n"),
            )
        )
    return cases
