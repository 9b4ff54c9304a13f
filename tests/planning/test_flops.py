"""The necessary FLOPs against what torch counts while the engine runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import KINDS, SELECTIONS, packed_batch, padded_batch, tiny_model
from xplus_fast.data.collate import PackCollator
from xplus_fast.model.families import shape_of
from xplus_fast.model.prepare import prepare_model
from xplus_fast.planning.flops import (
    Work,
    assumed_work,
    necessary_flops,
    total_parameters,
    trained_parameters,
    work_of,
)
from xplus_fast.training.throughput import count_work

LENGTHS = [24, 9, 31, 16]


def count(model, batch) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    by_op = counter.get_flop_counts()["Global"]
    # attention alone uses batched products
    attention = sum(n for op, n in by_op.items() if "bmm" in str(op))
    return {"attention": attention, "rest": counter.get_total_flops() - attention}


def work(batch) -> Work:
    return work_of(batch["layout"]) if "layout" in batch else Work(*count_work(batch).tolist())


def necessary(model, layers, also, batch):
    return necessary_flops(shape_of(model.config), layers, also, work(batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("form", ["packed", "padded", "shared"])
def test_the_engine_computes_what_is_necessary(kind, selection, form):
    layers = SELECTIONS[selection]
    model = prepare_model(tiny_model(kind), layers)
    packed = packed_batch(LENGTHS)
    batch = {
        "packed": packed, "padded": padded_batch(packed, LENGTHS), "shared": shared_batch(),
    }[form]  # fmt: skip
    counted, expected = count(model, batch), necessary(model, layers, (), batch)
    assert counted["rest"] == expected.linear + expected.head
    # the reference computes a little more than the causal half
    assert expected.attention < counted["attention"] < 2 * expected.attention


def shared_batch(prefix=40, lengths=(20, 33, 9, 51), shared=True):
    """Sequences that begin alike; the second half of the rest of each is supervised."""
    g = torch.Generator().manual_seed(0)
    head, rows = torch.randint(0, 300, (prefix,), generator=g), []
    for i, n in enumerate(lengths):
        ids = torch.cat((head, torch.tensor([300 + i]), torch.randint(0, 300, (n,), generator=g)))
        labels = ids.masked_fill(torch.arange(len(ids)) < prefix + n // 2, -100)
        rows.append({"input_ids": ids, "labels": labels})
    return PackCollator(shared_prefixes=shared)(rows)


def test_what_is_saved_by_hand():
    """Four sequences of 41 + n tokens share 40 of them."""
    w = work(shared_batch())
    assert (w.tokens, w.data_tokens) == (40 + 113 + 4, 4 * 41 + 113)
    assert w.saved == pytest.approx(120 / 277)
    # from the row before the first supervised token to the end
    asks = [n // 2 + n % 2 + 2 for n in (20, 33, 9, 51)]
    assert w.queries == sum(asks) and w.supervised == w.queries - 4
    rest = [21, 34, 10, 52]
    assert w.pairs == 820 + sum(n * (n + 1) // 2 + 40 * n for n in rest)
    tails = zip(asks, rest, strict=True)
    assert w.last_pairs == sum(sum(40 + n - i for i in range(a)) for a, n in tails)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_sharing_saves_its_share_of_the_flops(selection):
    layers = SELECTIONS[selection]
    shared, model = shared_batch(), prepare_model(tiny_model(), layers)
    apart = shared_batch(shared=False)
    assert work(apart).saved == 0 and work(apart).data_tokens == work(shared).data_tokens
    linear = [necessary(model, layers, (), b).linear for b in (shared, apart)]
    counted = [count(model, b) for b in (shared, apart)]
    assert [c["rest"] for c in counted] == [
        necessary(model, layers, (), b).linear + necessary(model, layers, (), b).head
        for b in (shared, apart)
    ]
    # but in the last layer, of which the prefix takes k and v alone
    assert 1 - linear[0] / linear[1] == pytest.approx(work(shared).saved, rel=0.15)
    assert counted[0]["attention"] < counted[1]["attention"]


def test_batches_of_others_are_counted_as_ours():
    """The same sequences in each form that Trainer's collators give."""
    packed = packed_batch(LENGTHS)
    rows = [
        {"input_ids": i, "labels": y}
        for i, y in zip(
            packed["input_ids"][0].split(LENGTHS), packed["labels"][0].split(LENGTHS), strict=True
        )
    ]
    ours = PackCollator(shared_prefixes=False)(rows)
    plain = {k: v for k, v in ours.items() if k != "layout"}
    for batch in (
        packed,
        padded_batch(packed, LENGTHS),
        padded_batch(packed, LENGTHS, "left"),
        plain,
    ):
        assert Work(*count_work(batch).tolist()) == work(ours)


@pytest.mark.parametrize("shared", [True, False])
def test_assumed_data_by_hand(shared):
    w = assumed_work(shared)
    assert w.saved == pytest.approx(16 / 96 if shared else 0)
    sequences = w.data_tokens / 96
    # each token of a sentence sees those before it and itself; of a shared prompt, none asks
    assert w.pairs / sequences == 96 * 97 / 2 - (16 * 17 / 2 if shared else 0)
    assert w.last_pairs / sequences == 96 * 97 / 2 - 48 * 49 / 2
    assert w.queries == w.supervised == 48 * sequences


def test_the_total_is_within_one_percent_where_attention_is_blocked():
    """On sequences of many blocks the reference's attention comes near its causal half."""
    lengths = [512, 460]
    model = prepare_model(
        tiny_model(hidden_size=256, intermediate_size=2048, num_attention_heads=2, head_dim=32),
        [0, 1],
    )
    packed = packed_batch(lengths)
    expected = necessary(model, [0, 1], (), packed).total
    assert sum(count(model, packed).values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_total_is_within_one_percent_on_translation_pairs(selection):
    """The demo's layer shape and lengths like its pairs: attention is a small part of a layer."""
    lengths = [49, 131, 62, 95, 71, 88]
    sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                 num_key_value_heads=3, head_dim=64)  # fmt: skip
    model = prepare_model(tiny_model("llama", **sizes), SELECTIONS[selection])
    for batch in (packed_batch(lengths), shared_batch(40, (31, 62, 48, 90, 55, 70))):
        expected = necessary(model, SELECTIONS[selection], (), batch).total
        assert sum(count(model, batch).values()) == pytest.approx(expected, rel=0.01)


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
    flops = necessary_flops(shape, range(21, 36), (), Work(1, 1, 0, 0, 0, 0))
    # 36 forwards, 15 dX, 15 dW of 192.9 M weights a layer; of the last one k and v alone
    assert flops.total == 2 * 192_937_984 * (35 + 14 + 14) + 3 * 2 * 2048 * 4096
    flops = necessary_flops(shape, range(21, 36), (), Work(1, 1, 1, 1, 0, 0))
    assert flops.linear == 2 * 192_937_984 * (36 + 15 + 15) and flops.attention == 0
    assert flops.head == 2 * 2 * 151936 * 4096
