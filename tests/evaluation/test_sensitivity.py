"""The sensitivity pass against naive full gradients, its memory and time, and its report."""

import json
import math
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.tiny import LAYERS, gradients, packed_batch, stock_loss, tiny_model
from xplus_fast.cli import main
from xplus_fast.errors import UserError
from xplus_fast.evaluation.sensitivity import PARTS, Sensitivity, choose_activations, measure
from xplus_fast.evaluation.sensitivity_report import (
    bootstrap,
    describe,
    layers_of,
    parse_parameters,
    propose,
    summarize,
)
from xplus_fast.model.block import BlockFunction
from xplus_fast.model.families import PACKED, shape_of
from xplus_fast.model.prepare import prepare_model
from xplus_fast.planning.memory import layer_parameters
from xplus_fast.planning.selection import resolve_layers

LENGTHS = [[13, 1, 30], [40], [7, 22, 9]]
PART_OF = {hf: part for part, names in PARTS.items() for n in names for hf in PACKED.get(n, ())}


def rows(lengths=LENGTHS):
    for seed, parts in enumerate(lengths):
        batch = packed_batch(parts, seed)
        yield {
            "input_ids": batch["input_ids"][0],
            "labels": batch["labels"][0],
            "lengths": parts,
        }


def run(model, lengths=LENGTHS):
    return measure(model, rows(lengths), total=len(lengths), show=False)


def by_part(tensors):
    """Square sums [L, P] of tensors under Hugging Face's names, in fp64."""
    sums = np.zeros((LAYERS, len(PARTS)))
    for name, t in tensors.items():
        if name.startswith("model.layers."):
            layer, hf = name.removeprefix("model.layers.").split(".", 1)
            part = list(PARTS).index(PART_OF[hf])
            sums[int(layer), part] += t.double().square().sum().item()
    return sums


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "qwen2", "llama"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_equals_naive_full_gradients_of_the_stock_model(kind, policy):
    seen = run(prepare_model(tiny_model(kind).double(), activations=policy))
    for b, lengths in enumerate(LENGTHS):
        stock = tiny_model(kind).double()
        loss = stock_loss(stock, packed_batch(lengths, b), lengths)
        loss.backward()
        np.testing.assert_allclose(seen.squares[b], by_part(gradients(stock)), rtol=1e-6)
        assert seen.losses[b] == pytest.approx(loss.item(), rel=1e-7)
    weights = by_part(dict(tiny_model(kind).double().named_parameters()))
    np.testing.assert_allclose(seen.weights, np.sqrt(weights), rtol=1e-6)
    assert seen.tokens == sum(map(sum, LENGTHS))


def test_in_fp32_equals_gradients_that_were_kept():
    seen = run(prepare_model(tiny_model()))
    model = prepare_model(tiny_model(), range(LAYERS))
    for b, lengths in enumerate(LENGTHS):
        model.zero_grad(set_to_none=True)
        model(**packed_batch(lengths, b)).loss.backward()
        np.testing.assert_allclose(seen.squares[b], by_part(gradients(model)), rtol=1e-6)


def test_prompts_that_are_shared_change_nothing():
    """Neither norms nor losses, nor how many tokens were looked at."""

    def alike(seed):
        g = torch.Generator().manual_seed(seed)
        head, ids = torch.randint(0, 300, (20,), generator=g), []
        for i in range(4):
            ids.append(torch.cat((head, torch.tensor([300 + i]), torch.arange(5 + i))))
        whole, lengths = torch.cat(ids), [len(i) for i in ids]
        place = torch.cat([torch.arange(n) for n in lengths])
        return {
            "input_ids": whole,
            "labels": whole.masked_fill(place < 23, -100),
            "lengths": lengths,
        }

    shared, apart = (
        measure(
            prepare_model(tiny_model().double()),
            map(alike, range(3)),
            total=3,
            show=False,
            shared=on,
        )
        for on in (True, False)
    )
    np.testing.assert_allclose(shared.squares, apart.squares, rtol=1e-9)
    np.testing.assert_allclose(shared.losses, apart.losses, rtol=1e-9)
    assert (shared.tokens, shared.supervised) == (apart.tokens, apart.supervised)


def test_no_more_than_one_layers_gradients_live(monkeypatch):
    """Counted over the storages of all weight gradients, whenever a layer has made its own."""
    live: dict[int, tuple[weakref.ref, int]] = {}
    counts, plain = [], BlockFunction.backward

    def backward(ctx, dy):
        made = plain(ctx, dy)
        for g in made[3:]:
            if g is not None:
                storage = g.untyped_storage()
                live[len(live)] = weakref.ref(storage), storage.nbytes()
        counts.append(alive())
        return made

    def alive():
        return sum(size for ref, size in live.values() if ref() is not None)

    monkeypatch.setattr(BlockFunction, "backward", staticmethod(backward))
    model = prepare_model(tiny_model())
    one = 4 * layer_parameters(shape_of(model.config))
    run(model)
    assert counts == [one] * (LAYERS * len(LENGTHS)) and alive() == 0
    assert all(p.grad is None for p in model.parameters())
    counts.clear()
    prepare_model(model, range(LAYERS))(**packed_batch(LENGTHS[0])).loss.backward()
    assert counts == [one * (i + 1) for i in range(LAYERS)]  # what training holds: it can tell


def test_takes_no_more_than_a_fifth_longer_than_a_forward_and_backward():
    sizes = {"hidden_size": 192, "intermediate_size": 512}
    watched, plain = (prepare_model(tiny_model("llama", **sizes)) for _ in range(2))
    prepare_model(plain, range(LAYERS))
    lengths = [[40] * 16]
    batch = packed_batch(lengths[0])
    times: dict[str, list[float]] = {"watched": [], "plain": []}
    for _ in range(9):  # interleaved; the least of each is free of what else the machine does
        start = time.perf_counter()
        plain(**batch).loss.backward()
        times["plain"].append(time.perf_counter() - start)
        plain.zero_grad(set_to_none=True)
        times["watched"].append(run(watched, lengths).seconds)
    assert min(times["watched"]) <= 1.2 * min(times["plain"])


def test_the_model_comes_back_as_it_was():
    model = prepare_model(tiny_model(), [1], also=("final_norm",))
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    run(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0] and torch.equal(p, before[name][1])
    model(**packed_batch([9, 9])).loss.backward()  # no hook is left that eats gradients
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None


def test_rows_without_a_label_are_passed_over():
    def silent():
        for i, row in enumerate(rows()):
            yield row if i == 1 else {**row, "labels": torch.full_like(row["labels"], -100)}

    seen = measure(prepare_model(tiny_model()), silent(), total=3, show=False)
    np.testing.assert_array_equal(seen.squares[0], run(prepare_model(tiny_model())).squares[1])
    assert (len(seen.losses), seen.tokens) == (1, 40)
    nothing = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    with pytest.raises(UserError, match="no token is supervised in any of 3 rows"):
        measure(prepare_model(tiny_model()), iter(nothing), total=3, show=False)


def test_a_gradient_that_is_not_finite_stops_with_its_row():
    model = prepare_model(tiny_model())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match="row 0: .* not finite"):
        run(model)


def test_activations_are_recomputed_where_memory_is_short():
    shape = shape_of(tiny_model().config)
    ask = {"element": 4, "cuda": False}
    assert choose_activations(shape, 4096, memory=None, **ask) == "keep"
    found = [choose_activations(shape, 4096, memory=m * 10**6, **ask) for m in (140, 110, 75)]
    assert found == ["keep", "recompute_mlp", "recompute"]
    with pytest.raises(UserError, match=r"GB are wanted .* and 0\.0 GB are free"):
        choose_activations(shape, 4096, memory=10**6, **ask)


# --- figures


def seen_of(squares):
    squares = np.asarray(squares, float)
    b, layers, _ = squares.shape
    return Sensitivity(squares, np.full((layers, 3), 2.0), np.ones(b), 10, 5, 1.0)


ABOUT = {
    "model": "m", "layers": 2, "layer_parameters": 100, "dtype": "float32", "device": "CPU",
    "rows": {"used": 2, "asked": 2, "there": 2}, "tokens": 10, "supervised": 5, "loss": 1.0,
    "seconds": 1.0,
}  # fmt: skip


def test_scores_by_hand():
    seen = seen_of([[[4, 0, 0], [1, 1, 1]], [[16, 0, 0], [1, 1, 1]]])
    result = summarize(seen, ABOUT, budget=None)
    first, second = result["table"]
    assert first["parts"]["attention"] == {"gradient": 1.5, "fisher": 10.0, "weight_norm": 2.0}
    assert first["gradient"] == pytest.approx(3 / math.sqrt(12))  # all parts of the layer
    assert second["gradient"] == pytest.approx(math.sqrt(3) / math.sqrt(12))
    assert (first["fisher"], second["fisher"]) == (10, 3)
    assert (first["share"], second["share"]) == pytest.approx((10 / 13, 3 / 13))
    assert (first["rank"], second["rank"]) == (1, 2)
    # a resample is the first row twice, both, or the second twice
    assert first["share_interval"] == pytest.approx([4 / 7, 16 / 19])
    assert result["proposals"] == [] and "--budget" in describe(result)


def test_bootstrap_tells_a_stable_ranking_from_noise():
    chance = np.random.default_rng(1)
    steady = np.arange(8, 0, -1) + 0.1 * chance.random((60, 8))
    found, about = bootstrap(steady, 3)
    assert about["rank_correlation"] == {"median": 1.0, "interval": [1.0, 1.0]}
    assert found["in_top"] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert found["rank_interval"] == [[i, i] for i in range(1, 9)]
    found, about = bootstrap(chance.exponential(size=(60, 8)), 3)
    assert about["rank_correlation"]["median"] < 0.95
    assert about["rank_correlation"]["interval"][0] < 0.6
    assert sum(found["in_top"]) == pytest.approx(3) and max(found["in_top"]) < 1
    assert all(low <= high for low, high in found["rank_interval"])


def test_the_intervals_have_the_width_of_the_means_spread():
    """Against the standard error: 1.96 of it each way, for a mean of many rows."""
    scores = np.random.default_rng(2).normal(10, 1, (400, 2))
    scores[:, 1] = 10
    (low, high), _ = bootstrap(scores, 1)[0]["share_interval"]
    # the share of layer 0 is m / (m + 10), whose slope at m = 10 is 1 / 40
    expected = 2 * 1.96 * scores[:, 0].std() / math.sqrt(400) / 40
    assert high - low == pytest.approx(expected, rel=0.1)


def test_one_row_says_nothing_of_stability():
    result = summarize(seen_of([[[4, 0, 0], [1, 1, 1]]]), ABOUT, budget=None)
    assert result["stability"]["rank_correlation"] is None
    assert result["table"][0]["share_interval"] is None
    assert "one row says nothing" in describe(result)


def test_selections_by_hand():
    scores = np.array([5.0, 2, 1, 4, 4, 1, 1, 3])  # 21 in all
    found = {p["how"]: (p["layers"], p["share"]) for p in propose(scores, 3, 100)}
    assert found == {
        "lowest layers": ("bottom:3", 8 / 21),
        "highest layers": ("top:3", 5 / 21),
        "best contiguous": ("2-4", 9 / 21),
        "best two ends": ("bottom:2,top:1", 10 / 21),
        "best of all": ("0,3-4", 13 / 21),
    }
    for p in propose(scores, 3, 100):
        assert resolve_layers(p["layers"], 8) == p["ids"] and p["parameters"] == 300
    assert {p["layers"] for p in propose(scores, 8, 100)} == {"all"}
    assert [p["layers"] for p in propose(scores, 1, 100)] == [
        "bottom:1",
        "top:1",
        *2 * ["bottom:1"],
    ]


@pytest.mark.parametrize(
    ("text", "count"), [("3B", 3 * 10**9), ("2.5m", 2_500_000), ("900K", 900_000), ("7", 7)]
)
def test_budgets(text, count):
    assert parse_parameters(text) == count


def test_a_budget_in_layers():
    assert [layers_of(b, 6, 100) for b in (100, 299, 600, 10**9)] == [1, 2, 6, 6]
    for text in ("", "3G", "-1", "0", "B", "much"):
        with pytest.raises(UserError, match="3B or 250M are wanted"):
            parse_parameters(text)


def test_docs_show_the_figures_of_the_results_file():
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks/results/sensitivity.json").read_text())
    assert f"```\n{describe(result)}\n```" in (root / "docs/sensitivity.md").read_text()
    assert result["rows"]["used"] > 150 and result["layers"] == 30


# --- the command


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of prepared data
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "pairs.jsonl"
    records = [{"en": f"sentence number {i}", "fr": f"phrase de rang {i}"} for i in range(60)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def recipe_of(folder, data):
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: elsewhere\noutput: runs/x\nstages: [{{layers: all}}]\n"
        f"data: {{sources: [{{path: {data}}}], pack_tokens: 256, cache: {folder}/cache}}\n"
    )
    return file


def test_the_command_writes_figures_and_picture(tiny_model_dir, data, tmp_path, capsys):
    recipe, out = recipe_of(tmp_path, data), tmp_path / "new" / "out"
    ask = ["sensitivity", str(tiny_model_dir), str(recipe), "--batches", "5", "--out", str(out)]
    budget = 2 * layer_parameters(shape_of(tiny_model_config(tiny_model_dir)))
    assert main([*ask, "data.pack_tokens=200", "--budget", str(budget)]) == 0
    said = capsys.readouterr().out
    result = json.loads((out / "sensitivity.json").read_text())
    assert result["rows"]["used"] == 5 and result["pack_tokens"] == 200
    assert [found["layer"] for found in result["table"]] == list(range(6))
    assert sum(found["share"] for found in result["table"]) == pytest.approx(1)
    assert {found["layers"] for found in result["proposals"]} >= {"bottom:2", "top:2"}
    for found in result["table"]:
        assert sum(part["fisher"] for part in found["parts"].values()) == pytest.approx(
            found["fisher"]
        )
    assert "bottom:2" in said and "rank correlation" in said and said.isascii()
    assert max(map(len, said.splitlines()[:-1])) <= 110
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert main([*ask, "data.pack_tokens=200", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["table"][0]["fisher"] == result["table"][0]["fisher"]  # the same rows
    assert again["proposals"] == []


def tiny_model_config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_plain_files_are_data_too(tiny_model_dir, data, tmp_path, capsys):
    for language in ("en", "sw"):
        lines = [f"line {i} in {language}\n" for i in range(9)]
        (tmp_path / f"x.{language}").write_text("".join(lines))
    pair = [str(tmp_path / "x.en"), str(tmp_path / "x.sw")]
    for files in ([str(data)], pair):
        out = ["--out", str(tmp_path / "out"), "--json"]
        assert main(["sensitivity", str(tiny_model_dir), *files, *out]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["data"] == files and result["rows"]["used"] == result["rows"]["there"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "DATA"], "nowhere: no such model folder"),
        (["MODEL", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["MODEL", "EMPTY"], "empty.jsonl: the file is empty"),
        (["MODEL", "NOTHING"], "empty data, no example in it"),
        (["MODEL", "DATA", "--budget", "1K"], "1,000 parameters are fewer than one layer has"),
        (["MODEL", "DATA", "--budget", "lots"], "3B or 250M are wanted"),
        (["MODEL", "DATA", "--batches", "0"], "--batches: at least 1 is wanted, found 0"),
        (
            ["MODEL", "DATA", "seed=1"],
            "'seed=1': key=value changes a recipe (.yaml), and DATA is not one",
        ),
        (["MODEL", "DATA", "DATA", "DATA"], "two line-aligned files are wanted, found 3"),
        (["MODEL", "DATA", "--out", "DATA"], "cannot be written (File exists)"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tiny_model_dir, data, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    nothing = tmp_path / "nothing.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), nothing)
    stand_for = {
        "MODEL": str(tiny_model_dir),
        "DATA": str(data),
        "EMPTY": str(empty),
        "NOTHING": str(nothing),
    }
    given = [stand_for.get(a, a) for a in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert main(["sensitivity", *given]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
