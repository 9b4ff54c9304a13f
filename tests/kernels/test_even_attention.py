"""What cuDNN's operators are handed for sequences of one length, and what is made of their answers.

A stand-in computes the reference from PyTorch's layout, [B, heads, S, D]: a wrong view is a wrong
value. The operators themselves run in tests/gpu.
"""

import sys

import pytest
import torch

import xplus_kernels as ops
from xplus_kernels.attention_reference import varlen_attention_backward_ref, varlen_attention_ref

ATTENTION = sys.modules["xplus_kernels.varlen_attention"]
EVEN = sys.modules["xplus_kernels.even_attention"]
FORWARD = "_scaled_dot_product_cudnn_attention"
B, S, N, K, D = 3, 5, 4, 2, 8
OPTIONS = {"max_seqlen": S, "scale": 0.25}


def flat(x):
    """[B, heads, S, D] -> [T, heads, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def apart(x):
    return x.view(B, S, -1, x.shape[-1]).transpose(1, 2)


@pytest.fixture
def cudnn(monkeypatch):
    """The two operators, computing the reference; a card that has them; the calls."""
    calls = []
    cu = torch.arange(0, B * S + 1, S, dtype=torch.int32)

    def forward(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        calls.append((q, k, v))
        assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
        options = {"max_seqlen": S, "scale": scale, "causal": causal}
        out, lse = varlen_attention_ref(flat(q), flat(k), flat(v), cu, **options)
        seed = torch.zeros((), dtype=torch.int64)
        lse = lse.view(N, B, S).transpose(0, 1)[..., None]
        return apart(out), lse, None, None, S, S, seed, seed, seed

    def backward(dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, longest_q, longest_k,
                 dropout, causal, *, scale):  # fmt: skip
        calls.append((dout, q, k, v, out))
        assert lse.shape == (B, N, S, 1) and lse.is_contiguous()
        assert (bias, cu_q, cu_k, longest_q, longest_k, dropout) == (None, None, None, S, S, 0.0)
        options = {"max_seqlen": S, "scale": scale, "causal": causal}
        of = lse[..., 0].transpose(0, 1).reshape(N, B * S)
        rows = [flat(x) for x in (dout, q, k, v, out)]
        return [apart(x) for x in varlen_attention_backward_ref(*rows, of, cu, **options)]

    monkeypatch.setattr(torch.ops.aten, FORWARD, forward)
    monkeypatch.setattr(torch.ops.aten, f"{FORWARD}_backward", backward)
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: "PyTorch flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(EVEN, "LEAST", S)
    return calls


def inputs():
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(B * S, (N + 2 * K) * D, generator=g)
    q, k, v = qkv.view(B * S, -1, D).split((N, K, K), 1)
    return torch.randn(B * S, N, D, generator=g), q.contiguous(), k.contiguous(), v


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_reference(causal, cudnn):
    dout, q, k, v = inputs()
    cu = torch.arange(0, B * S + 1, S, dtype=torch.int32)
    options = OPTIONS | {"causal": causal}
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    truth = varlen_attention_ref(q, k, v, cu, **options)
    assert torch.equal(out, truth[0]) and torch.equal(lse, truth[1])
    assert out.is_contiguous() and lse.is_contiguous()
    rows = (dout, q, k, v, out, lse, cu)
    grads = ops.varlen_attention_backward(*rows, **options)
    wanted = varlen_attention_backward_ref(*rows, **options)
    for mine, true in zip(grads, wanted, strict=True):
        assert torch.equal(mine, true) and mine.is_contiguous()
    assert len(cudnn) == 2
    for call in cudnn:  # no copies, the view of qkv among them
        assert {v.data_ptr(), q.data_ptr(), k.data_ptr()} <= {x.data_ptr() for x in call}


@pytest.mark.parametrize(
    "why",
    ["other lengths", "a longer bound", "other keys", "old card", "no cuDNN", "deterministic",
     "wide heads"],
)  # fmt: skip
def test_what_is_not_for_cudnn(why, cudnn, monkeypatch):
    _, q, k, _ = inputs()
    cu = torch.arange(0, B * S + 1, S, dtype=torch.int32)
    assert EVEN.is_even(q, k, cu, cu, S)
    bounds, keys, longest = cu, cu, S
    if why == "other lengths":
        bounds = keys = torch.tensor([0, 1, 9, B * S], dtype=torch.int32)
        longest = 8
    elif why == "a longer bound":
        longest = S + 1
    elif why == "other keys":
        keys = cu.clone()
    elif why == "old card":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    elif why == "no cuDNN":
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    elif why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(EVEN, "HEAD_DIM", D - 1)
    assert not EVEN.is_even(q, k, bounds, keys, longest)


def test_the_operators_take_what_they_are_handed():
    """On the meta device: the real operators' schemas and shapes, grouped heads included."""
    _, q, k, v = (x.to("meta", torch.bfloat16) for x in inputs())
    out, lse = EVEN.even_attention(q, k, v, S, scale=0.25, causal=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (N, B * S) and lse.dtype == torch.float32
    grads = EVEN.even_attention_backward(out, q, k, v, out, lse, S, scale=0.25, causal=True)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
