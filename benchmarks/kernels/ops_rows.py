"""Norms, RoPE and SwiGLU: ours, Hugging Face's expression, the same compiled, Liger's functions.

Everything is frozen: no gradient of a norm's weight, from anybody. Liger's backward overwrites what
it is given, as its modules let it, and has copies of its own.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import (
    Case,
    Inputs,
    Maker,
    Outputs,
    Provider,
    Size,
    by_autograd,
    eager_and_compiled,
)

EPS = 1e-6
BOUND = 0.01  # bf16 rounds by 2^-9 at most, 0.0011 in the 2-norm, a few times over


def hf_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def hf_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, hf_rms_norm(summed, weight)


def hf_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def hf_qk_norm_rope(
    q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]  # cos, sin [T, D]

    return rotate(hf_rms_norm(q, q_norm)), rotate(hf_rms_norm(k, k_norm))


def plain_merge_attention(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Not in place; lse [S, N], as rows."""
    whole = torch.logaddexp(lse, other_lse)
    a, b = ((x - whole).exp().T[..., None] for x in (lse, other_lse))
    return (out.float() * a + other_out.float() * b).to(out.dtype), whole.T


def truth_by(
    way: str, function: Callable[..., Any], names: tuple[str, ...], by_row: tuple[str, ...],
    grads: tuple[str, ...],
) -> Callable[[Inputs, Tensor], Outputs]:  # fmt: skip
    """The same expression in fp32, of a few rows."""

    def truth(inputs: Inputs, rows: Tensor) -> Outputs:
        few: Inputs = {
            name: (inputs[name][rows] if name in by_row + grads else inputs[name]).float()
            for name in names + grads
        }
        few["leaves"] = inputs["leaves"]
        return by_autograd(way, function, _take(names), grads)(few)()

    return truth


def _take(names: tuple[str, ...]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {name: inputs[name] for name in names}


def _ours(way: str, forward: Callable[..., tuple], backward: Callable[..., tuple]) -> Provider:
    def bind(i: Inputs) -> Callable[[], Outputs]:
        if way == "full":
            return lambda: (*forward(i), *backward(i))
        return (lambda: forward(i)) if way == "forward" else (lambda: backward(i))

    return Provider(bind)


def _liger(
    way: str, forward: Callable[[Inputs], tuple[tuple, Any]], backward: Callable[[Inputs, Any], Any]
) -> Provider:
    """forward: inputs -> outputs, what is saved; backward: inputs, saved -> gradients."""

    def bind(i: Inputs) -> Callable[[], Outputs]:
        if way == "forward":
            return lambda: forward(i)[0]
        if way == "backward":
            saved = forward(i)[1]
            return lambda: backward(i, saved)

        def full() -> Outputs:
            outputs, saved = forward(i)
            return (*outputs, *backward(i, saved))

        return full

    return Provider(bind, cuda_only=True, mutates=way != "forward")


def _frozen(function: Callable[..., Any]) -> dict[str, bool]:
    """Liger's switch against dW, in the versions that have one."""
    return {"needs_dw": False} if "needs_dw" in inspect.signature(function).parameters else {}


def rms_norm(size: Size, T: int, way: str) -> Case:
    from xplus_kernels import rms_norm as ours
    from xplus_kernels import rms_norm_backward as ours_backward

    def make(m: Maker) -> Inputs:
        return {
            "x": m.randn(T, size.H), "weight": m.randn(size.H, mean=1, scale=0.02),
            "dy": m.randn(T, size.H), "leaves": ("x",),
        }  # fmt: skip

    def liger_forward(i: Inputs) -> tuple[tuple, Any]:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        y, *saved = rms_norm_forward(i["x"], i["weight"], EPS, 0.0, "llama", None)
        return (y,), saved

    def liger_backward(i: Inputs, saved: Any) -> tuple:
        return (_liger_norm_backward(i["dy"], i["weight"], saved),)

    grads = ("dy",)
    return Case(
        "rms_norm", way, size.name, T, make,
        {
            "ours": _ours(
                way,
                lambda i: (ours(i["x"], i["weight"], eps=EPS),),
                lambda i: ours_backward(
                    i["dy"], i["x"], i["weight"], eps=EPS, need_dw=False
                )[:1],
            ),
            **eager_and_compiled(way, hf_rms_norm, _take(("x", "weight")), grads),
            "Liger": _liger(way, liger_forward, liger_backward),
        },
        truth_by(way, hf_rms_norm, ("x", "weight"), ("x",), grads),
        "copy_bytes", T, BOUND, bytes={"forward": 4, "backward": 6, "full": 10}[way] * T * size.H,
    )  # fmt: skip


def _liger_norm_backward(dy: Tensor, weight: Tensor, saved: Any) -> Tensor:
    from liger_kernel.ops.rms_norm import rms_norm_backward

    x, rstd, block, warps, mode = saved
    return rms_norm_backward(
        dy, x, weight, rstd, 0.0, mode, block, warps, True, None, **_frozen(rms_norm_backward)
    )[0]


def add_rms_norm(size: Size, T: int, way: str) -> Case:
    from xplus_kernels import add_rms_norm as ours
    from xplus_kernels import add_rms_norm_backward as ours_backward

    def make(m: Maker) -> Inputs:
        x, residual = m.randn(T, size.H), m.randn(T, size.H)
        return {
            "x": x, "residual": residual, "summed": x + residual,
            "weight": m.randn(size.H, mean=1, scale=0.02),
            "dsummed": m.randn(T, size.H), "dy": m.randn(T, size.H), "leaves": ("x",),
        }  # fmt: skip

    def liger_forward(i: Inputs) -> tuple[tuple, Any]:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        y, s, *saved = fused_add_rms_norm_forward(
            i["x"], i["residual"], i["weight"], EPS, 0.0, "llama"
        )
        return (s, y), (s, *saved)

    def liger_backward(i: Inputs, saved: Any) -> tuple:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward as backward

        s, rstd, block, warps, stages, mode = saved
        return backward(
            i["dy"], i["dsummed"], s, i["weight"], rstd, 0.0, mode, block, warps, stages, True,
            **_frozen(backward),
        )[:1]  # fmt: skip

    names, grads = ("x", "residual", "weight"), ("dsummed", "dy")
    return Case(
        "add_rms_norm", way, size.name, T, make,
        {
            "ours": _ours(
                way,
                lambda i: ours(i["x"], i["residual"], i["weight"], eps=EPS),
                lambda i: ours_backward(
                    i["dsummed"], i["dy"], i["summed"], i["weight"], eps=EPS, need_dw=False
                )[:1],
            ),
            **eager_and_compiled(way, hf_add_rms_norm, _take(names), grads),
            "Liger": _liger(way, liger_forward, liger_backward),
        },
        truth_by(way, hf_add_rms_norm, names, ("x", "residual"), grads),
        "copy_bytes", T, BOUND, bytes={"forward": 8, "backward": 8, "full": 16}[way] * T * size.H,
    )  # fmt: skip


def qk_norm_rope(size: Size, T: int, way: str) -> Case:
    """Ours reads q and k in the packed qkv; the others get them apart and contiguous, which they
    want, with cos and sin in bf16 [T, D]. Ours alone also writes v's gradient into the packed one,
    which its bytes count and which the others would need a copy for."""
    from xplus_kernels import qk_norm_rope as ours
    from xplus_kernels import qk_norm_rope_backward as ours_backward
    from xplus_kernels import rope_tables

    heads, D = size.N + size.K, size.D

    def make(m: Maker) -> Inputs:
        qkv = m.randn(T, (heads + size.K) * D)
        q, k, _ = qkv.view(T, -1, D).split((size.N, size.K, size.K), 1)
        frequencies = 1e6 ** -(torch.arange(0, D, 2, device=m.device) / D)
        cos, sin = rope_tables(torch.arange(T, device=m.device) % 1024, frequencies)
        both = [torch.cat((t, t), -1) for t in (cos, sin)]
        return {
            "qkv": qkv, "q": q.contiguous(), "k": k.contiguous(),
            "q_norm": m.randn(D, mean=1, scale=0.02), "k_norm": m.randn(D, mean=1, scale=0.02),
            "half_cos": cos, "half_sin": sin, "cos": both[0], "sin": both[1],
            "hf_cos": both[0].bfloat16(), "hf_sin": both[1].bfloat16(),
            "dq": m.randn(T, size.N, D), "dk": m.randn(T, size.K, D), "dv": m.randn(T, size.K, D),
            "leaves": ("q", "k"),
        }  # fmt: skip

    def forward(i: Inputs) -> tuple:
        return ours(
            i["qkv"], i["q_norm"], i["k_norm"], i["half_cos"], i["half_sin"],
            heads=size.N, kv_heads=size.K, eps=EPS,
        )[:2]  # fmt: skip

    def backward(i: Inputs) -> tuple:
        d = ours_backward(
            i["dq"], i["dk"], i["dv"], i["qkv"], i["q_norm"], i["k_norm"],
            i["half_cos"], i["half_sin"], eps=EPS, need_dw=False,
        )[0].view(T, -1, D)  # fmt: skip
        return d[:, : size.N], d[:, size.N : heads]

    def hf_arguments(i: Inputs) -> Inputs:
        few = {name: i[name] for name in ("q", "k", "q_norm", "k_norm")}
        return {**few, "cos": i["hf_cos"], "sin": i["hf_sin"]}

    def liger_forward(i: Inputs) -> tuple[tuple, Any]:
        from liger_kernel.ops.rms_norm import rms_norm_forward
        from liger_kernel.ops.rope import rope_forward

        q, *saved_q = rms_norm_forward(i["q"], i["q_norm"], EPS, 0.0, "llama", None)
        k, *saved_k = rms_norm_forward(i["k"], i["k_norm"], EPS, 0.0, "llama", None)
        q, k = (x[None].transpose(1, 2) for x in (q, k))  # [1, heads, T, D], as the model has it
        q, k, *_ = rope_forward(q, k, i["hf_cos"][None], i["hf_sin"][None])
        return tuple(x.transpose(1, 2)[0] for x in (q, k)), (saved_q, saved_k)

    def liger_backward(i: Inputs, saved: Any) -> tuple:
        from liger_kernel.ops.rope import rope_backward

        dq, dk = (i[name][None].transpose(1, 2) for name in ("dq", "dk"))
        dq, dk = rope_backward(dq, dk, i["hf_cos"][None], i["hf_sin"][None])
        pairs = ((dq, "q_norm", saved[0]), (dk, "k_norm", saved[1]))
        return tuple(_liger_norm_backward(d.transpose(1, 2)[0], i[w], s) for d, w, s in pairs)

    names = ("q", "k", "q_norm", "k_norm", "cos", "sin")
    grads = ("dq", "dk")
    moved = {"forward": 4 * heads, "backward": 6 * heads + 4 * size.K}
    moved["full"] = sum(moved.values())
    return Case(
        "qk_norm_rope", way, size.name, T, make,
        {
            "ours": _ours(way, forward, backward),
            **eager_and_compiled(way, hf_qk_norm_rope, hf_arguments, grads),
            "Liger": _liger(way, liger_forward, liger_backward),
        },
        truth_by(way, hf_qk_norm_rope, names, ("q", "k", "cos", "sin"), grads),
        "copy_bytes", T, BOUND, bytes=moved[way] * T * D,
    )  # fmt: skip


def swiglu(size: Size, T: int, way: str) -> Case:
    """Liger gets gate and up apart and contiguous, as its module does."""
    from xplus_kernels import swiglu as ours
    from xplus_kernels import swiglu_backward as ours_backward

    def make(m: Maker) -> Inputs:
        return {
            "gate_up": m.randn(T, 2 * size.F), "dy": m.randn(T, size.F), "leaves": ("gate_up",)
        }  # fmt: skip

    def liger(i: Inputs) -> Callable[[], Outputs]:
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        gate, up = (x.contiguous() for x in i["gate_up"].chunk(2, -1))
        i.pop("gate_up")  # the provider's own copy, where it is one
        if way == "forward":
            return lambda: swiglu_forward(gate, up)[2:]
        if way == "backward":
            return lambda: swiglu_backward(gate, up, i["dy"])
        return lambda: (swiglu_forward(gate, up)[2], *swiglu_backward(gate, up, i["dy"]))

    def view(outputs: Outputs, rows: Tensor) -> Outputs:
        few = [o[rows] for o in outputs]
        # d(gate) and d(up) apart are one gradient
        return [*few[:-2], torch.cat(few[-2:], -1)] if len(few) == wanted + 1 else few

    wanted = 2 if way == "full" else 1
    return Case(
        "swiglu", way, size.name, T, make,
        {
            "ours": _ours(
                way,
                lambda i: (ours(i["gate_up"]),),
                lambda i: (ours_backward(i["dy"], i["gate_up"]),),
            ),
            **eager_and_compiled(way, hf_swiglu, _take(("gate_up",)), ("dy",)),
            "Liger": Provider(liger, cuda_only=True, mutates=True),
        },
        truth_by(way, hf_swiglu, ("gate_up",), ("gate_up",), ("dy",)),
        "copy_bytes", T, BOUND, bytes={"forward": 6, "backward": 10, "full": 16}[way] * T * size.F,
        view=view,
    )  # fmt: skip


def merge_attention(size: Size, T: int, way: str) -> Case:
    """Ours works in place, on the same rows again and again; the others make new tensors."""
    from xplus_kernels import merge_attention as ours

    names = ("out", "lse", "other_out", "other_lse")

    def make(m: Maker) -> Inputs:
        made = {name: m.randn(T, size.N, size.D) for name in names[::2]}
        return made | {name: m.randn(size.N, T, dtype=torch.float32) for name in names[1::2]}

    def bind(i: Inputs) -> Callable[[], Outputs]:
        def run() -> Outputs:
            ours(*(i[name] for name in names))
            return i["out"], i["lse"].T

        return run

    def truth(i: Inputs, rows: Tensor) -> Outputs:
        few = (i[name].float() for name in names)
        return plain_merge_attention(*(x[rows] if x.dim() == 3 else x[:, rows] for x in few))

    return Case(
        "merge_attention", way, size.name, T, make,
        {
            "ours": Provider(bind, mutates=True),
            **eager_and_compiled(way, plain_merge_attention, _take(names), ()),
        },
        truth, "copy_bytes", T, BOUND, bytes=(6 * size.D + 12) * T * size.N,
    )  # fmt: skip
