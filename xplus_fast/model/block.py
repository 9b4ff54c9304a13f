"""A decoder block as one autograd function: forward and backward on a page.

    x - rms_norm - Wqkv - qk_norm+rope - attention - Wo - +x = h
    h - rms_norm - Wgate_up - swiglu - Wdown - +h = y

Every linear is y = x @ W.T, so dx = dy @ W needs no saved input and dW = dy.T @ x does. The same
code serves trained and frozen layers: a weight's gradient is computed where autograd asks for it,
and nothing is saved or computed for the others. A frozen layer's matrices may come out of a store
(`frozen.py`) instead of the arguments, in a format of their own.

Legend: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.model.families import PACKED, Shape
from xplus_fast.model.frozen import Store
from xplus_fast.model.linear import Products, rms_norm_into, swiglu_backward_into, swiglu_into
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import Pack

# What a block keeps for its backward; what is missing is computed again.
KEEP: dict[str, tuple[str, ...]] = {
    "keep": ("x", "qkv", "out", "lse", "h", "gate_up"),
    "recompute_mlp": ("x", "qkv", "out", "lse", "h"),
    "recompute": ("x",),
    "offload": (),  # x goes to the host
}
WEIGHTS = tuple(PACKED)  # the order of the function's weight arguments; absent ones are None


@dataclass(frozen=True)
class BlockSpec:
    """What is constant over a block's calls."""

    shape: Shape
    activations: str = "keep"  # a key of KEEP
    frozen: Store | None = None  # the matrices, where they are no parameters
    scratch: Tensor | None = None  # for frozen formats, see `Products`
    offload: Offload | None = None  # where "offload" sends x

    def weights(self, weights: tuple[Any, ...], *, backward: bool) -> dict[str, Any]:
        """All weights by name: the arguments, and the store's."""
        w = dict(zip(WEIGHTS, weights, strict=True))
        return w if self.frozen is None else w | self.frozen.fetch(backward=backward)


def _attention_half(
    a: dict[str, Tensor], w: dict[str, Any], s: Shape, p: Pack, m: Products
) -> None:
    """x -> h. Fills only what is missing in `a`, so the backward can call it to recompute."""
    if "qkv" not in a:
        n = rms_norm_into(a["x"], w["input_norm"], w["qkv"], eps=s.eps)
        a["qkv"] = m.linear(n, w["qkv"], w["qkv_bias"])  # [T, (N+2K)D]
    a["q"], a["k"], a["v"] = ops.qk_norm_rope(
        a["qkv"], w["q_norm"], w["k_norm"], p.cos, p.sin,
        heads=s.heads, kv_heads=s.kv_heads, eps=s.eps,
    )  # fmt: skip
    if "out" not in a:
        a["out"], a["lse"] = ops.varlen_attention(
            a["q"], a["k"], a["v"], p.cu_seqlens, max_seqlen=p.max_seqlen, scale=s.head_dim**-0.5
        )  # out [T, N, D], lse [N, T]
    if "h" not in a:
        a["h"] = m.add_linear(a["x"], a["out"].flatten(1), w["o"])  # [T, H]


def _mlp_half(a: dict[str, Tensor], w: dict[str, Any], s: Shape, m: Products) -> None:
    """h -> gate_up. Wdown is left to the forward: no backward needs its output."""
    if "gate_up" not in a:
        n = rms_norm_into(a["h"], w["post_norm"], w["gate_up"], eps=s.eps)
        a["gate_up"] = m.linear(n, w["gate_up"])  # [T, 2F]


class BlockFunction(torch.autograd.Function):
    """x [T, H] -> y [T, H]. Weights follow in the order of `WEIGHTS`, None where absent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: BlockSpec, p: Pack, *weights: Tensor | None) -> Tensor:
        w, m = spec.weights(weights, backward=False), Products(x.dtype, spec.scratch)
        a, s = {"x": x}, spec.shape
        _attention_half(a, w, s, p, m)
        _mlp_half(a, w, s, m)
        y = m.add_linear(a["h"], swiglu_into(a["gate_up"], w["down"]), w["down"])
        if any(ctx.needs_input_grad):
            ctx.kept = KEEP[spec.activations]
            ctx.save_for_backward(*(a[name] for name in ctx.kept), *weights)
            ctx.away = spec.offload.put(x) if spec.offload and not ctx.kept else None
            ctx.spec, ctx.p = spec, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, s, p = ctx.saved_tensors, ctx.spec.shape, ctx.p
        a = dict(zip(ctx.kept, saved, strict=False)) or {"x": ctx.away.take()}
        w = ctx.spec.weights(saved[len(ctx.kept) :], backward=True)
        m = Products(dy.dtype, ctx.spec.scratch)
        need = dict(zip(WEIGHTS, ctx.needs_input_grad[3:], strict=True))
        dw: dict[str, Tensor | None] = dict.fromkeys(WEIGHTS)
        _attention_half(a, w, s, p, m)
        _mlp_half(a, w, s, m)

        # y = h + swiglu(gate_up) @ down.T
        if need["down"]:
            dw["down"] = dy.T @ ops.swiglu(a["gate_up"])
        dgu = swiglu_backward_into(m.dx(dy, w["down"]), a["gate_up"], w["gate_up"])
        if need["gate_up"]:
            assert isinstance(dgu, Tensor)  # what trains is in no frozen format
            dw["gate_up"] = dgu.T @ ops.rms_norm(a["h"], w["post_norm"], eps=s.eps)
        dh, dw["post_norm"] = ops.add_rms_norm_backward(
            dy,
            m.dx(dgu, w["gate_up"]),
            a["h"],
            w["post_norm"],
            eps=s.eps,
            need_dw=need["post_norm"],
        )

        # h = x + attention(qk_norm_rope(norm(x) @ qkv.T + bias)) @ o.T
        if need["o"]:
            dw["o"] = dh.T @ a["out"].flatten(1)
        attention_weights = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm")
        if not ctx.needs_input_grad[0] and not any(need[name] for name in attention_weights):
            return None, None, None, *dw.values()
        dq, dk, dv = ops.varlen_attention_backward(
            m.dx(dh, w["o"]).view_as(a["q"]), a["q"], a["k"], a["v"], a["out"], a["lse"],
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
                dh,
                m.dx(dqkv, w["qkv"]),
                a["x"],
                w["input_norm"],
                eps=s.eps,
                need_dw=need["input_norm"],
            )
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, None, *dw.values()
