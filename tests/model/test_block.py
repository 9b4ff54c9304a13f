"""The block function: fp64 gradcheck, what it keeps, what it computes."""

import pytest
import torch

from tests.tiny import gradients, packed_batch, tiny_model
from xplus_fast.model import offload as offloading
from xplus_fast.model.block import KEEP, WEIGHTS, BlockFunction, BlockSpec
from xplus_fast.model.families import FAMILIES, Shape
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import make_pack
from xplus_fast.model.prepare import prepare_model


def setup(family: str, lengths=(3, 1, 4)):
    shape = Shape(
        family=family, layers=1, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=6,
        vocabulary=10, eps=1e-6, tied=True,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = shape.packed_shapes()
    weights = [
        torch.randn(sizes[n], dtype=torch.float64) * 0.5 if n in sizes else None for n in WEIGHTS
    ]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    pack = make_pack(
        (1, sum(lengths)), torch.device("cpu"), attention_mask=None, position_ids=positions,
        cu_seq_lens=None, max_length=None,
        inv_freq=torch.tensor([1.0, 0.1], dtype=torch.float64), scaling=1.0,
    )  # fmt: skip
    x = torch.randn(sum(lengths), 8, dtype=torch.float64)
    return shape, weights, pack, x


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", KEEP)
def test_gradcheck(family, policy):
    shape, weights, pack, x = setup(family)
    present = [w.requires_grad_() for w in weights if w is not None]

    def block(x, *present):
        rest = iter(present)
        args = [None if w is None else next(rest) for w in weights]
        spec = BlockSpec(shape, policy, offload=Offload())
        return BlockFunction.apply(x, spec, pack, None, *args)

    assert torch.autograd.gradcheck(block, (x.requires_grad_(), *present), fast_mode=False)


@pytest.mark.parametrize("asked", ["x", *WEIGHTS])
def test_each_gradient_alone_equals_that_of_all_together(asked):
    family = "qwen2" if asked == "qkv_bias" else "qwen3"
    shape, weights, pack, x = setup(family)
    dy = torch.randn_like(x)
    inputs = {"x": x, **dict(zip(WEIGHTS, weights, strict=True))}

    def run(flags):
        leaves = {
            n: None if t is None else t.clone().requires_grad_(n in flags)
            for n, t in inputs.items()
        }
        y = BlockFunction.apply(
            leaves["x"], BlockSpec(shape), pack, None, *(leaves[n] for n in WEIGHTS)
        )
        y.backward(dy)
        return {n: t.grad for n, t in leaves.items() if t is not None}

    alone, together = run({asked}), run(inputs)
    assert torch.equal(alone[asked], together[asked])
    assert all(g is None for n, g in alone.items() if n != asked)


@pytest.mark.parametrize("policy", ["recompute_mlp", "recompute"])
def test_recomputing_gives_the_same_bits(policy):
    kept, again = (prepare_model(tiny_model(), [1, 3], activations=a) for a in ("keep", policy))
    batch = packed_batch([30, 5, 17])
    kept(**batch).loss.backward()
    again(**batch).loss.backward()
    mine = gradients(again)
    assert mine.keys() == gradients(kept).keys()
    for name, g in gradients(kept).items():
        assert torch.equal(mine[name], g), name


@pytest.mark.parametrize("policy", KEEP)
def test_what_is_kept_is_what_the_policy_says(policy):
    shape, weights, pack, x = setup("qwen3")
    t, h, nd, qkv, f = 8, 8, 16, 32, 6
    elements = {"x": h, "qkv": qkv, "out": nd, "lse": 4, "h": h, "gate_up": 2 * f}
    expected = t * sum(elements[name] for name in KEEP[policy] if name in elements)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: held.append(s) or s, lambda s: s):
        BlockFunction.apply(x.requires_grad_(), BlockSpec(shape, policy), pack, None, *weights)
    pointers = {w.data_ptr() for w in weights if w is not None}
    assert sum(s.numel() for s in held if s.data_ptr() not in pointers) == expected


def test_gradients_of_stride_zero_and_a_second_backward():
    shape, weights, pack, x = setup("qwen3")
    x.requires_grad_()
    y = BlockFunction.apply(x, BlockSpec(shape), pack, None, *weights)
    y.sum().backward(retain_graph=True)  # an expanded gradient
    once = x.grad.clone()
    y.backward(torch.ones_like(y))
    assert torch.allclose(x.grad, 2 * once, rtol=1e-12)


def test_host_memory_is_pinned_once_for_the_longest_micro_batch(monkeypatch):
    """Each one has another length, and pinning takes longer than a copy."""
    made = []

    def zeros(shape, dtype, device):
        made.append(shape)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(offloading, "zeros_on_host", zeros)
    home = Offload()
    home.tokens = 128
    for tokens in (100, 128, 90):
        buffer = home.buffer(torch.empty(tokens, 16, dtype=torch.bfloat16))
        home.spare.append(buffer)
    assert made == [(128 * 16 * 2,)]
    home.buffer(torch.empty(200, 16))  # a single sequence longer than what was planned
    assert made[1:] == [(200 * 16 * 4,)] and home.spare == []
