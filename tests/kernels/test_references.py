"""Each reference op against fp64 truth, gradcheck, and the Hugging Face module it stands for."""

import sys

import pytest
import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import xplus_kernels as ops
from tests.tiny import difference

EPS = 1e-6
# the modules: in the package their names are the functions
ATTENTION = sys.modules["xplus_kernels.attention_reference"]
HEAD = sys.modules["xplus_kernels.linear_cross_entropy"]
# Against fp64, a result may err 1.1 times as much as Hugging Face's in its dtype, or by one
# rounding.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradcheck_pair(forward, backward, inputs):
    """Numeric derivatives of `forward` against the hand-written `backward`."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            return backward(*grads, *ctx.saved_tensors)

    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(Op.apply, leaves)


@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (7, 320), (2, 3, 96)])
def test_rms_norm_gradcheck(shape):
    gradcheck_pair(
        lambda x, w: ops.rms_norm(x, w, eps=EPS),
        lambda dy, x, w: ops.rms_norm_backward(dy, x, w, eps=EPS, need_dw=True),
        (randn(*shape), randn(shape[-1], seed=1)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 96, 5120])
def test_rms_norm_rounds_as_hugging_face_does(dtype, width):
    norm = Qwen3RMSNorm(width, EPS).to(dtype)
    x = randn(9, width).to(dtype).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * randn(width, seed=1))
    y = norm(x)
    assert torch.equal(ops.rms_norm(x, norm.weight, eps=EPS), y)
    dy = randn(9, width, seed=2).to(dtype)
    y.backward(dy)
    dx, dw = ops.rms_norm_backward(dy, x, norm.weight, eps=EPS, need_dw=True)
    wide = [t.detach().double() for t in (dy, x, norm.weight)]
    true_dx, true_dw = ops.rms_norm_backward(*wide, eps=EPS, need_dw=True)
    for mine, theirs, truth in ((dx, x.grad, true_dx), (dw, norm.weight.grad, true_dw)):
        assert difference(mine, truth) <= max(1.1 * difference(theirs, truth), ROUNDING[dtype])
    assert ops.rms_norm_backward(dy, x, norm.weight, eps=EPS, need_dw=False)[1] is None


@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope_gradcheck(normed):
    t, n, k, d = 4, 3, 1, 6
    cos, sin = ops.rope_tables(torch.tensor([0, 1, 0, 7]), randn(d // 2).abs())
    norms = (randn(d, seed=1), randn(d, seed=2)) if normed else ()

    def forward(qkv, *norms):
        qn, kn = norms or (None, None)
        parts = ops.qk_norm_rope(qkv, qn, kn, cos, sin, heads=n, kv_heads=k, eps=EPS)
        return tuple(p.clone() for p in parts)  # v is a view of the input

    def backward(dq, dk, dv, qkv, *norms):
        qn, kn = norms or (None, None)
        dqkv, dqn, dkn = ops.qk_norm_rope_backward(
            dq, dk, dv, qkv, qn, kn, cos, sin, eps=EPS, need_dw=True
        )
        return (dqkv, dqn, dkn) if norms else dqkv

    gradcheck_pair(forward, backward, (randn(t, (n + 2 * k) * d), *norms))


@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope_of_queries_or_keys_alone(normed):
    """Computed apart they are what they are together, and so are their gradients."""
    t, n, k, d = 5, 3, 2, 8
    cos, sin = ops.rope_tables(torch.tensor([0, 1, 2, 0, 7]), randn(d // 2).abs())
    qkv = randn(t, (n + 2 * k) * d)
    norms = [randn(d, seed=1), randn(d, seed=2)] if normed else [None, None]
    grads = [randn(t, h, d, seed=s) for s, h in enumerate((n, k, k), 3)]
    q, key, v = ops.qk_norm_rope(qkv, *norms, cos, sin, heads=n, kv_heads=k, eps=EPS)
    options = dict(eps=EPS, need_dw=True)
    dqkv, dqn, dkn = ops.qk_norm_rope_backward(*grads, qkv, *norms, cos, sin, **options)
    none = qkv.new_empty(t, 0, d)

    only = qkv[:, : n * d], norms[0], None, cos, sin
    made = ops.qk_norm_rope(*only, heads=n, kv_heads=0, eps=EPS)
    assert torch.equal(made[0], q) and made[1].shape == made[2].shape == (t, 0, d)
    made = ops.qk_norm_rope_backward(grads[0], none, none, *only, **options)
    assert torch.equal(made[0], dqkv[:, : n * d]) and made[2] is None
    assert made[1] is None if dqn is None else torch.equal(made[1], dqn)

    only = qkv[:, n * d :], None, norms[1], cos, sin
    made = ops.qk_norm_rope(*only, heads=0, kv_heads=k, eps=EPS)
    assert made[0].shape == (t, 0, d) and torch.equal(made[1], key) and torch.equal(made[2], v)
    made = ops.qk_norm_rope_backward(none, *grads[1:], *only, **options)
    assert torch.equal(made[0], dqkv[:, n * d :]) and made[1] is None
    assert made[2] is None if dkn is None else torch.equal(made[2], dkn)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (40, 8)])
def test_qk_norm_rope_equals_hugging_face(heads):
    (n, k), d, t = heads, 16, 13
    config = Qwen3Config(
        head_dim=d, num_attention_heads=n, num_key_value_heads=k, hidden_size=n * d
    )
    rotary = Qwen3RotaryEmbedding(config)
    positions = torch.cat((torch.arange(8), torch.arange(5)))
    qkv = randn(t, (n + 2 * k) * d).float()
    qn, kn = (Qwen3RMSNorm(d, EPS) for _ in range(2))
    with torch.no_grad():
        qn.weight.copy_(randn(d, seed=1)), kn.weight.copy_(randn(d, seed=2))
    cos, sin = ops.rope_tables(positions, rotary.inv_freq)
    q, key, v = ops.qk_norm_rope(qkv, qn.weight, kn.weight, cos, sin, heads=n, kv_heads=k, eps=EPS)
    hq, hk, hv = qkv.view(t, -1, d).split((n, k, k), 1)
    hq, hk = (norm(x).transpose(0, 1)[None] for norm, x in ((qn, hq), (kn, hk)))
    hq, hk = apply_rotary_pos_emb(hq, hk, *rotary(qkv, positions[None]))
    assert difference(q, hq[0].transpose(0, 1)) < 1e-6
    assert difference(key, hk[0].transpose(0, 1)) < 1e-6
    assert torch.equal(v, hv)


def test_swiglu_gradcheck():
    gradcheck_pair(ops.swiglu, ops.swiglu_backward, (randn(5, 14),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_equals_hugging_face(dtype):
    f = 48
    mlp = Qwen3MLP(Qwen3Config(hidden_size=f, intermediate_size=f)).to(dtype)
    for proj in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        nn.init.eye_(proj.weight)
    x = randn(7, f).to(dtype)
    assert difference(ops.swiglu(torch.cat((x, x), -1)), mlp(x)) <= 1e-7


def attention_inputs(lengths, n, k, d, dtype=torch.float64):
    t = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, key, v = (randn(t, h, d, dtype=dtype, seed=s) for s, h in enumerate((n, k, k)))
    return q, key, v, cu


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (5, 1)])
def test_varlen_attention_gradcheck(heads, monkeypatch):
    monkeypatch.setattr(ATTENTION, "BLOCK", 2)  # several blocks a sequence
    q, k, v, cu = attention_inputs([1, 5, 2], *heads, 4)
    options = dict(max_seqlen=5, scale=0.5)

    def backward(dout, q, k, v):
        out, lse = ops.varlen_attention(q, k, v, cu, **options)
        return ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)

    gradcheck_pair(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, **options)[0], backward, (q, k, v)
    )


@pytest.mark.parametrize("block", [3, 16, 256])
def test_varlen_attention_equals_hugging_face_sequence_by_sequence(block, monkeypatch):
    monkeypatch.setattr(ATTENTION, "BLOCK", block)
    lengths = [1, 37, 16, 3]
    q, k, v, cu = attention_inputs(lengths, 6, 2, 8, torch.float32)
    out, lse = ops.varlen_attention(q, k, v, cu, max_seqlen=37, scale=8**-0.5)
    module = nn.Module()
    module.num_key_value_groups = 3
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        parts = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        mask = torch.full((b - a, b - a), float("-inf")).triu(1)[None, None]
        expected, _ = eager_attention_forward(module, *parts, mask, scaling=8**-0.5)
        assert difference(out[a:b], expected[0]) < 1e-6
        scores = parts[0][0] @ parts[1][0].repeat_interleave(3, 0).mT * 8**-0.5 + mask[0]
        assert difference(lse[:, a:b], scores.logsumexp(-1)) < 1e-6


def attention_of_each(q, k, v, lengths, lengths_k, causal, scale):
    """out and lse, a sequence at a time, by the definition; differentiable."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for mine, keys, values in zip(
        q.split(lengths), *(x.split(lengths_k) for x in (k, v)), strict=True
    ):
        s = mine.transpose(0, 1) @ keys.repeat_interleave(group, 1).permute(1, 2, 0) * scale
        if causal:  # the last query sees the last key
            future = torch.ones(s.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(mine))
            s = s.masked_fill(future, -torch.inf)
        lses.append(s.logsumexp(-1))
        each = s.softmax(-1) @ values.repeat_interleave(group, 1).transpose(0, 1)
        outs.append(each.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)


# queries and keys of each sequence; the last are many of one size and many of all sizes
TAILS = ([1, 0, 5, 3], [1, 4, 9, 3])
CROSS = ([7, 2, 0, 40], [3, 1, 6, 90])
MANY = ([9] * 20 + list(range(1, 70)), [12] * 20 + list(range(1, 70)))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
@pytest.mark.parametrize(
    ("lengths", "causal"),
    [
        (TAILS, True),
        (CROSS, False),
        (MANY, True),
        (MANY, False),
        (([300, 0, 90], [301, 7, 90]), True),
    ],
)
def test_varlen_attention_of_other_keys(lengths, causal, heads):
    n, k = heads
    q, dout = (randn(sum(lengths[0]), n, 8, seed=s).float() for s in (0, 1))
    key, v = (randn(sum(lengths[1]), k, 8, seed=s).float() for s in (2, 3))
    cu, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in lengths)
    options = dict(
        max_seqlen=max(lengths[0]), cu_seqlens_k=cu_k, max_seqlen_k=max(lengths[1]),
        causal=causal, scale=8**-0.5,
    )  # fmt: skip
    leaves = [x.double().requires_grad_() for x in (q, key, v)]
    true, true_lse = attention_of_each(*leaves, *lengths, causal, 8**-0.5)
    grads = torch.autograd.grad(true, leaves, dout.double())
    out, lse = ops.varlen_attention(q, key, v, cu, **options)
    made = ops.varlen_attention_backward(dout, q, key, v, out, lse, cu, **options)
    for mine, truth in zip((out, lse, *made), (true, true_lse, *grads), strict=True):
        assert mine.shape == truth.shape and mine.is_contiguous()
        assert difference(mine, truth) < 1e-6
    for gradient in made[1:]:  # nobody asked these keys
        for each, count in zip(gradient.split(lengths[1]), lengths[0], strict=True):
            assert count or not each.any()


@pytest.mark.parametrize("pairs", [1, 150, 1000])
def test_varlen_attention_with_few_blocks_at_once(pairs, monkeypatch):
    """The last ones of a size may be one alone, and shorter than the others."""
    lengths = [16, 15, 14, 9, 30, 24, 23, 11, 1, 10]
    q, k, v, cu = attention_inputs(lengths, 4, 2, 8)
    dout, options = randn(*q.shape, seed=3), dict(max_seqlen=30, scale=0.3)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    true, true_lse = attention_of_each(*leaves, lengths, lengths, True, 0.3)
    grads = torch.autograd.grad(true, leaves, dout)
    monkeypatch.setattr(ATTENTION, "PAIRS", pairs)
    ATTENTION._layout.cache_clear()
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    made = ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)
    ATTENTION._layout.cache_clear()
    for mine, truth in zip((out, lse, *made), (true, true_lse, *grads), strict=True):
        assert difference(mine, truth) < 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_of_other_keys_gradcheck(causal, monkeypatch):
    monkeypatch.setattr(ATTENTION, "BLOCK", 2)
    lengths = ([2, 0, 3], [4, 2, 3]) if causal else ([4, 0, 1], [3, 2, 2])
    cu, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in lengths)
    options = dict(max_seqlen=4, scale=0.5, cu_seqlens_k=cu_k, max_seqlen_k=4, causal=causal)

    def backward(dout, q, k, v):
        out, lse = ops.varlen_attention(q, k, v, cu, **options)
        return ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)

    inputs = randn(5, 4, 4), randn(sum(lengths[1]), 2, 4, seed=1)
    gradcheck_pair(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, **options)[0],
        backward,
        (*inputs, randn(*inputs[1].shape, seed=2)),
    )


def test_varlen_attention_without_any_queries_or_any_keys():
    q, k = randn(0, 4, 8), randn(5, 2, 8)
    cu, cu_k = torch.tensor([0, 0, 0]).int(), torch.tensor([0, 2, 5]).int()
    options = dict(max_seqlen=0, scale=1.0, cu_seqlens_k=cu_k, max_seqlen_k=3)
    out, lse = ops.varlen_attention(q, k, k, cu, **options)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    dq, dk, dv = ops.varlen_attention_backward(q, q, k, k, out, lse, cu, **options)
    assert dq.shape == q.shape and dk.shape == k.shape and not dk.any() and not dv.any()
    options = dict(max_seqlen=3, scale=1.0, cu_seqlens_k=cu, max_seqlen_k=0, causal=False)
    q, k = randn(5, 4, 8), k[:0]
    out, lse = ops.varlen_attention(q, k, k, cu_k, **options)
    assert not out.any() and (lse == -torch.inf).all()
    dq, dk, _ = ops.varlen_attention_backward(q, q, k, k, out, lse, cu_k, **options)
    assert not dq.any() and dk.shape == k.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_attentions_merged_are_one_and_so_are_their_gradients(dtype):
    """Sequences behind shared prefixes, in one pack: [prefix 1, prefix 2, rests of 1, rest of 2]"""
    prefixes, rests = [17, 4], [[5, 1, 40], [23]]
    parts = [*prefixes, *(n for each in rests for n in each)]
    head, n, k, d = sum(prefixes), 6, 2, 8
    q, dout = (randn(sum(parts), n, d, dtype=dtype, seed=s) for s in (0, 1))
    key, v = (randn(sum(parts), k, d, dtype=dtype, seed=s) for s in (2, 3))

    def bounds(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int()

    scale = d**-0.5
    own = dict(max_seqlen=max(parts), scale=scale)
    cross = dict(max_seqlen=46, max_seqlen_k=17, cu_seqlens_k=bounds(prefixes), causal=False)
    cross["scale"] = scale
    of_group = bounds([sum(each) for each in rests])
    out, lse = ops.varlen_attention(q, key, v, bounds(parts), **own)
    over_prefix = ops.varlen_attention(q[head:], key[:head], v[:head], of_group, **cross)
    ops.merge_attention(out[head:], lse[:, head:], *over_prefix)
    made = ops.varlen_attention_backward(dout, q, key, v, out, lse, bounds(parts), **own)
    more = ops.varlen_attention_backward(
        dout[head:], q[head:], key[:head], v[:head], out[head:], lse[:, head:], of_group, **cross
    )
    made[0][head:] += more[0]
    for whole, part in zip(made[1:], more[1:], strict=True):
        whole[:head] += part

    leaves = [x.double().requires_grad_() for x in (q, key, v)]
    true, first, at = [], 0, head
    for prefix, each in zip(prefixes, rests, strict=True):
        shared = list(range(first, first + prefix))
        for i, count in enumerate(each):
            rows = [*shared, *range(at, at + count)]
            alone = attention_of_each(
                *(x[rows] for x in leaves), [len(rows)], [len(rows)], True, scale
            )
            new = prefix if i else 0  # rows that another sequence has not brought
            true.append((rows[new:], alone[0][new:]))
            at += count
        first += prefix
    order = torch.tensor([row for rows, _ in true for row in rows])
    plain = torch.cat([o for _, o in true])
    grads = torch.autograd.grad(plain, leaves, dout[order].double())
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert difference(out[order], plain) < bound
    for mine, truth in zip(made, grads, strict=True):
        assert difference(mine, truth) < bound


def test_merging_with_a_side_without_keys():
    out, lse, other, other_lse = randn(3, 2, 4), randn(2, 3), randn(3, 2, 4, seed=1), randn(2, 3)
    other[0], other_lse[:, 0] = 0, -torch.inf
    out[1], lse[:, 1] = 0, -torch.inf
    out[2], lse[:, 2], other[2], other_lse[:, 2] = 0, -torch.inf, 0, -torch.inf
    expected = torch.stack((out[0], other[1], torch.zeros(2, 4)))
    expected_lse = torch.stack((lse[:, 0], other_lse[:, 1], torch.full((2,), -torch.inf)), 1)
    ops.merge_attention(out, lse, other, other_lse)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("ignored", [False, True])
def test_linear_cross_entropy_equals_autograd(chunk, ignored, monkeypatch):
    monkeypatch.setattr(HEAD, "LEAST_ROWS", chunk)
    x, w = randn(11, 8).requires_grad_(), randn(17, 8, seed=1).requires_grad_()
    targets = torch.arange(11) % 17
    if ignored:
        targets[::3] = -100
    divisor = 7.5
    truth = nn.functional.cross_entropy(x @ w.T, targets, reduction="sum") / divisor
    truth.backward()
    loss, dx, dw = ops.linear_cross_entropy(
        x.detach(), w.detach(), targets, divisor=divisor, need_dw=True, logits_bytes=1
    )
    assert difference(loss, truth) < 1e-12
    assert difference(dx, x.grad) < 1e-12
    assert difference(dw, w.grad) < 1e-12
    only = ops.linear_cross_entropy(
        x.detach(), w.detach(), targets, divisor=divisor, need_dx=False, logits_bytes=1
    )
    assert torch.equal(only[0], loss) and only[1] is None and only[2] is None


def test_linear_cross_entropy_tells_each_rows_loss(monkeypatch):
    monkeypatch.setattr(HEAD, "LEAST_ROWS", 3)
    x, w, targets = randn(11, 8), randn(17, 8, seed=1), torch.arange(11) % 17
    targets[::3] = -100
    losses = torch.full((11,), float("nan"))
    options = dict(divisor=7.5, logits_bytes=1)
    made = ops.linear_cross_entropy(x, w, targets, losses=losses, **options)
    truth = nn.functional.cross_entropy(x @ w.T, targets, reduction="none")
    assert torch.allclose(losses.double(), truth, atol=1e-6) and (losses[::3] == 0).all()
    without = ops.linear_cross_entropy(x, w, targets, **options)
    assert torch.equal(made[0], without[0]) and torch.equal(made[1], without[1])
    for wrong in (losses.double(), losses[:5], torch.empty(22)[::2]):
        with pytest.raises(ValueError, match="losses is"):
            ops.linear_cross_entropy(x, w, targets, losses=wrong, **options)


def test_linear_cross_entropy_of_no_rows_is_zero():
    x, w = randn(0, 8), randn(17, 8)
    loss, dx, dw = ops.linear_cross_entropy(
        x, w, torch.empty(0, dtype=torch.int64), divisor=0, need_dw=True
    )
    assert loss == 0 and dx.shape == (0, 8) and dw.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_in_half_precision_errs_no_more_than_pytorch(dtype):
    x, w = (0.5 * randn(64, 32)).to(dtype), (0.5 * randn(101, 32, seed=1)).to(dtype)
    targets = torch.arange(64)
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy((leaf @ w.T).float(), targets).backward()
    _, truth, _ = ops.linear_cross_entropy(x.double(), w.double(), targets, divisor=64)
    _, dx, _ = ops.linear_cross_entropy(x, w, targets, divisor=64)
    assert difference(dx, truth) <= 1.1 * difference(leaf.grad, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_with_a_head_in_fp8(dtype, monkeypatch):
    """The head as FP8 holds it, computed with as any other; V no multiple of the tiles."""
    monkeypatch.setattr(HEAD, "LEAST_ROWS", 8)
    x, w = randn(21, 32).to(dtype), randn(101, 32, seed=1)
    head, targets = ops.quantize_fp8(w), torch.arange(21)
    targets[::4] = -100
    dense = head.data.float() * head.scale[:, None]
    options = dict(divisor=3.0, logits_bytes=1)
    loss, dx, _ = ops.linear_cross_entropy(x, head, targets, **options)
    theirs, dx_theirs, _ = ops.linear_cross_entropy(x, dense.to(dtype), targets, **options)
    true, dx_true, _ = ops.linear_cross_entropy(x.double(), dense.double(), targets, **options)
    rounding = 4 * torch.finfo(dtype).eps
    assert difference(loss, true) <= difference(theirs, true) + rounding
    assert difference(dx, dx_true) <= 1.1 * difference(dx_theirs, dx_true) + rounding
    assert difference(dense, w) > 0.01  # it was another head
    with pytest.raises(ValueError, match="it is frozen"):
        ops.linear_cross_entropy(x, head, targets, need_dw=True, **options)
