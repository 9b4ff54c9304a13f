"""q/k norm and RoPE on the GPU: values, packs, strides, bits."""

import functools
import sys

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import DEVICE, DTYPES, GPU, MAIN_DTYPE, check, gradients_of, randn, sized

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.qk_norm_rope"]  # in the package its name is the function
EPS = 1e-6
FORWARD = functools.partial(check, ops.qk_norm_rope, MODULE.qk_norm_rope_ref, eps=EPS)
BACKWARD = functools.partial(
    check, ops.qk_norm_rope_backward, MODULE.qk_norm_rope_backward_ref, eps=EPS
)


def inputs(t, n, k, d, dtype):
    """qkv, the norms, the tables of three sequences in a pack, and the three gradients."""
    third = t // 3
    parts = [torch.arange(length, device=DEVICE) for length in (third, third, t - 2 * third)]
    frequencies = 1e6 ** (-torch.arange(0, d, 2, device=DEVICE) / d)
    tables = ops.rope_tables(torch.cat(parts), frequencies)
    norms = [(1 + 0.3 * randn(d, seed=s)).to(dtype) for s in (1, 2)]
    grads = [randn(t, h, d, dtype=dtype, seed=s) for s, h in ((3, n), (4, k), (5, k))]
    return randn(t, (n + 2 * k) * d, dtype=dtype), norms, tables, grads


def check_all(t, n, k, d, dtype, normed=True):
    qkv, norms, tables, grads = inputs(t, n, k, d, dtype)
    norms = [norm if normed and count else None for norm, count in zip(norms, (n, k), strict=True)]
    q, key, v = FORWARD(qkv, *norms, *tables, heads=n, kv_heads=k)
    assert q.is_contiguous() and key.is_contiguous()
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    for need_dw in (False, True):
        made = BACKWARD(*grads, qkv, *norms, *tables, need_dw=need_dw)
        assert torch.equal(made[0].view(t, n + 2 * k, d)[:, n + k :], grads[2])


@sized()
def test_values(dtype, size, t):
    check_all(t, size.heads, size.kv_heads, size.head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 8), (130, 5, 1, 16), (7, 6, 2, 12), (70, 4, 4, 64), (9, 28, 4, 128)]
    + [(130, 32, 0, 128), (130, 0, 8, 128), (7, 5, 0, 12), (7, 0, 3, 12)],  # apart
)
def test_values_of_awkward_heads(shape, normed, dtype):
    check_all(*shape, dtype, normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """qkv inside wider rows; tables with gaps; gradients with gaps, turned, of stride 0."""
    n, k, d = 5, 1, 16
    qkv, norms, (cos, sin), (dq, dk, dv) = inputs(9, n, k, d, dtype)
    inside = torch.cat((qkv, qkv), 1)[:, 3 : 3 + qkv.shape[1]]
    tables = torch.cat((cos, cos), 1)[:, :8], sin.T.contiguous().T
    FORWARD(inside, *norms, *tables, heads=n, kv_heads=k)
    for grads in zip(*map(gradients_of, (dq, dk, dv)), strict=True):
        for need_dw in (False, True):
            BACKWARD(*grads, inside, *norms, *tables, need_dw=need_dw)


def test_a_position_means_the_same_anywhere_in_a_pack():
    size, dtype = common.SIZES["8B"], MAIN_DTYPE
    n, k, d = size.heads, size.kv_heads, size.head_dim
    qkv, norms, (cos, sin), _ = inputs(9, n, k, d, dtype)
    packed = ops.qk_norm_rope(qkv, *norms, cos, sin, heads=n, kv_heads=k, eps=EPS)
    alone = ops.qk_norm_rope(qkv[3:6], *norms, cos[:3], sin[:3], heads=n, kv_heads=k, eps=EPS)
    assert all(torch.equal(p[3:6], a) for p, a in zip(packed, alone, strict=True))


def test_no_tokens():
    qkv, norms, tables, grads = inputs(0, 5, 1, 16, MAIN_DTYPE)
    q, k, v = ops.qk_norm_rope(qkv, *norms, *tables, heads=5, kv_heads=1, eps=EPS)
    assert q.shape == (0, 5, 16) and k.shape == v.shape == (0, 1, 16)
    dqkv, dqn, dkn = ops.qk_norm_rope_backward(*grads, qkv, *norms, *tables, eps=EPS, need_dw=True)
    assert dqkv.shape == qkv.shape and not dqn.any() and not dkn.any()


def test_waits_for_nothing():
    qkv, norms, tables, grads = inputs(13, 5, 1, 16, MAIN_DTYPE)
    common.waits_for_nothing(
        lambda: ops.qk_norm_rope(qkv, *norms, *tables, heads=5, kv_heads=1, eps=EPS),
        lambda: ops.qk_norm_rope_backward(*grads, qkv, *norms, *tables, eps=EPS, need_dw=True),
        lambda: ops.qk_norm_rope_backward(*grads, qkv, *norms, *tables, eps=EPS, need_dw=False),
    )
