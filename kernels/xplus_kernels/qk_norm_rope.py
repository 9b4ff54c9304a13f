"""Per-head RMSNorm of q and k, then rotary embedding, from the packed output of the qkv GEMM.

RoPE (Su et al. 2021, arXiv 2104.09864) in Hugging Face's layout: the two halves of a head are the
real and imaginary parts. Families without q/k norms pass None for their weights.
Kept for the backward: qkv before the norm.
"""

import torch
from torch import Tensor

from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import rms_norm, rms_norm_backward


def rope_tables(
    positions: Tensor, inv_freq: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """positions [T] int, inv_freq [D/2] fp32 -> cos, sin [T, D/2] fp32, times `scaling`."""
    angle = positions.to(inv_freq.dtype)[:, None] * inv_freq
    return angle.cos() * scaling, angle.sin() * scaling


def qk_norm_rope(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (N+2K)D], norms [D] or None, cos and sin [T, D/2] -> q [T,N,D], k, v [T,K,D].

    v is a view of qkv.
    """
    q, k, v = _split(qkv, heads, kv_heads)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps=eps), rms_norm(k, k_norm, eps=eps)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq [T,N,D], dk and dv [T,K,D] -> dqkv [T, (N+2K)D], d(q_norm), d(k_norm) [D] or None."""
    dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)  # the inverse rotation
    dqn = dkn = None
    if q_norm is not None and k_norm is not None:
        q, k, _ = _split(qkv, dq.shape[1], dk.shape[1])
        dq, dqn = rms_norm_backward(dq, q, q_norm, eps=eps, need_dw=need_dw)
        dk, dkn = rms_norm_backward(dk, k, k_norm, eps=eps, need_dw=need_dw)
    return torch.cat((dq.flatten(1), dk.flatten(1), dv.flatten(1)), -1), dqn, dkn


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    per_head = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [T, N+2K, D]
    q, k, v = per_head.split((heads, kv_heads, kv_heads), 1)
    return q, k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = widen(x).chunk(2, -1)  # [T, heads, D/2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
