"""Tokens that sequences share are computed once, with the figures of computing them apart."""

import pytest
import torch
from transformers import AutoConfig

import xplus_kernels as ops
from tests.tiny import KINDS, SELECTIONS, difference, gradients, select, tiny_model
from xplus_fast.data.collate import PackCollator, split_batch
from xplus_fast.model.block import KEEP, WEIGHTS, BlockFunction, BlockSpec
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import FAMILIES, Shape
from xplus_fast.model.layout import FORMATS, LayerLayout, Layout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import PackLayout, last_rows, make_pack
from xplus_fast.model.prepare import prepare_model

# Prefix tokens, and (prompt, answer) of the sequences that follow each
PACKS = {
    "one group": [(12, [(3, 5), (1, 9), (7, 2), (0, 4)])],
    "several": [(9, [(2, 3), (4, 6)]), (17, [(5, 1), (1, 1), (3, 12)]), (10, [(6, 7), (0, 20)])],
    "beside others": [(0, [(13, 9)]), (11, [(1, 4), (8, 3)]), (0, [(1, 1)]), (0, [(2, 30)])],
    "none": [(0, [(13, 9)]), (0, [(4, 4)])],
}


def rows(pack: str, seed: int = 0) -> list[dict]:
    """Sequences whose answers are supervised, now and then with a hole in it."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for prefix, members in PACKS[pack]:
        head = torch.randint(0, 320, (prefix,), generator=g)
        for i, (prompt, answer) in enumerate(members):
            rest = torch.randint(0, 320, (prompt + answer,), generator=g)
            rest[0] = 10 * i  # no longer prefix by chance
            ids = torch.cat((head, rest))
            labels = torch.where(torch.arange(len(ids)) >= len(ids) - answer, ids, -100)
            labels[len(ids) - answer + 2 : len(ids) - answer + 4] = -100
            made.append({"input_ids": ids, "labels": labels, "lengths": [len(ids)]})
    return made


def run(model, batch) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


def stock(model, sequences) -> tuple[float, dict]:
    """Hugging Face's own model, one sequence after another."""
    model.zero_grad()
    total, count = 0.0, sum(int((s["labels"][1:] != -100).sum()) for s in sequences)
    for s in sequences:
        logits = model(input_ids=s["input_ids"][None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, s["labels"][1:], reduction="sum", ignore_index=-100
        )
        (loss / count).backward()
        total += loss.item() / count
    return total, gradients(model)


def assert_same(mine: tuple[float, dict], theirs: tuple[float, dict], most: float = 2e-5) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=most)
    assert mine[1].keys() == theirs[1].keys() and mine[1]
    for name, g in theirs[1].items():
        assert difference(mine[1][name], g) < most, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("pack", PACKS)
def test_loss_and_gradients_are_those_of_stock(kind, selection, pack):
    sequences = rows(pack)
    expected = stock(select(tiny_model(kind), SELECTIONS[selection]), sequences)
    model = prepare_model(tiny_model(kind), SELECTIONS[selection])
    batch = PackCollator(shared_prefixes=True)(sequences)
    assert len(batch["layout"].members) == sum(p > 0 for p, _ in PACKS[pack])
    assert_same(run(model, batch), expected)
    assert_same(run(model, PackCollator(shared_prefixes=False)(sequences)), expected)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("pack", PACKS)
def test_attention_of_short_sequences_row_by_row(selection, pack, monkeypatch):
    """As a GPU attends, by the reference of its kernels; several chunks a prefix."""
    calls = []
    short = ops.short_attention_backward
    monkeypatch.setattr(ops, "wants_sees", lambda device, length: True)
    monkeypatch.setattr(ops, "takes_short", lambda q: True)
    monkeypatch.setattr(ops, "CHUNK", 4)
    monkeypatch.setattr(
        ops, "short_attention_backward", lambda *a, **k: calls.append(1) or short(*a, **k)
    )
    sequences = rows(pack)
    expected = stock(select(tiny_model(), SELECTIONS[selection]), sequences)
    for shared in (True, False):
        model = prepare_model(tiny_model(), SELECTIONS[selection])
        batch = PackCollator(shared_prefixes=shared)(sequences)
        assert_same(run(model, batch), expected)
    assert calls


@pytest.mark.parametrize("pack", PACKS)
def test_tables_begin_where_a_kernel_expects_it(pack, monkeypatch):
    """At a multiple of 16 bytes: else Triton compiles the kernel again for this batch."""
    monkeypatch.setattr(ops, "wants_sees", lambda device, length: True)
    batch = PackCollator(shared_prefixes=True)(rows(pack))
    layout, positions = batch["layout"], batch["position_ids"]
    whole = make_pack(
        positions.shape, positions.device, attention_mask=None, position_ids=positions,
        cu_seq_lens=batch["cu_seq_lens_q"], max_length=None, inv_freq=torch.ones(8), scaling=1.0,
        layout=layout,
    )  # fmt: skip
    last = last_rows(whole, batch["supervised_rows"], layout)
    for attend in (whole.attend, last.attend):
        shared = attend.sees.prefixes
        tables = [attend.sees.keys, attend.sees.queries]
        if pack != "none":
            tables += [shared.sees, shared.chunks, shared.of]
        assert all(x.dtype == torch.int32 and x.storage_offset() % 4 == 0 for x in tables)
        assert all(x.is_contiguous() for x in tables)


@pytest.mark.parametrize("policy", KEEP)
@pytest.mark.parametrize("also", [(), ("embedding", "final_norm", "head")])
def test_every_policy_and_what_trains_beside_the_layers(policy, also):
    sequences = rows("several")
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") if also else ()
    expected = stock(select(tiny_model(), [1, 5], names), sequences)
    model = prepare_model(tiny_model(), [1, 5], also=also, activations=policy)
    assert_same(run(model, PackCollator(shared_prefixes=True)(sequences)), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layers", [[1, 5], [1, 2]])
def test_every_format_of_frozen_layers(form, layers, tmp_path):
    if form == "nf4":
        pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")
    # sizes that FP8 and blocks take, of q alone too
    tiny_model(hidden_size=128, num_attention_heads=4, intermediate_size=192).save_pretrained(
        tmp_path
    )
    layout = Layout(tuple(LayerLayout(i in layers, form) for i in range(6)))
    model = load_model(
        Weights(CheckpointFiles.open(tmp_path)), AutoConfig.from_pretrained(tmp_path), layout,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    sequences = rows("several")
    expected = run(model, PackCollator(shared_prefixes=False)(sequences))
    # a sum's last bit may tip an activation over to the next FP8 number, 6 % away
    most = 0.03 if form == "fp8" else 2e-5
    assert_same(run(model, PackCollator(shared_prefixes=True)(sequences)), expected, most)


@pytest.mark.parametrize("layers", [[5], [0], []])
def test_the_last_layer_alone_and_none_at_all(layers):
    also = () if layers else ("final_norm",)
    names = () if layers else ("model.norm.weight",)
    sequences = rows("beside others")
    expected = stock(select(tiny_model(), layers, names), sequences)
    model = prepare_model(tiny_model(), layers, also=also)
    assert_same(run(model, PackCollator(shared_prefixes=True)(sequences)), expected)


def test_parts_add_up_to_the_whole():
    """As micro-batches of a step: each loss is its share of the step's mean."""
    model = prepare_model(tiny_model(), [2, 5])
    batch = PackCollator(shared_prefixes=True)([*rows("several"), *rows("one group", seed=1)])
    expected = run(model, batch)
    for tokens in (30, 64):
        parts = split_batch(batch, tokens)
        assert len(parts) > 2
        model.zero_grad()
        count = len(batch["supervised_rows"])
        losses = [model(**part, num_items_in_batch=count).loss for part in parts]
        sum(losses).backward()
        assert_same((sum(losses).item(), gradients(model)), expected)


def test_under_no_grad_and_in_autocast():
    sequences = rows("several")
    model = prepare_model(tiny_model(), [2, 5])
    shared, apart = (
        PackCollator(shared_prefixes=True)(sequences),
        PackCollator(shared_prefixes=False)(sequences),
    )
    with torch.no_grad():
        assert model(**shared).loss.item() == pytest.approx(model(**apart).loss.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = run(model, shared), run(model, apart)
    assert_same(a, b, 0.03)


def test_a_curve_of_twenty_steps():
    curves = []
    for shared in (True, False):
        model = prepare_model(tiny_model(), [0, 5])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        curve = []
        for step in range(20):
            sequences = [*rows("several", seed=step % 5), *rows("one group", seed=step % 3)]
            curve.append(run(model, PackCollator(shared_prefixes=shared)(sequences))[0])
            optimizer.step()
        curves.append(curve)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_nothing_supervised_is_a_loss_of_nothing():
    """Of a micro-batch of a step: its divisor is the step's."""
    sequences = [{**r, "labels": torch.full_like(r["labels"], -100)} for r in rows("several")]
    model = prepare_model(tiny_model(), [2, 5])
    batch = PackCollator(shared_prefixes=True)(sequences)
    loss, grads = run(model, {**batch, "num_items_in_batch": 7})
    assert loss == 0 and all(not g.any() for g in grads.values())


def test_what_needs_every_row_is_refused():
    model = prepare_model(tiny_model(), [0])
    batch = PackCollator(shared_prefixes=True)(rows("several"))
    with pytest.raises(ValueError, match="layout: "):
        model(**batch, return_logits=True)
    with pytest.raises(ValueError, match="layout: .* shift_labels"):
        model(**batch, shift_labels=batch["labels"])
    with pytest.raises(ValueError, match="layout: of 108 tokens"):
        model(**{**batch, "input_ids": batch["input_ids"][:, 1:], "labels": batch["labels"][:, 1:]})


def block_setup(family: str, pack: str):
    shape = Shape(
        family=family, layers=1, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=6,
        vocabulary=10, eps=1e-6, tied=True,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = shape.packed_shapes()
    weights = [
        torch.randn(sizes[n], dtype=torch.float64) * 0.5 if n in sizes else None for n in WEIGHTS
    ]
    lengths, members, predicts = {
        "shared": ([3, 2, 1, 2, 3, 2], [2, 1], [3, 4, 5, 7, 8, 11]),
        "hole": ([3, 2, 4, 3], [2], [4, 5, 8, 9]),
        "alone": ([3, 4], [], [0, 1, 5]),
    }[pack]
    import numpy as np

    t = sum(lengths)
    layout = PackLayout(
        np.array(lengths), np.array(members, np.int64), np.isin(np.arange(t), predicts)
    )
    groups = [g for g, n in enumerate(members) for _ in range(n)]
    begins = [0] * len(members) + [lengths[g] for g in groups]
    begins += [0] * (len(lengths) - len(begins))
    positions = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])
    made = make_pack(
        (1, t), torch.device("cpu"), attention_mask=None, position_ids=positions[None],
        cu_seq_lens=None, max_length=None, layout=layout,
        inv_freq=torch.tensor([1.0, 0.1], dtype=torch.float64), scaling=1.0,
    )  # fmt: skip
    last = last_rows(made, torch.tensor(predicts), layout)
    return shape, weights, made, last, torch.randn(t, 8, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", KEEP)
@pytest.mark.parametrize(
    ("pack", "pruned"), [("shared", False), ("shared", True), ("hole", True), ("alone", True)]
)
def test_gradcheck(family, policy, pack, pruned):
    shape, weights, made, last, x = block_setup(family, pack)
    present = [w.requires_grad_() for w in weights if w is not None]

    def block(x, *present):
        rest = iter(present)
        args = [None if w is None else next(rest) for w in weights]
        spec = BlockSpec(shape, policy, offload=Offload())
        return BlockFunction.apply(x, spec, made, last if pruned else None, *args)

    whole = family == "qwen3" and pack == "shared"  # every entry, else along random directions
    assert torch.autograd.gradcheck(block, (x.requires_grad_(), *present), fast_mode=not whole)


@pytest.mark.parametrize("asked", ["x", *WEIGHTS])
def test_each_gradient_alone_equals_that_of_all_together(asked):
    shape, weights, made, last, x = block_setup("qwen2" if asked == "qkv_bias" else "qwen3", "hole")
    inputs = {"x": x, **dict(zip(WEIGHTS, weights, strict=True))}
    dy = torch.randn(len(last.rows), 8, dtype=torch.float64)

    def grads(flags):
        leaves = {
            n: None if t is None else t.clone().requires_grad_(n in flags)
            for n, t in inputs.items()
        }
        weights = (leaves[n] for n in WEIGHTS)
        y = BlockFunction.apply(leaves["x"], BlockSpec(shape), made, last, *weights)
        y.backward(dy)
        return {n: t.grad for n, t in leaves.items() if t is not None}

    alone, together = grads({asked}), grads(inputs)
    assert torch.equal(alone[asked], together[asked])
    assert all(g is None for n, g in alone.items() if n != asked)


@pytest.mark.parametrize("policy", KEEP)
def test_pruning_gives_the_rows_of_the_whole(policy):
    shape, weights, made, last, x = block_setup("qwen3", "hole")
    spec = BlockSpec(shape, policy, offload=Offload())
    whole = BlockFunction.apply(x, spec, made, None, *weights)
    assert torch.allclose(
        BlockFunction.apply(x, spec, made, last, *weights), whole[last.rows], rtol=1e-12
    )
