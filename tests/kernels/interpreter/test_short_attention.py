"""The Triton code of attention over short sequences, interpreted, against the reference."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, ROUNDING, randn
from xplus_fast.model.packing import PackLayout, last_rows, make_pack
from xplus_kernels.intervals import short_attention_backward_ref, short_attention_ref

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.short_attention"]  # in the package its name is the function
HEADS = [(4, 1, 16), (5, 1, 32), (2, 2, 16), (6, 2, 16)]  # N, K, D
LENGTHS = {
    "ragged": (1, 30, 17, 1, 5, 44),
    "a token": (1,),
    "one": (75,),
    "single tokens": (1, 1, 1),
    "empty between": (5, 0, 1, 0, 12),
}
LAYOUTS = {  # prefixes, suffixes of each, others
    "one group": ([12], [[3, 9, 1, 40]], []),
    "several": ([9, 1, 70], [[3, 6], [5], [3, 20, 1]], [8, 33]),
    "unasked": ([70], [[3, 90]], [100, 7]),  # tiles of keys that the last layer does not ask
}
UNSUPERVISED = {"unasked": (90, 100)}  # lengths of sequences that predict nothing


def attend(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return ops.sees_causally(cu, cu, sum(lengths), sum(lengths))


def layout_of(name, supervised=3):
    """The last tokens of suffixes and others predict something."""
    prefixes, suffixes, others = LAYOUTS[name]
    tails = [n for group in suffixes for n in group] + others
    predicts = [np.zeros(sum(prefixes), bool)]
    none = UNSUPERVISED.get(name, ())
    predicts += [np.arange(n) >= (n if n in none else n - min(supervised, n)) for n in tails]
    members = np.array([len(group) for group in suffixes])
    lengths = np.array([*prefixes, *tails])
    return PackLayout(lengths, members, np.concatenate(predicts))


def shared(name, last):
    """What rows of a layout see, of all rows or of those that the last layer asks with."""
    layout = layout_of(name)
    lengths = layout.lengths
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    pack = make_pack(
        (1, int(lengths.sum())), torch.device("cpu"), attention_mask=None, position_ids=positions,
        cu_seq_lens=None, max_length=None, inv_freq=torch.ones(8), scaling=1.0, layout=layout,
    )  # fmt: skip
    rows = torch.from_numpy(np.flatnonzero(layout.predicts))
    return (last_rows(pack, rows, layout).attend if last else pack.attend).sees


def inputs(sees, heads, dtype=torch.float32):
    (n, k, d), q_rows, k_rows = heads, sees.keys.shape[1], sees.queries.shape[1]
    rows = randn(k_rows, 2 * k, d, dtype=dtype, seed=1)
    key, v = rows[:, :k], rows[:, k:]  # views, as a block's v is one
    return randn(q_rows, n, d, dtype=dtype), key, v, randn(q_rows, n, d, dtype=dtype, seed=2)


def forward_and_backward(forward, backward):
    def run(q, k, v, dout, *, sees, scale):
        out, lse = forward(q, k, v, sees, scale=scale)
        return out, lse, *backward(dout, q, k, v, out, lse, sees, scale=scale)

    return run


MINE = forward_and_backward(ops.short_attention, ops.short_attention_backward)
THEIRS = forward_and_backward(short_attention_ref, short_attention_backward_ref)


def check(q, k, v, dout, *, sees, scale):
    """As `common.check`; the gradients of a single token's scores are zero but for rounding."""
    before = [t.clone() for t in (q, k, v, dout)]
    mine, again = (MINE(q, k, v, dout, sees=sees, scale=scale) for _ in range(2))
    theirs = THEIRS(q, k, v, dout, sees=sees, scale=scale)
    truth = THEIRS(*(t.double() for t in (q, k, v, dout)), sees=sees, scale=scale)
    for m, a, r, t in zip(mine, again, theirs, truth, strict=True):
        assert m.shape == t.shape and m.dtype == r.dtype and torch.equal(m, a)
        off = (r.double() - t).norm()
        assert (m.double() - t).norm() <= 1.1 * off + ROUNDING[q.dtype] * (1 + t.norm())
    assert all(map(torch.equal, before, (q, k, v, dout)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_short_attention(lengths, heads, dtype):
    sees = attend(lengths)
    check(*inputs(sees, heads, dtype), sees=sees, scale=heads[2] ** -0.5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_with_prefixes(name, heads, last, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 5)  # several chunks a prefix
    sees = shared(name, last)
    assert sees.prefixes is not None
    check(*inputs(sees, heads), sees=sees, scale=0.3)


@pytest.mark.parametrize("rows, keys", [(16, 16), (64, 16), (16, 64)])
def test_whatever_the_tiles(rows, keys, monkeypatch):
    for name, tiles in MODULE.TILES.items():
        given = {k: v for k, v in {"ROWS": rows, "KEYS": keys}.items() if k in tiles}
        monkeypatch.setitem(MODULE.TILES, name, tiles | given)
    sees = shared("several", False)
    check(*inputs(sees, HEADS[0]), sees=sees, scale=0.3)


def test_a_row_that_sees_nothing():
    sees = attend((6, 9))
    sees.keys[0, 4], sees.keys[1, 4] = ops.NOBODY, 0
    q, k, v, _ = inputs(sees, HEADS[0])
    for attention in (ops.short_attention, short_attention_ref):
        out, lse = attention(q, k, v, sees, scale=1.0)
        assert not out[4].any() and (lse[:, 4] == -torch.inf).all()
        assert out.isfinite().all()


def test_bad_input_is_named():
    sees = attend((6, 9))
    q, k, v, dout = inputs(sees, HEADS[0])
    out, lse = ops.short_attention(q, k, v, sees, scale=1.0)
    run, back = ops.short_attention, ops.short_attention_backward
    with pytest.raises(ValueError, match=r"^q, k: \[15, 4, 16\], \[15, 16\]; allowed"):
        run(q, k[:, 0], v[:, 0], sees, scale=1.0)
    with pytest.raises(TypeError, match="^v: torch.float16 on cpu; q: torch.float32"):
        run(q, k, v.half(), sees, scale=1.0)
    with pytest.raises(ValueError, match=r"^k, v: \[15, 1, 16\], \[14, 1, 16\]"):
        run(q, k, v[1:], sees, scale=1.0)
    with pytest.raises(ValueError, match="the inner stride must be 1"):
        run(q.transpose(0, 2).contiguous().transpose(0, 2), k, v, sees, scale=1.0)
    with pytest.raises(ValueError, match="^sees: of 15 queries and 15 keys"):
        run(q[1:], k, v, sees, scale=1.0)
    with pytest.raises(ValueError, match=r"^dout: \[14, 4, 16\]"):
        back(dout[1:], q, k, v, out, lse, sees, scale=1.0)


def test_only_short_packs_are_described_row_by_row():
    cpu = torch.device("cpu")
    assert ops.wants_sees(cpu, MODULE.SHORT) and not ops.wants_sees(cpu, MODULE.SHORT + 1)
    sees = shared("several", False)
    assert replace(sees, prefixes=None).prefixes is None and sees.prefixes.longest == 70
