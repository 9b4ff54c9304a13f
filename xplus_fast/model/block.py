"""A decoder block as one autograd function: forward and backward on a page.

    x - rms_norm - Wqkv - qk_norm+rope - attention - Wo - +x = h
    h - rms_norm - Wgate_up - swiglu - Wdown - +h = y

Every linear is y = x @ W.T, so dx = dy @ W needs no saved input and dW = dy.T @ x does. The same
code serves trained and frozen layers: a weight's gradient is computed where autograd asks for it,
and nothing is saved or computed for the others. A frozen layer's matrices may come out of a store
(`frozen.py`) instead of the arguments, in a format of their own.

Of the last layer only the rows that predict something are wanted. Others attend to no one there:
they need k and v alone. So q is computed for Q rows, and all after attention for R of them.

Legend: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn; Q and R of
the last layer, T elsewhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.model.attention import attention, attention_backward
from xplus_fast.model.families import PACKED, Shape
from xplus_fast.model.frozen import MATRICES, Store
from xplus_fast.model.linear import (
    Products,
    output_rows,
    rms_norm_into,
    swiglu_backward_into,
    swiglu_into,
    take_rows,
)
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import LastRows, Pack
from xplus_fast.model.sums import Sums, matrix_gradient

# What a block keeps for its backward; what is missing is computed again. The last layer has k and
# v in "qkv", and q in "q_rows", which no other layer has.
KEEP: dict[str, tuple[str, ...]] = {
    "keep": ("x", "qkv", "q_rows", "out", "lse", "h", "gate_up"),
    "recompute_mlp": ("x", "qkv", "q_rows", "out", "lse", "h"),
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
    sums: Sums | None = None  # what matrices' gradients are added to; None: autograd adds them

    def weights(self, weights: tuple[Any, ...], *, backward: bool) -> dict[str, Any]:
        """All weights by name: the arguments, and the store's."""
        w = dict(zip(WEIGHTS, weights, strict=True))
        return w if self.frozen is None else w | self.frozen.fetch(backward=backward)


def _attention_half(
    a: dict[str, Tensor], w: dict[str, Any], s: Shape, p: Pack, last: LastRows | None, m: Products
) -> None:
    """x -> h. Fills only what is missing in `a`, so the backward can call it to recompute."""
    if "qkv" not in a:
        n = rms_norm_into(a["x"], w["input_norm"], w["qkv"], eps=s.eps)
        if last is None:
            a["qkv"] = m.linear(n, w["qkv"], w["qkv_bias"])  # [T, (N+2K)D]
        else:
            (wq, wkv), (bq, bkv) = _q_and_kv(w["qkv"], s), _q_and_kv(w["qkv_bias"], s)
            a["qkv"] = m.linear(n, wkv, bkv)  # [T, 2KD]
            a["q_rows"] = m.linear(take_rows(n, last.queries), wq, bq)  # [Q, ND]
    if last is None:
        a["q"], a["k"], a["v"] = ops.qk_norm_rope(
            a["qkv"], w["q_norm"], w["k_norm"], p.cos, p.sin,
            heads=s.heads, kv_heads=s.kv_heads, eps=s.eps,
        )  # fmt: skip
    else:
        cos, sin = p.cos[last.queries], p.sin[last.queries]
        a["q"], _, _ = ops.qk_norm_rope(
            a["q_rows"], w["q_norm"], None, cos, sin, heads=s.heads, kv_heads=0, eps=s.eps
        )
        del cos, sin
        _, a["k"], a["v"] = ops.qk_norm_rope(
            a["qkv"], None, w["k_norm"], p.cos, p.sin, heads=0, kv_heads=s.kv_heads, eps=s.eps
        )
    if "out" not in a:
        attend = p.attend if last is None else last.attend
        a["out"], a["lse"] = attention(a["q"], a["k"], a["v"], attend, scale=s.head_dim**-0.5)
    if "h" not in a:
        x, out = a["x"], a["out"].flatten(1)  # [Q, ND]
        if last is not None:
            x, out = x[last.rows], _picked(out, last)
        a["h"] = m.linear(out, w["o"], x)  # [R, H]


def _q_and_kv(w: Any, s: Shape) -> tuple[Any, Any]:
    """The packed weight of qkv, or its bias, in that of q and that of k and v."""
    if w is None:
        return None, None
    n, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return output_rows(w, 0, n), output_rows(w, n, n + 2 * k)


def _picked(x: Tensor, last: LastRows) -> Tensor:
    """[Q, ...] -> [R, ...]."""
    return x if last.picked is None else x[last.picked]


def _mlp_half(a: dict[str, Tensor], w: dict[str, Any], s: Shape, m: Products) -> None:
    """h -> gate_up. Wdown is left to the forward: no backward needs its output."""
    if "gate_up" not in a:
        n = rms_norm_into(a["h"], w["post_norm"], w["gate_up"], eps=s.eps)
        a["gate_up"] = m.linear(n, w["gate_up"])  # [R, 2F]


class BlockFunction(torch.autograd.Function):
    """x [T, H] -> y [R, H]. Weights follow in the order of `WEIGHTS`, None where absent."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spec: BlockSpec, p: Pack, last: LastRows | None,
        *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        w, m = spec.weights(weights, backward=False), Products(x.dtype, spec.scratch)
        a, s = {"x": x}, spec.shape
        _attention_half(a, w, s, p, last, m)
        _mlp_half(a, w, s, m)
        y = m.linear(swiglu_into(a["gate_up"], w["down"]), w["down"], a["h"])
        if any(ctx.needs_input_grad):
            ctx.kept = [name for name in KEEP[spec.activations] if name in a]
            ctx.save_for_backward(*(a[name] for name in ctx.kept), *weights)
            ctx.away = spec.offload.put(x) if spec.offload and not ctx.kept else None
            ctx.spec, ctx.p, ctx.last = spec, p, last
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, s, p, last = ctx.saved_tensors, ctx.spec.shape, ctx.p, ctx.last
        a = dict(zip(ctx.kept, saved, strict=False)) or {"x": ctx.away.take()}
        w = ctx.spec.weights(saved[len(ctx.kept) :], backward=True)
        m = Products(dy.dtype, ctx.spec.scratch)
        need = dict(zip(WEIGHTS, ctx.needs_input_grad[4:], strict=True))
        dw: dict[str, Tensor | None] = dict.fromkeys(WEIGHTS)
        sums = ctx.spec.sums
        if sums is not None and sums.open:
            sums.bring(w[name] for name in MATRICES if need[name])
        _attention_half(a, w, s, p, last, m)
        _mlp_half(a, w, s, m)

        # y = h + swiglu(gate_up) @ down.T
        if need["down"]:
            dw["down"] = matrix_gradient(w["down"], sums, (dy, ops.swiglu(a["gate_up"])))
        dgu = swiglu_backward_into(m.dx(dy, w["down"]), a["gate_up"], w["gate_up"])
        if need["gate_up"]:
            assert isinstance(dgu, Tensor)  # what trains is in no frozen format
            n = ops.rms_norm(a["h"], w["post_norm"], eps=s.eps)
            dw["gate_up"] = matrix_gradient(w["gate_up"], sums, (dgu, n))
            del n
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
            out = a["out"].flatten(1)
            out = out if last is None else _picked(out, last)
            dw["o"] = matrix_gradient(w["o"], sums, (dh, out))
            del out
        attention_weights = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm")
        if not ctx.needs_input_grad[0] and not any(need[name] for name in attention_weights):
            return None, None, None, None, *dw.values()
        dout = m.dx(dh, w["o"])  # [R, ND]
        if last is not None and last.picked is not None:
            dout = dout.new_zeros(len(a["q"]), dout.shape[1]).index_copy_(0, last.picked, dout)
        dq, dk, dv = attention_backward(
            dout.view_as(a["q"]), a["q"], a["k"], a["v"], a["out"], a["lse"],
            p.attend if last is None else last.attend, scale=s.head_dim**-0.5,
        )  # fmt: skip
        del dout
        backward = _qkv_backward if last is None else _last_qkv_backward
        dn = backward(a, w, s, p, last, m, (dq, dk, dv), need, dw, ctx.needs_input_grad[0], sums)
        dx = None
        if dn is not None:  # the lowest trained layer feeds no one
            if last is not None:
                dh = dh.new_zeros(a["x"].shape).index_copy_(0, last.rows, dh)
            dx, dw["input_norm"] = ops.add_rms_norm_backward(
                dh,
                dn,
                a["x"],
                w["input_norm"],
                eps=s.eps,
                need_dw=need["input_norm"],
            )
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *dw.values()


def _qkv_backward(
    a: dict[str, Tensor], w: dict[str, Any], s: Shape, p: Pack, last: None, m: Products,
    grads: tuple[Tensor, Tensor, Tensor], need: dict[str, bool], dw: dict[str, Tensor | None],
    need_x: bool, sums: Sums | None,
) -> Tensor | None:  # fmt: skip
    """Gradients of q, k and v -> that of the norm's output [T, H] where wanted; fills `dw`."""
    dqkv, dw["q_norm"], dw["k_norm"] = ops.qk_norm_rope_backward(
        *grads, a["qkv"], w["q_norm"], w["k_norm"], p.cos, p.sin,
        eps=s.eps, need_dw=need["q_norm"] or need["k_norm"],
    )  # fmt: skip
    if need["qkv"]:
        n = ops.rms_norm(a["x"], w["input_norm"], eps=s.eps)
        dw["qkv"] = matrix_gradient(w["qkv"], sums, (dqkv, n))
        del n
    if need["qkv_bias"]:
        dw["qkv_bias"] = dqkv.sum(0)
    return m.dx(dqkv, w["qkv"]) if need_x or need["input_norm"] else None


def _last_qkv_backward(
    a: dict[str, Tensor], w: dict[str, Any], s: Shape, p: Pack, last: LastRows, m: Products,
    grads: tuple[Tensor, Tensor, Tensor], need: dict[str, bool], dw: dict[str, Tensor | None],
    need_x: bool, sums: Sums | None,
) -> Tensor | None:  # fmt: skip
    """`_qkv_backward` of the last layer, where q has rows of its own."""
    dq, dk, dv = grads
    at = last.queries
    none = dk.new_empty(len(dq), 0, s.head_dim), dq.new_empty(len(dk), 0, s.head_dim)
    dq, dw["q_norm"], _ = ops.qk_norm_rope_backward(
        dq, none[0], none[0], a["q_rows"], w["q_norm"], None, p.cos[at], p.sin[at],
        eps=s.eps, need_dw=need["q_norm"],
    )  # fmt: skip
    dkv, _, dw["k_norm"] = ops.qk_norm_rope_backward(
        none[1], dk, dv, a["qkv"], None, w["k_norm"], p.cos, p.sin,
        eps=s.eps, need_dw=need["k_norm"],
    )  # fmt: skip
    if need["qkv"]:
        n = ops.rms_norm(a["x"], w["input_norm"], eps=s.eps)
        dw["qkv"] = matrix_gradient(w["qkv"], sums, (dq, n[at]), (dkv, n))
        del n
    if need["qkv_bias"]:
        dw["qkv_bias"] = torch.cat((dq.sum(0), dkv.sum(0)))
    if not need_x and not need["input_norm"]:
        return None
    wq, wkv = _q_and_kv(w["qkv"], s)
    return m.dx(dkv, wkv).index_add_(0, at, m.dx(dq, wq))
