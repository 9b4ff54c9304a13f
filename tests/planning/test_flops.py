"""The necessary FLOPs against what torch counts while the engine runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import KINDS, SELECTIONS, packed_batch, padded_batch, tiny_model
from xplus_fast.model.families import shape_of
from xplus_fast.model.prepare import prepare_model
from xplus_fast.planning.flops import (
    causal_pairs,
    necessary_flops,
    total_parameters,
    trained_parameters,
)
from xplus_kernels.attention_reference import _layout_of

LENGTHS = [24, 9, 31, 16]


def count(model, batch) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    by_op = counter.get_flop_counts()["Global"]
    # attention alone uses batched products
    attention = sum(n for op, n in by_op.items() if "bmm" in str(op))
    return {"attention": attention, "rest": counter.get_total_flops() - attention}


def blocks_of(lengths, config):
    """How the reference attention cuts sequences of these lengths."""
    heads = config.num_attention_heads, config.num_key_value_heads
    q, k = (torch.empty(sum(lengths), n, 1) for n in heads)
    return _layout_of(q, k, torch.tensor([0, *lengths]).cumsum(0).int(), None, True)


def necessary(model, layers, also, batch):
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    return necessary_flops(
        shape_of(model.config), layers, also,
        tokens=sum(LENGTHS), supervised=supervised, pairs=causal_pairs(LENGTHS),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_engine_computes_what_is_necessary(kind, selection, padded):
    layers = SELECTIONS[selection]
    model = prepare_model(tiny_model(kind), layers)
    packed = packed_batch(LENGTHS)
    batch = padded_batch(packed, LENGTHS) if padded else packed
    counted, expected = count(model, batch), necessary(model, layers, (), packed)
    assert counted["rest"] == expected.linear + expected.head
    # the reference computes a little more than the causal half, less than the squares
    blocks = blocks_of(LENGTHS, model.config).blocks
    pairs = sum(count * rows * keys for count, rows, keys in (b.size for b in blocks))
    assert causal_pairs(LENGTHS) < pairs < sum(n * n for n in LENGTHS)
    computed = expected.attention * pairs / causal_pairs(LENGTHS)
    assert counted["attention"] == pytest.approx(computed, rel=1e-12)


def test_the_total_is_within_one_percent_where_attention_is_blocked():
    """On sequences of many blocks the reference's attention comes near its causal half."""
    lengths = [512, 460]
    model = prepare_model(
        tiny_model(hidden_size=256, intermediate_size=2048, num_attention_heads=2, head_dim=32),
        [0, 1],
    )
    packed = packed_batch(lengths)
    counted = count(model, packed)
    expected = necessary_flops(
        shape_of(model.config), [0, 1],
        tokens=sum(lengths), supervised=int((packed["labels"] != -100).sum()),
        pairs=causal_pairs(lengths),
    ).total  # fmt: skip
    assert sum(counted.values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_total_is_within_one_percent_on_translation_pairs(selection):
    """The demo's layer shape and lengths like its pairs: attention is a small part of a layer."""
    lengths = [49, 131, 62, 95, 71, 88]
    sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                 num_key_value_heads=3, head_dim=64)  # fmt: skip
    model = prepare_model(tiny_model("llama", **sizes), SELECTIONS[selection])
    packed = packed_batch(lengths)
    expected = necessary_flops(
        shape_of(model.config), SELECTIONS[selection], tokens=sum(lengths),
        supervised=int((packed["labels"] != -100).sum()), pairs=causal_pairs(lengths),
    ).total  # fmt: skip
    assert sum(count(model, packed).values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "also", [("embedding",), ("final_norm",), ("head",), ("embedding", "head")]
)
@pytest.mark.parametrize("layers", [[3], []])
def test_what_trains_beside_the_blocks_is_counted(also, layers):
    model = prepare_model(tiny_model(), layers, also=also)
    batch = packed_batch(LENGTHS)
    expected = necessary(model, layers, also, batch)
    assert count(model, batch)["rest"] == expected.linear + expected.head


def test_input_require_grads_and_gradient_checkpointing_change_nothing():
    model = prepare_model(tiny_model(), [4, 5])
    batch = packed_batch(LENGTHS)
    before = count(model, batch)
    model.gradient_checkpointing_enable()  # turns on enable_input_require_grads, too
    model.train()
    assert count(model, batch) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("also", [(), ("embedding", "head"), ("final_norm",)])
def test_parameters_are_counted_as_they_are(kind, also):
    model = prepare_model(tiny_model(kind), [0, 5], also=also)
    shape = shape_of(model.config)
    assert total_parameters(shape) == sum(p.numel() for p in model.parameters())
    assert trained_parameters(shape, [0, 5], also) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_tensor_shapes_are_those_of_the_checkpoint():
    for kind in KINDS:
        model = tiny_model(kind)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert shape_of(model.config).tensor_shapes() == shapes


def test_qwen3_8b_by_hand():
    """Published size: 8.19 B parameters; stage 2 of the recipe trains its top 15 layers."""
    config = type(
        "Config", (), dict(
            model_type="qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936,
            rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
        ),
    )  # fmt: skip
    shape = shape_of(config)
    assert total_parameters(shape) == 8_190_735_360
    flops = necessary_flops(shape, range(21, 36), tokens=1, supervised=0, pairs=0)
    # 36 forwards, 15 dX, 15 dW of 192.9 M weights a layer
    assert flops.total == 2 * 192_937_984 * (36 + 15 + 15)
    assert torch.tensor(flops.attention) == 0
