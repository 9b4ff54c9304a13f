"""A decoder block as one autograd function: forward and backward on a page.

    x - rms_norm - Wqkv - qk_norm+rope - attention - Wo - +x = h
    h - rms_norm - Wgate_up - swiglu - Wdown - +h = y

Every linear is y = x @ W.T, so dx = dy @ W needs no saved input and dW = dy.T @ x does. The same
code serves trained and frozen layers: a weight's gradient is computed where autograd asks for it,
and nothing is saved or computed for the others.

Legend: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.model.families import PACKED, Shape
from xplus_fast.model.packing import Pack

# What a block keeps for its backward; what is missing is computed again.
KEEP = {
    "keep": ("x", "qkv", "out", "lse", "h", "gate_up"),
    "recompute_mlp": ("x", "qkv", "out", "lse", "h"),
    "recompute": ("x",),
}
WEIGHTS = tuple(PACKED)  # the order of the function's weight arguments; absent ones are None


@dataclass(frozen=True)
class BlockSpec:
    """What is constant over a block's calls."""

    shape: Shape
    activations: str = "keep"  # a key of KEEP


def _attention_half(a: dict[str, Tensor], w: dict[str, Any], s: Shape, p: Pack) -> None:
    """x -> h. Fills only what is missing in `a`, so the backward can call it to recompute."""
    if "qkv" not in a:
        n = ops.rms_norm(a["x"], w["input_norm"], eps=s.eps)
        a["qkv"] = torch.nn.functional.linear(n, w["qkv"], w["qkv_bias"])  # [T, (N+2K)D]
    a["q"], a["k"], a["v"] = ops.qk_norm_rope(
        a["qkv"], w["q_norm"], w["k_norm"], p.cos, p.sin,
        heads=s.heads, kv_heads=s.kv_heads, eps=s.eps,
    )  # fmt: skip
    if "out" not in a:
        a["out"], a["lse"] = ops.varlen_attention(
            a["q"], a["k"], a["v"], p.cu_seqlens, max_seqlen=p.max_seqlen, scale=s.head_dim**-0.5
        )  # out [T, N, D], lse [N, T]
    if "h" not in a:
        a["h"] = torch.addmm(a["x"], a["out"].flatten(1), w["o"].T)  # [T, H]


def _mlp_half(a: dict[str, Tensor], w: dict[str, Any], s: Shape) -> None:
    """h -> gate_up. Wdown is left to the forward: no backward needs its output."""
    if "gate_up" not in a:
        n = ops.rms_norm(a["h"], w["post_norm"], eps=s.eps)
        a["gate_up"] = n @ w["gate_up"].T  # [T, 2F]


class BlockFunction(torch.autograd.Function):
    """x [T, H] -> y [T, H]. Weights follow in the order of `WEIGHTS`, None where absent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: BlockSpec, p: Pack, *weights: Tensor | None) -> Tensor:
        w: dict[str, Any] = dict(zip(WEIGHTS, weights, strict=True))
        a, s = {"x": x}, spec.shape
        _attention_half(a, w, s, p)
        _mlp_half(a, w, s)
        y = torch.addmm(a["h"], ops.swiglu(a["gate_up"]), w["down"].T)
        if any(ctx.needs_input_grad):
            ctx.kept = KEEP[spec.activations]
            ctx.save_for_backward(*(a[name] for name in ctx.kept), *weights)
            ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, s, p = ctx.saved_tensors, ctx.s, ctx.p
        a = dict(zip(ctx.kept, saved, strict=False))
        w = dict(zip(WEIGHTS, saved[len(ctx.kept) :], strict=True))
        need = dict(zip(WEIGHTS, ctx.needs_input_grad[3:], strict=True))
        dw: dict[str, Tensor | None] = dict.fromkeys(WEIGHTS)
        _attention_half(a, w, s, p)
        _mlp_half(a, w, s)

        # y = h + swiglu(gate_up) @ down.T
        if need["down"]:
            dw["down"] = dy.T @ ops.swiglu(a["gate_up"])
        dgu = ops.swiglu_backward(dy @ w["down"], a["gate_up"])
        if need["gate_up"]:
            dw["gate_up"] = dgu.T @ ops.rms_norm(a["h"], w["post_norm"], eps=s.eps)
        dh, dw["post_norm"] = ops.add_rms_norm_backward(
            dy, dgu @ w["gate_up"], a["h"], w["post_norm"], eps=s.eps, need_dw=need["post_norm"]
        )

        # h = x + attention(qk_norm_rope(norm(x) @ qkv.T + bias)) @ o.T
        if need["o"]:
            dw["o"] = dh.T @ a["out"].flatten(1)
        attention_weights = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm")
        if not ctx.needs_input_grad[0] and not any(need[name] for name in attention_weights):
            return None, None, None, *dw.values()
        dq, dk, dv = ops.varlen_attention_backward(
            (dh @ w["o"]).view_as(a["q"]), a["q"], a["k"], a["v"], a["out"], a["lse"],
            p.cu_seqlens, max_seqlen=p.max_seqlen, scale=s.head_dim**-0.5,
        )  # fmt: skip
        dqkv, dw["q_norm"], dw["k_norm"] = ops.qk_norm_rope_backward(
            dq, dk, dv, a["qkv"], w["q_norm"], w["k_norm"], p.cos, p.sin,
            eps=s.eps, need_dw=need["q_norm"] or need["k_norm"],
        )  # fmt: skip
        if need["qkv"]:
            dw["qkv"] = dqkv.T @ ops.rms_norm(a["x"], w["input_norm"], eps=s.eps)
        if need["qkv_bias"]:
            dw["qkv_bias"] = dqkv.sum(0)
        dx = None
        if ctx.needs_input_grad[0] or need["input_norm"]:  # the lowest trained layer feeds no one
            dx, dw["input_norm"] = ops.add_rms_norm_backward(
                dh, dqkv @ w["qkv"], a["x"], w["input_norm"], eps=s.eps, need_dw=need["input_norm"]
            )
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, None, *dw.values()
