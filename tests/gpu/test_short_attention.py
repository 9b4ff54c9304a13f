"""Attention over short sequences on the GPU: values, prefixes, bits, what it waits for."""

import sys

import numpy as np
import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import DEVICE, GPU, MAIN_DTYPE, randn
from xplus_fast.model.packing import PackLayout, last_rows, make_pack
from xplus_kernels.intervals import short_attention_backward_ref, short_attention_ref

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.short_attention"]  # in the package its name is the function
DTYPES = [dtype for dtype in common.DTYPES if dtype != torch.float32] or [torch.float16]
HEADS = [(16, 8), (32, 8), (40, 8), (5, 1)]  # 0.6B, 8B, 14B
D = 16 if common.REHEARSAL else 128
SCALE = D**-0.5
if common.REHEARSAL:
    HEADS = [(4, 2), (5, 1)]
# prefixes, suffixes of each, others
LAYOUTS = {
    "plain": ([], [], [1, 300, 17, 1, 64, 129, 33]),
    "one prefix": ([17], [[60] * 9 + [1, 250]], []),
    "several": ([16, 1, 130], [[60, 3, 77], [5], [200, 300, 1]], [8, 400]),
    "a token": ([], [], [1]),
    "unasked": ([], [], [700, 30]),  # tiles of keys that the last layer does not ask
}
UNSUPERVISED = {"unasked": 0}  # of the sequences in order, one that predicts nothing


def given_of(name):
    """A layout and what the model is given with it, on the device."""
    prefixes, suffixes, others = LAYOUTS[name]
    small = 9 if common.REHEARSAL else 1
    prefixes, others = ([-(-n // small) for n in some] for some in (prefixes, others))
    suffixes = [[-(-n // small) for n in group] for group in suffixes]
    tails = [n for group in suffixes for n in group] + others
    predicts = [np.zeros(sum(prefixes), bool), *(np.arange(n) >= n // 2 for n in tails)]
    if name in UNSUPERVISED:
        predicts[1 + UNSUPERVISED[name]][:] = False
    members = np.array([len(group) for group in suffixes], dtype=np.int64)
    layout = PackLayout(np.array([*prefixes, *tails]), members, np.concatenate(predicts))
    positions = torch.cat([torch.arange(n) for n in layout.lengths])[None]
    rows = torch.from_numpy(np.flatnonzero(layout.predicts))
    cu = torch.from_numpy(layout.edges).int()
    return layout, *(x.to(DEVICE) for x in (positions, rows, cu, torch.ones(D // 2)))


def sees_of(layout, positions, rows, cu, inv_freq, last=False):
    """What rows of a layout see: all of them, or those that the last layer asks with."""
    pack = make_pack(
        positions.shape, positions.device, attention_mask=None, position_ids=positions,
        cu_seq_lens=cu, max_length=None, inv_freq=inv_freq, scaling=1.0, layout=layout,
    )  # fmt: skip
    return (last_rows(pack, rows, layout).attend if last else pack.attend).sees


@pytest.fixture(autouse=True)
def described(monkeypatch):
    """On a CPU, too, where no model asks for it."""
    monkeypatch.setattr(ops, "wants_sees", lambda device, length: True)


def inputs(sees, heads, dtype):
    """As a block hands them over: v is a view of qkv."""
    (n, k), q_rows, k_rows = heads, sees.keys.shape[1], sees.queries.shape[1]
    v = randn(k_rows, n + 2 * k, D, dtype=dtype, seed=3)[:, n + k :]
    q, dout = (randn(q_rows, n, D, dtype=dtype, seed=seed) for seed in (0, 2))
    return q, randn(k_rows, k, D, dtype=dtype, seed=1), v, dout


def both(forward, backward, q, k, v, dout, sees):
    out, lse = forward(q, k, v, sees, scale=SCALE)
    return out, lse, *backward(dout, q, k, v, out, lse, sees, scale=SCALE)


MINE = ops.short_attention, ops.short_attention_backward
THEIRS = short_attention_ref, short_attention_backward_ref


def check(given, sees):
    """No output errs more than PyTorch's bf16 or fp16 would, which rounds scores, too."""
    before = [x.clone() for x in given]
    mine, again = both(*MINE, *given, sees), both(*MINE, *given, sees)
    truth = both(*THEIRS, *(x.double() for x in given), sees)
    rounding = torch.finfo(given[0].dtype).eps
    for m, a, t in zip(mine, again, truth, strict=True):
        assert m.shape == t.shape and torch.equal(m, a)
        little = 1e-5 if m.dtype == torch.float32 and given[0].dtype != m.dtype else rounding
        assert (m.double() - t).norm() <= little * (1 + t.norm())
    assert all(map(torch.equal, before, given))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}-{heads[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, heads, name, last):
    sees = sees_of(*given_of(name), last)
    check(inputs(sees, heads, dtype), sees)


def test_a_full_pack():
    """More rows than the tests above have, of many lengths."""
    generator = torch.Generator().manual_seed(0)
    count = 5 if common.REHEARSAL else 150
    lengths = torch.randint(1, 120, (count,), generator=generator).tolist()
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    sees = ops.sees_causally(cu, cu, sum(lengths), sum(lengths))
    given = inputs(sees, (8, 2), MAIN_DTYPE)
    mine = both(*MINE, *given, sees)
    options = {"max_seqlen": max(lengths), "scale": SCALE}
    q, k, v, dout = (x.double() for x in given)
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    truth = (out, lse, *ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options))
    for m, t in zip(mine, truth, strict=True):
        assert (m.double() - t).norm() <= torch.finfo(MAIN_DTYPE).eps * t.norm()


def test_waits_for_nothing():
    layout = given_of("several")
    sees = sees_of(*layout)
    given = inputs(sees, (8, 2), MAIN_DTYPE)
    common.waits_for_nothing(lambda: both(*MINE, *given, sees), lambda: sees_of(*layout, True))
