"""Final norm, head and loss on the supervised rows only."""

from typing import Any

import torch
from torch import Tensor

import xplus_kernels as ops


class LossFunction(torch.autograd.Function):
    """The stack's last hidden states -> loss; all gradients are made in the forward.

    x [T, H]; norm [H]; head [V, H], or FP8 rows of it; rows [R] int64, which rows predict
    something, or None: x has these alone; targets [R] int64, what; divisor, by which the summed
    cross-entropy is divided; losses [R] fp32, to be filled with each row's, or None. Returns a
    scalar in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, head: Tensor | ops.Fp8Rows, rows: Tensor | None,
        targets: Tensor, divisor: Tensor | float, eps: float, losses: Tensor | None,
    ) -> Tensor:  # fmt: skip
        need_x, need_norm, need_head = ctx.needs_input_grad[:3]
        picked = x if rows is None else x[rows]  # [R, H]
        loss, dn, dhead = ops.linear_cross_entropy(
            ops.rms_norm(picked, norm, eps=eps), head, targets,
            divisor=divisor, need_dx=need_x or need_norm, need_dw=need_head, losses=losses,
        )  # fmt: skip
        dx = dnorm = None
        if dn is not None:
            dx, dnorm = ops.rms_norm_backward(dn, picked, norm, eps=eps, need_dw=need_norm)
        ctx.save_for_backward(dx if need_x else None, dnorm, dhead, rows)
        ctx.tokens = x.shape[0]
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dnorm, dhead, rows = ctx.saved_tensors
        if dx is not None:
            dx = dx * dloss.to(dx.dtype)
            if rows is not None:
                dx = dx.new_zeros(ctx.tokens, dx.shape[1]).index_copy_(0, rows, dx)
        dnorm = dnorm if dnorm is None else dnorm * dloss.to(dnorm.dtype)
        dhead = dhead if dhead is None else dhead * dloss.to(dhead.dtype)
        return dx, dnorm, dhead, None, None, None, None, None
