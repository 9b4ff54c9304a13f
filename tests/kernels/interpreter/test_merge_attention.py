"""The Triton code of the merge of two attentions, interpreted on a CPU, against the reference."""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, ROUNDING, check, randn

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.merge_attention"]  # in the package its name is the function
SIZES = [(1, 1, 8), (3, 5, 16), (130, 9, 64), (33, 40, 128), (7, 6, 12)]  # S, N, D


def inputs(s, n, d, dtype=torch.float32):
    lse, other = 5 * randn(n, s, seed=2), 5 * randn(n, s, seed=3)
    return randn(s, n, d, dtype=dtype), lse, randn(s, n, d, dtype=dtype, seed=1), other


def merged(merge):
    """As a function: what is written in place is a copy."""

    def function(out, lse, other_out, other_lse):
        out, lse = out.clone(), lse.clone()
        assert merge(out, lse, other_out, other_lse) is None
        return out, lse

    return function


MINE, THEIRS = merged(ops.merge_attention), merged(MODULE.merge_attention_ref)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_merge_attention(size, dtype):
    check(MINE, THEIRS, *inputs(*size, dtype))


def test_in_a_larger_tensor_nothing_else_is_written():
    s, n, d = 9, 6, 16
    given, lse, other_out, other_lse = inputs(s, n, d)
    out, whole_lse = randn(s + 8, n + 2, d), randn(n, s + 8)
    out[3 : 3 + s, :n], whole_lse[:, 3 : 3 + s] = given, lse
    before, before_lse = out.clone(), whole_lse.clone()
    ops.merge_attention(out[3 : 3 + s, :n], whole_lse[:, 3 : 3 + s], other_out, other_lse)
    true, true_lse = THEIRS(given, lse, other_out, other_lse)
    before[3 : 3 + s, :n], before_lse[:, 3 : 3 + s] = true, true_lse
    torch.testing.assert_close(out, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole_lse, before_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:3], before[:3]) and torch.equal(out[:, n:], before[:, n:])


def test_strides_of_the_other_side():
    out, lse, other_out, other_lse = inputs(9, 6, 16)
    turned = other_out.transpose(0, 1).contiguous().transpose(0, 1)
    check(MINE, THEIRS, out, lse, turned, other_lse.T.contiguous().T)
    check(MINE, THEIRS, out, lse, other_out[:1].expand_as(out), other_lse[:, :1].expand_as(lse))


def test_sides_without_keys():
    out, lse, other_out, other_lse = inputs(6, 4, 16)
    for mine, others in ((True, False), (False, True), (True, True)):
        o, a, p, b = out.clone(), lse.clone(), other_out.clone(), other_lse.clone()
        if mine:
            o[::2], a[:, ::2] = 0, -torch.inf
        if others:
            p[::2], b[:, ::2] = 0, -torch.inf
        made, whole = MINE(o, a, p, b)
        true, true_lse = THEIRS(o, a, p, b)
        torch.testing.assert_close(made, true)
        torch.testing.assert_close(whole, true_lse)
        if mine != others:  # what has keys is as it was
            kept, kept_lse = (p, b) if mine else (o, a)
            assert torch.equal(made[::2], kept[::2])
            assert torch.equal(whole[:, ::2], kept_lse[:, ::2])


def test_no_rows():
    """Of a pack, whose other rows stay as they are."""
    out, lse, *others = inputs(6, 4, 16)
    before = out.clone(), lse.clone()
    none = slice(3, 3)
    ops.merge_attention(out[none], lse[:, none], others[0][none], others[1][:, none])
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


def test_no_head_is_padded():
    for heads, group in ((16, 8), (32, 8), (40, 8), (28, 4), (9, 1)):
        assert MODULE._tiles(heads, 128)["GROUP"] == group


def test_bad_input_is_named():
    out, lse, other_out, other_lse = inputs(3, 5, 16)
    merge = ops.merge_attention
    with pytest.raises(ValueError, match=r"^out: shape \[3, 80\]; allowed: \[S, N, D\]"):
        merge(out.flatten(1), lse, other_out, other_lse)
    with pytest.raises(ValueError, match=r"^lse: shape \[3, 5\] on cpu; .* must be \[5, 3\] there"):
        merge(out, lse.T, other_out, other_lse)
    with pytest.raises(TypeError, match="^other_lse: dtype torch.float16; allowed: float32"):
        merge(out, lse, other_out, other_lse.half())
    with pytest.raises(TypeError, match="^other_out: dtype torch.float16; out has torch.float32"):
        merge(out, lse, other_out.half(), other_lse)
    with pytest.raises(ValueError, match=r"^other_out: shape \[2, 5, 16\]"):
        merge(out, lse, other_out[1:], other_lse)
    turned = out.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match=r"^out: strides .* a row must be contiguous"):
        merge(turned, lse, other_out, other_lse)
    with pytest.raises(ValueError, match="lse's inner stride must be 1"):
        merge(out, lse.T.contiguous().T, other_out, other_lse)
    with pytest.raises(ValueError, match="rows of out must lie apart"):
        merge(out[:1].expand_as(out), lse, other_out, other_lse)
