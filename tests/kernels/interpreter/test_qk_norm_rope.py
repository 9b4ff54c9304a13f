"""The Triton code of q/k norm and RoPE, interpreted on a CPU, against the reference in fp64."""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, ROUNDING, check, randn

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.qk_norm_rope"]  # in the package its name is the function
EPS = 1e-6
# T, N, K, D
SIZES = [
    (1, 1, 1, 8),
    (3, 5, 1, 16),
    (130, 5, 1, 16),
    (3, 40, 8, 128),
    (7, 6, 2, 12),
    (70, 4, 4, 64),
    (70, 5, 0, 16),  # queries alone
    (3, 40, 0, 128),
    (70, 0, 3, 16),  # keys and values alone
    (3, 0, 8, 128),
]


def inputs(t, n, k, d, dtype=torch.float32):
    """qkv, the norms, the tables of two sequences in a pack, and the three gradients."""
    positions = torch.cat((torch.arange(t // 2), torch.arange(t - t // 2)))
    tables = ops.rope_tables(positions, 10000.0 ** (-torch.arange(0, d, 2) / d))
    norms = [1 + 0.3 * randn(d, dtype=dtype, seed=s) for s in (1, 2)]
    grads = [randn(t, h, d, dtype=dtype, seed=s) for s, h in ((3, n), (4, k), (5, k))]
    return randn(t, (n + 2 * k) * d, dtype=dtype), norms, tables, grads


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_qk_norm_rope(size, normed, dtype):
    _, n, k, _ = size
    qkv, norms, tables, grads = inputs(*size, dtype)
    norms = [norm if normed and count else None for norm, count in zip(norms, (n, k), strict=True)]
    forward = ops.qk_norm_rope, MODULE.qk_norm_rope_ref
    q, key, v = check(*forward, qkv, *norms, *tables, heads=n, kv_heads=k, eps=EPS)
    assert q.is_contiguous() and key.is_contiguous()
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    backward = ops.qk_norm_rope_backward, MODULE.qk_norm_rope_backward_ref
    for need_dw in (False, True):
        check(*backward, *grads, qkv, *norms, *tables, need_dw=need_dw, eps=EPS)


def test_rounds_the_norm_before_rotating():
    qkv, norms, tables, _ = inputs(64, 4, 2, 32, torch.float16)
    options = dict(heads=4, kv_heads=2, eps=EPS)
    q = ops.qk_norm_rope(qkv, *norms, *tables, **options)[0]
    theirs = MODULE.qk_norm_rope_ref(qkv, *norms, *tables, **options)[0]
    wide = [t.float() for t in (qkv, *norms)]
    late = MODULE.qk_norm_rope_ref(*wide, *tables, **options)[0].half()
    assert (q != theirs).float().mean() < 1e-3 < (late != theirs).float().mean()


def test_strides():
    """qkv inside wider rows; tables with gaps; gradients transposed, with gaps, of stride 0."""
    t, n, k, d = 9, 5, 1, 16
    qkv, norms, (cos, sin), (dq, dk, dv) = inputs(t, n, k, d)
    wide = torch.cat((qkv, qkv), 1)[:, 3 : 3 + qkv.shape[1]]
    tables = torch.cat((cos, cos), 1)[:, :8], sin.T.contiguous().T
    forward = ops.qk_norm_rope, MODULE.qk_norm_rope_ref
    check(*forward, wide, *norms, *tables, heads=n, kv_heads=k, eps=EPS)
    gradients = [
        (dq.transpose(0, 1).contiguous().transpose(0, 1), dk, dv),
        (torch.cat((dq, dq), -1)[..., :d], randn(2 * t, k, d)[::2], dv),
        tuple(torch.ones(()).expand(g.shape) for g in (dq, dk, dv)),
        (dq[:, :1].expand(dq.shape), dk[:1].expand(dk.shape), dv[..., :1].expand(dv.shape)),
    ]
    backward = ops.qk_norm_rope_backward, MODULE.qk_norm_rope_backward_ref
    for grads in gradients:
        for need_dw in (False, True):
            check(*backward, *grads, wide, *norms, *tables, need_dw=need_dw, eps=EPS)


def test_no_head_is_padded():
    for heads, group in (
        ((16, 8), 8),
        ((32, 8), 8),
        ((40, 8), 8),
        ((28, 4), 4),
        ((9, 3), 1),
        ((32, 0), 8),
        ((0, 4), 4),
    ):
        assert MODULE._tiles(*heads, 128, 16)["GROUP"] == group


def test_no_tokens():
    qkv, norms, tables, grads = inputs(0, 5, 1, 16)
    q, k, v = ops.qk_norm_rope(qkv, *norms, *tables, heads=5, kv_heads=1, eps=EPS)
    assert q.shape == (0, 5, 16) and k.shape == v.shape == (0, 1, 16)
    dqkv, dqn, dkn = ops.qk_norm_rope_backward(*grads, qkv, *norms, *tables, eps=EPS, need_dw=True)
    assert dqkv.shape == qkv.shape and not dqn.any() and not dkn.any()


def test_bad_input_is_named():
    qkv, (qn, kn), (cos, sin), (dq, dk, dv) = inputs(3, 5, 1, 16)
    options = dict(heads=5, kv_heads=1, eps=EPS)
    with pytest.raises(ValueError, match=r"^qkv: shape \[3, 111\]; with heads = 5 and kv_heads"):
        ops.qk_norm_rope(qkv[:, 1:], qn, kn, cos, sin, **options)
    with pytest.raises(ValueError, match="^q_norm, k_norm: one of them is None"):
        ops.qk_norm_rope(qkv, qn, None, cos, sin, **options)
    with pytest.raises(ValueError, match="^k_norm: a norm where there are no heads"):
        ops.qk_norm_rope(qkv, qn, kn, cos, sin, heads=7, kv_heads=0, eps=EPS)
    with pytest.raises(ValueError, match="heads = 0 and kv_heads = 0"):
        ops.qk_norm_rope(qkv, None, None, cos, sin, heads=0, kv_heads=0, eps=EPS)
    with pytest.raises(ValueError, match=r"^k_norm: shape \[15\]"):
        ops.qk_norm_rope(qkv, qn, kn[1:], cos, sin, **options)
    with pytest.raises(ValueError, match=r"^sin: shape \[3, 16\]"):
        ops.qk_norm_rope(qkv, qn, kn, cos, torch.cat((sin, sin), 1), **options)
    with pytest.raises(TypeError, match="^cos: dtype torch.float16; allowed: float32"):
        ops.qk_norm_rope(qkv, qn, kn, cos.half(), sin, **options)
    backward = dict(eps=EPS, need_dw=False)
    with pytest.raises(ValueError, match=r"^dv: shape \[3, 5, 16\]"):
        ops.qk_norm_rope_backward(dq, dk, dq, qkv, qn, kn, cos, sin, **backward)
    with pytest.raises(ValueError, match=r"^dq: shape \[3, 80\]; it must be \[T, heads, D\]"):
        ops.qk_norm_rope_backward(dq.flatten(1), dk, dv, qkv, qn, kn, cos, sin, **backward)
