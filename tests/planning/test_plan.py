"""The search: what it chooses fits, keeps to what is pinned, and gets better with room."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.planning.test_flops import work
from tests.tiny import packed_batch, tiny_model
from xplus_fast.config import MemoryConfig
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.prepare import prepare_model
from xplus_fast.planning.cards import CARDS
from xplus_fast.planning.flops import necessary_flops, recompute_flops
from xplus_fast.planning.memory import account
from xplus_fast.planning.plan import leaner, plan_stage

QWEN3_8B = Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 1e-6, False)
QWEN3_14B = Shape("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, 1e-6, False)
SMALL = Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 1e-6, True)
GB = 10**9


def plan(shape=QWEN3_8B, layers=range(21, 36), budget=24, host=128, card="rtx4090", also=(), **m):
    return plan_stage(
        shape, list(layers), also, MemoryConfig(**m), card=CARDS.get(card),
        dtype_bytes=2 if card else 4, pack_tokens=4096, tokens_per_step=65536,
        budget=int(budget * GB) if budget else None, host=int(host * GB) if host else None,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["keep", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [3, 4, 5], [2, 3], [0, 5]])
def test_the_engine_computes_what_is_necessary_and_what_the_policy_repeats(policy, layers):
    model = prepare_model(tiny_model(), layers, activations=policy)
    batch, shape = packed_batch([24, 9, 31, 16]), shape_of(model.config)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in by_op.items() if "bmm" in str(op))
    w = work(batch)
    necessary = necessary_flops(shape, layers, (), w)

    def again(w):
        every = recompute_flops(shape, policy, w) * (shape.layers - min(layers) - 1)
        return every + recompute_flops(shape, policy, w, last=True)

    gemms = again(replace(w, pairs=0, last_pairs=0))
    assert counter.get_total_flops() - attention == necessary.linear + necessary.head + gemms
    # the reference computes a little more than the causal half
    least = necessary.attention + again(w) - gemms
    assert least < attention < 2 * least


@pytest.mark.parametrize(
    ("shape", "budget"), [(QWEN3_8B, 16), (QWEN3_8B, 24), (QWEN3_14B, 24), (QWEN3_8B, 80)]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_fit(shape, budget, stage):
    layers = range(4) if stage == 1 else range(shape.layers - 15, shape.layers)
    p = plan(shape, layers, budget, card="h100-80" if budget == 80 else "rtx4090")
    assert 0.85 * budget * GB < p.device_total <= budget * GB or budget == 80
    assert p.host_total <= 128 * GB
    assert p.predicted_tokens_per_s and p.predicted_tokens_per_s > 0
    assert [i for i, layer in enumerate(p.layout.layers) if layer.trains] == list(layers)
    assert all(i.format == "bf16" and i.placement == "device" for i in p.layout.layers if i.trains)
    assert p.update.bits == 32 and p.update.master  # the optimizer's arithmetic is the recipe's
    device, host = account(
        shape, p.layout, p.update, p.request.batch(p.micro_batch_tokens), context=p.request.context
    )
    assert (device, host) == (p.device_bytes, p.host_bytes)


def test_more_room_is_never_slower():
    speeds = [plan(budget=b).predicted_tokens_per_s for b in (12, 16, 20, 24)]
    assert (
        speeds == sorted(speeds)
        or min(b / a for a, b in zip(speeds, speeds[1:], strict=False)) > 0.985
    )  # a plainer plan may be up to 1 % slower


@pytest.mark.parametrize(
    "pins",
    [
        {"frozen": "nf4"},
        {"frozen": "int8"},
        {"frozen": "bf16"},
        {"frozen": {"0-9": "nf4", "10-20": "bf16"}},
        {"placement": "device"},
        {"placement": "host"},
        {"head": "fp8"},
        {"embedding": "device"},
        {"gradients": "device"},
        {"states": "host", "bits": 8},
        {"master": False},
        {"activations": "recompute"},
        {"activations": "offload"},
        {"micro_batch_tokens": 8192},
    ],
    ids=str,
)
def test_pins_are_kept(pins):
    p = plan(**pins)
    frozen = [layer for layer in p.layout.layers if not layer.trains]
    for key, value in pins.items():
        if key == "frozen" and isinstance(value, dict):
            assert [i.format for i in frozen] == ["nf4"] * 10 + ["bf16"] * 11
        elif key == "frozen":
            assert {i.format for i in frozen} == {value}
        elif key == "placement":
            assert {i.placement for i in frozen} == {value}
        elif key == "activations":
            assert {i.activations for i in p.layout.layers[21:]} == {value}
        elif key in ("head", "embedding"):
            assert getattr(p.layout, key) == value
        elif key == "micro_batch_tokens":
            assert p.micro_batch_tokens == value
        else:
            assert getattr(p.update, key) == value
    assert p.device_total <= 24 * GB


def test_formats_that_cost_quality_come_only_where_nothing_else_fits():
    """And FP8's speed is pointed out, not taken."""
    found = plan(budget=16)
    assert {i.format for i in found.layout.layers} <= {"bf16", "int8"}
    faster = plan(budget=16, frozen="fp8").predicted_tokens_per_s / found.predicted_tokens_per_s
    assert [n for n in found.notes if "memory.frozen=fp8 is predicted" in n] == [
        f"memory.frozen=fp8 is predicted {faster:.2f}x as fast; it rounds more than auto may"
    ]
    assert not any("is predicted" in note for note in plan(card="rtx3090", budget=16).notes)
    narrow = plan(budget=14, host=8, layers=range(2))
    assert {i.format for i in narrow.layout.layers if not i.trains} == {"int8"}
    narrower = plan(budget=14, host=4, layers=range(2))
    assert {i.format for i in narrower.layout.layers if not i.trains} == {"nf4"}


def test_without_a_gpu_nothing_is_rounded_moved_or_repeated():
    p = plan(card="", budget=None, host=None)
    assert {(i.format, i.placement, i.activations) for i in p.layout.layers} == {
        ("bf16", "device", "keep")
    }
    assert (p.layout.head, p.layout.embedding) == ("bf16", "device")
    assert (p.update.gradients, p.update.states) == ("device", "device")
    assert p.micro_batch_tokens == 4096 and p.predicted_tokens_per_s is None
    assert p.host_total == 0 and "CUDA context" not in p.device_bytes


def test_a_tied_embedding_stays_and_is_not_rounded():
    p = plan(SMALL, range(4), 3)
    assert (p.layout.embedding, p.layout.head) == ("device", "bf16")


def test_rounding_is_said_with_how_to_prevent_it():
    assert any(
        "memory.frozen=bf16" in note for note in plan(budget=14, host=8, layers=range(2)).notes
    )
    assert not any("memory.frozen=bf16" in note for note in plan(frozen="fp8").notes)
    assert any("no FP8" in note for note in plan(card="rtx3090", frozen="fp8").notes)


def test_what_more_memory_would_change_is_right():
    p = plan(layers=range(4), budget=16)
    (note,) = [n for n in p.notes if "keep all activations" in n]
    more = float(note.split()[1])
    keep = tuple(replace(i, activations="keep") for i in p.layout.layers)
    b = p.request.batch(p.micro_batch_tokens)
    device, _ = account(QWEN3_8B, replace(p.layout, layers=keep), p.update, b)
    assert sum(device.values()) / GB - 16 == pytest.approx(more, abs=0.06)


def test_leaner_plans_reload_nothing_and_end():
    p, seen = plan(), 0
    while (lean := leaner(p)) is not None:
        assert lean.device_total <= 0.95 * p.device_total
        assert lean.micro_batch_tokens <= p.micro_batch_tokens
        for a, b in zip(lean.layout.layers, p.layout.layers, strict=True):
            assert replace(a, activations="keep") == replace(b, activations="keep")
        assert (lean.update, lean.layout.head) == (p.update, p.layout.head)
        p, seen = lean, seen + 1
        assert seen < 40
    assert seen >= 2


def test_the_impossible_says_what_by_how_much_and_what_would_fit():
    with pytest.raises(UserError) as e:
        plan(QWEN3_14B, range(25, 40), 11)
    text = str(e.value)
    assert "\n" not in text and "more than 11.0 GB; the biggest part is trained layers" in text
    offers = text.partition("what would fit: ")[2].split(" | ")
    assert len(offers) >= 2
    fewer = offers[0]
    n = int(fewer.partition(" ")[0].removeprefix("top:"))
    assert fewer.endswith("instead of top:15") and 1 <= n < 15
    plan(QWEN3_14B, range(40 - n, 40), 11)  # and it does
    with pytest.raises(UserError):
        plan(QWEN3_14B, range(39 - n, 40), 11)
    budget = next(o for o in offers if o.startswith("a budget"))
    plan(QWEN3_14B, range(25, 40), float(budget.split()[3]))


def test_too_little_host_memory_is_told_apart():
    with pytest.raises(UserError, match="memory.host: 4.0 GB .* optimizer 34.7 GB") as e:
        plan(budget=16, host=4)
    offer = str(e.value).partition("host memory of ")[2]
    plan(budget=16, host=float(offer.split()[0]))
    with pytest.raises(UserError, match="memory.host"):
        plan(budget=16, host=float(offer.split()[0]) - 0.2)
    with pytest.raises(UserError, match="memory.budget"):  # both are too little
        plan(budget=4, host=1)


def test_a_pin_that_makes_it_impossible_is_named():
    with pytest.raises(UserError, match=r"what would fit: .*memory.placement=auto"):
        plan(budget=12, placement="device", frozen="bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shape=SMALL, head="fp8"), "memory.head: fp8 .* is the embedding, too"),
        (dict(head="fp8", also=("head",)), "memory.head: fp8 .* trains"),
        (dict(shape=SMALL, layers=[0], embedding="host"), "memory.embedding: .* is the head"),
        (dict(frozen={"0-40": "nf4"}), "memory.frozen: 0-40 is out of range"),
        (dict(frozen={"0-3": "nf4", "3": "fp8"}), "memory.frozen: layer 3 is named twice"),
        (dict(shape=replace(SMALL, ffn=3080), layers=[0], frozen="fp8"), "multiples of 16"),
    ],
)
def test_bad_pins_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(**arguments)


def test_fp8_on_a_gpu_goes_with_bf16_alone():
    options = dict(card=CARDS["h100-80"], dtype_bytes=4, pack_tokens=4096, tokens_per_step=65536)
    with pytest.raises(UserError, match="fp8 goes with dtype=bfloat16 alone"):
        plan_stage(QWEN3_8B, [0], (), MemoryConfig(frozen="fp8"), **options)
    found = plan_stage(QWEN3_8B, [0], (), MemoryConfig(), budget=40 * GB, **options)
    assert {layer.format for layer in found.layout.layers} <= {"bf16", "int8"}
