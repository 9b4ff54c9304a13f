"""What frozen layers give, kept: whose it is, where each token's lies, and that it is the same."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import gradients, tiny_model
from xplus_fast.data.collate import PackCollator, split_batch
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import LayerLayout, Layout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.prepare import prepare_model
from xplus_fast.model.pretrained import load_config
from xplus_fast.planning.flops import below_flops, work_of
from xplus_fast.planning.hidden import Hidden
from xplus_fast.training import hidden_cache
from xplus_fast.training.hidden_cache import HiddenCache, HiddenCaches, made_of
from xplus_fast.training.hidden_store import CHECKS, STATES, InFolder, InMemory
from xplus_fast.training.place import Place

# --- whose states they are


@pytest.fixture
def prepared():
    return prepare_model(tiny_model(), [4, 5]).eval()


PLACE = Place(torch.device("cpu"), torch.float32, 0, 1)


def wanted(folder="", level=4):
    return Hidden(str(folder), level, 384, 0, "hidden-" + "0" * 32, "data", 99)


def identity(model, **changes):
    return made_of(model, replace(wanted(), **changes), PLACE)


CHANGES = {
    "data": lambda m, p: {"data": "other"},
    "level": lambda m, p: {"level": 5},
    "weights": lambda m, p: m.model.layers[3].weight("down").data[5, 7].add_(1e-6),
    "weights ": lambda m, p: m.model.layers[0].weight("q_norm").data[3].mul_(1.001),
    "weights  ": lambda m, p: m.model.embed_tokens.weight.data[11, 2].mul_(1.001),
    "rope": lambda m, p: m.model.rotary_emb.inv_freq[1].mul_(1.001),
    "rope ": lambda m, p: setattr(m.model.rotary_emb, "attention_scaling", 1.01),
    "shape": lambda m, p: setattr(
        m.model.layers[0], "shape", replace(m.model.layers[0].shape, eps=1e-5)
    ),
    "device": lambda m, p: p.setattr(hidden_cache, "_cpu", lambda: "another"),
    "attention": lambda m, p: p.setattr("xplus_kernels.attention_backend", lambda q: "another"),
    "versions": lambda m, p: p.setattr(hidden_cache, "__version__", "another"),
    "versions ": lambda m, p: p.setattr(hidden_cache, "_version", lambda name: "another"),
    "form": lambda m, p: p.setattr(hidden_cache, "_VERSION", 99),
    "dtype": lambda m, p: p.setattr(torch, "get_float32_matmul_precision", lambda: "high"),
}  # fmt: skip


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_of_whose_they_are_counts_alone(part, prepared, tmp_path, monkeypatch, capsys):
    before = identity(prepared)
    caches = HiddenCaches(PLACE, print)
    states = np.arange(384, dtype=np.uint8)[None]
    caches.of_stage(0, wanted(tmp_path), prepared).store.write([(3, 1)], states)
    assert caches.of_stage(0, wanted(tmp_path), prepared).store.has([(3, 1)])
    assert HiddenCaches(PLACE, print).of_stage(0, wanted(tmp_path), prepared).store.has([(3, 1)])
    capsys.readouterr()
    change = CHANGES[part](prepared, monkeypatch)
    change = change if isinstance(change, dict) else {}
    after = identity(prepared, **change)
    name = part.strip()
    assert before[name] != after[name]
    if name != "level":  # which other weights go with
        assert [key for key in after if after[key] != before[key]] == [name]
    now = replace(wanted(tmp_path), **change)
    for each in (caches, HiddenCaches(PLACE, print)):
        store = each.of_stage(0, now, prepared).store
        assert not store.has([(3, 1)]) and not store.checks.any()
    assert f"of other {name}" in capsys.readouterr().out.replace("level, weights, formats", "level")


def test_what_trains_and_what_lies_elsewhere_does_not_count(prepared):
    before = identity(prepared)
    prepared.model.layers[4].weight("down").data.mul_(2)
    prepared.model.norm.weight.data.mul_(2)
    prepared.lm_head.weight.data.mul_(2)
    assert identity(prepared) == before


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_frozen_formats_count_and_their_place_does_not(form, tiny_model_dir):
    files, config = CheckpointFiles.open(tiny_model_dir), load_config(tiny_model_dir)

    def loaded(form, placement):
        layers = [LayerLayout(False, form, placement)] * 4 + [LayerLayout(True)] * 2
        layout = Layout(tuple(layers))
        kind = dict(dtype=torch.float32, device=PLACE.device)
        return identity(load_model(Weights(files), config, layout, **kind))

    plain, here, there = loaded("bf16", "device"), loaded(form, "device"), loaded(form, "host")
    assert here == there and loaded("bf16", "host") == plain
    assert {key for key in plain if plain[key] != here[key]} == {"weights", "formats"}


# --- the parts


def rows_with_places(lengths, common=10, seed=0):
    """Two rows of sequences that lie in their order in the data, some beginning alike."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(1, 300, common)
    data, rows, at = [], [], 0
    for part in lengths:
        ids = [rng.integers(1, 300, n) for n in part]
        for i, x in enumerate(ids):
            if i % 3:
                x[:common] = begin[: len(x)]
        data += ids
        flat = torch.from_numpy(np.concatenate(ids))
        places = (at + np.cumsum([0, *part[:-1]])).tolist()
        labels = torch.cat([torch.cat((x.new_full((n - 3,), -100), x[-3:]))
                            for n, x in zip(part, flat.split(part), strict=True)])  # fmt: skip
        rows.append({"input_ids": flat, "labels": labels, "lengths": part, "places": places})
        at += sum(part)
    return np.concatenate(data), rows


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [20, 45, 70, 1000])
def test_every_row_has_the_place_of_a_token_like_it(shared, tokens):
    """And no two micro-batches have a place in common."""
    data, rows = rows_with_places([[20, 31, 17, 40, 16, 22], [33, 18, 25, 19]])
    batch = PackCollator(shared_prefixes=shared)(rows)
    assert (len(batch["layout"].members) > 0) == shared
    used = []
    apart = PackCollator(shared_prefixes=False)(rows)
    for part in [*split_batch(batch, tokens), apart]:
        layout = part["layout"]
        runs = zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)
        places = np.concatenate([np.arange(a, a + n) for a, n in runs])
        ids = part["input_ids"][0].numpy()
        assert np.array_equal(data[places], ids)
        positions = part["position_ids"][0].numpy()
        begins = np.cumsum([0, *(n for row in rows for n in row["lengths"])])
        assert np.array_equal(
            places - positions, begins[np.searchsorted(begins, places, "right") - 1]
        )
        used.append(places)
    several = np.concatenate(used[:-1])
    assert len(np.unique(several)) == len(several)
    assert np.array_equal(np.sort(used[-1]), np.arange(len(data)))
    for row in rows:
        del row["places"]
    assert PackCollator(shared_prefixes=shared)(rows)["layout"].starts is None


class Given:
    """`Below` in memory."""

    def __init__(self, level, x=None):
        self.level, self.x = level, x

    def get(self):
        return self.x

    def put(self, x):
        assert self.x is None
        self.x = x.detach().clone()


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "qwen2", "llama"])
@pytest.mark.parametrize(
    ("level", "trained_layers"), [(1, [3, 4]), (3, [3, 5]), (3, [5]), (5, [5])]
)
def test_starting_from_a_layer_changes_no_bit(kind, level, trained_layers):
    model = prepare_model(tiny_model(kind), trained_layers)
    _, rows = rows_with_places([[20, 31, 17, 40, 16, 22]])
    batch = PackCollator()(rows)
    plain = model(**batch).loss
    plain.backward()
    wanted = {n: g.clone() for n, g in gradients(model).items()}
    below = Given(level)
    for again in (False, True):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss = model(**batch, below=below).loss
        loss.backward()
        assert torch.equal(loss, plain)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        gemms = sum(
            n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op)
        )
        if not again:
            first = gemms
    work = replace(work_of(batch["layout"]), pairs=0)
    assert first - gemms == below_flops(shape_of(model.config), work, level)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


DAMAGES = {  # and how many of the 40 tokens are lost by it
    "a bit of a state": (lambda f: flip(f / STATES, 500), {10}),
    "a bit of a checksum": (lambda f: flip(f / CHECKS, 41), {10}),
    "states cut off within one": (lambda f: os.truncate(f / STATES, 30 * 48 + 5), {*range(30, 40)}),
    "states cut off between two": (lambda f: os.truncate(f / STATES, 30 * 48), {*range(30, 40)}),
    "no states": (lambda f: (f / STATES).unlink(), {*range(40)}),
    "zeros": (lambda f: (f / STATES).write_bytes(bytes(40 * 48)), {*range(40)}),
    "states of another place": (
        lambda f: (f / STATES).write_bytes((f / STATES).read_bytes()[48:] + bytes(48)),
        {*range(40)},
    ),
    "checksums cut off": (lambda f: os.truncate(f / CHECKS, 100), {*range(25, 40)}),
    "no checksums": (lambda f: (f / CHECKS).unlink(), {*range(40)}),
    "more": (lambda f: (f / CHECKS).write_bytes((f / CHECKS).read_bytes() + b"x" * 99), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_not_there(case, tmp_path):
    damage, lost = DAMAGES[case]
    states = np.random.default_rng(0).integers(0, 256, (40, 48), np.uint8)
    order = [(20, 20), (0, 20)]  # of places, which are not the order of rows
    InFolder(tmp_path, 40, 48).write(order, states)
    damage(tmp_path)
    store, said = InFolder(tmp_path, 40, 48), []
    store.say = said.append
    for _ in range(2):  # found by looking at each, and known from then on
        there = set()
        for i in range(40):
            out = np.zeros((1, 48), np.uint8)
            if store.has([(i, 1)]) and store.read([(i, 1)], out):
                assert np.array_equal(out[0], states[(i + 20) % 40])
                there.add(i)
        assert there == set(range(40)) - lost
    silent = case in ("checksums cut off", "no checksums", "more")  # as if it had not been written
    assert len(said) == (not silent)
    store.write(order, states)
    out = np.zeros_like(states)
    assert InFolder(tmp_path, 40, 48).read(order, out) and np.array_equal(out, states)


def test_states_in_bf16_come_back_as_they_were(tmp_path):
    place = Place(torch.device("cpu"), torch.bfloat16, 0, 1)
    _, rows = rows_with_places([[20, 31, 17, 40, 16, 22]])
    layout = PackCollator()(rows)["layout"]
    x = torch.randn(int(layout.edges[-1]), 24, dtype=torch.bfloat16)
    x[3, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
    for store in (InMemory(146, 48), InFolder(tmp_path, 146, 48)):
        cache = HiddenCache(4, 48, store, {}, place)
        part = cache.of(layout)
        assert part.get() is None and not part.found
        part.put(x)
        part.keep()
        again = cache.of(layout)
        assert torch.equal(again.get().view(torch.int16), x.view(torch.int16)) and again.found
    other = InFolder(tmp_path, 146, 48)  # as another process finds it
    assert HiddenCache(4, 48, other, {}, place).of(layout).get() is not None
