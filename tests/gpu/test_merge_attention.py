"""The merge of two attentions on the GPU: values, slices of a pack, sides without keys, bits."""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import DTYPES, GPU, MAIN_DTYPE, check, randn, sized

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.merge_attention"]  # in the package its name is the function


def inputs(s, n, d, dtype):
    lse, other = 5 * randn(n, s, seed=2), 5 * randn(n, s, seed=3)
    return randn(s, n, d, dtype=dtype), lse, randn(s, n, d, dtype=dtype, seed=1), other


def merged(merge):
    """As a function: what is written in place is a copy."""

    def function(out, lse, other_out, other_lse):
        out, lse = out.clone(), lse.clone()
        merge(out, lse, other_out, other_lse)
        return out, lse

    return function


MINE, THEIRS = merged(ops.merge_attention), merged(MODULE.merge_attention_ref)


@sized()
def test_values(dtype, size, t):
    check(MINE, THEIRS, *inputs(t, size.heads, size.head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (130, 5, 16), (7, 6, 12), (70, 9, 64), (9, 28, 128)])
def test_values_of_awkward_heads(shape, dtype):
    check(MINE, THEIRS, *inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_pack(dtype):
    """The tail of a pack, which begins at no multiple of anything."""
    n, d, first, s = 8, 128, 37, 300
    out, lse, *others = inputs(s, n, d, dtype)
    whole, whole_lse = randn(first + s, n, d, dtype=dtype, seed=5), randn(n, first + s, seed=6)
    whole[first:], whole_lse[:, first:] = out, lse
    before, before_lse = whole.clone(), whole_lse.clone()
    ops.merge_attention(whole[first:], whole_lse[:, first:], *others)
    made, made_lse = MINE(out, lse, *others)
    assert torch.equal(whole[first:], made) and torch.equal(whole_lse[:, first:], made_lse)
    assert torch.equal(whole[:first], before[:first])
    assert torch.equal(whole_lse[:, :first], before_lse[:, :first])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sides_without_keys(dtype):
    out, lse, other_out, other_lse = inputs(70, 8, 128, dtype)
    other_out[::2], other_lse[:, ::2] = 0, -torch.inf
    out[::3], lse[:, ::3] = 0, -torch.inf
    made, whole = MINE(out, lse, other_out, other_lse)
    true, true_lse = THEIRS(out, lse, other_out, other_lse)
    common.assert_close(made, true, THEIRS(*map(common.wide, (out, lse, other_out, other_lse)))[0])
    torch.testing.assert_close(whole, true_lse)
    assert not made[::6].any() and (whole[:, ::6] == -torch.inf).all()
    assert torch.equal(made[3::6], other_out[3::6]) and torch.equal(made[2::6], out[2::6])


def test_the_parts_of_one_attention():
    """Over a prefix and over the rest, merged, against attention over both."""
    n, k, d, prefix, rest = 4, 2, 16, 40, 57
    q = randn(rest, n, d)
    key, v = randn(prefix + rest, k, d, seed=1), randn(prefix + rest, k, d, seed=2)
    tail, begin, whole = (
        torch.tensor([0, end], dtype=torch.int32, device=q.device)
        for end in (rest, prefix, prefix + rest)
    )
    options = {"max_seqlen": rest, "scale": d**-0.5}
    out, lse = ops.varlen_attention(q, key[prefix:], v[prefix:], tail, **options)
    cross = options | {"cu_seqlens_k": begin, "max_seqlen_k": prefix, "causal": False}
    ops.merge_attention(out, lse, *ops.varlen_attention(q, key[:prefix], v[:prefix], tail, **cross))
    both = options | {"cu_seqlens_k": whole, "max_seqlen_k": prefix + rest}
    true, true_lse = ops.varlen_attention(q, key, v, tail, **both)
    torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-5, atol=1e-5)


def test_no_rows():
    """Of a pack, whose other rows stay as they are."""
    out, lse, *others = inputs(6, 4, 16, MAIN_DTYPE)
    before = out.clone(), lse.clone()
    none = slice(3, 3)
    ops.merge_attention(out[none], lse[:, none], others[0][none], others[1][:, none])
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


def test_waits_for_nothing():
    given = inputs(130, 8, 128, MAIN_DTYPE)
    common.waits_for_nothing(lambda: ops.merge_attention(*given))
