"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467).

Rounds x * rstd to x's dtype before multiplying by w, as Hugging Face's Llama and Qwen norms do.
Kept for the backward: x alone; rstd is one reduction over a row that the backward reads anyway.
"""

import torch
from torch import Tensor

from xplus_kernels.numerics import widen


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalize the last axis. x [..., H], weight [H] -> y [..., H] in x's dtype."""
    f = widen(x)
    rstd = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
    return weight * (f * rstd).to(x.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `rms_norm`. dy, x [..., H] -> dx like x, dw [H] like weight or None."""
    f = widen(x)
    rstd = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    xhat = f * rstd
    dy = widen(dy)
    g = dy * widen(weight)
    dw = (dy * xhat).flatten(0, -2).sum(0).to(weight.dtype) if need_dw else None
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype), dw
