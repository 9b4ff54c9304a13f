"""The experiment on a tiny model: every variant, going on, and the figures in the docs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.recipe import experiment, figures, material, report, tasks, training
from benchmarks.recipe.score import score
from benchmarks.recipe.tiny import tiny_recipe
from benchmarks.recipe.training import Run
from xplus_fast.errors import UserError

NAMES = ["full", "two stages", "top", "bottom", "LoRA", "joint"]
SETUP = experiment.TINY


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def smoke(demo, tmp_path_factory):
    """Two of the runs, and where they were made."""
    folder = tmp_path_factory.mktemp("recipe")
    work, out = folder / "work", folder / "new" / "recipe.json"
    todo = experiment.runs(demo, SETUP)
    chosen = [todo[0], replace(todo[2], replay=True)]
    return experiment.experiment(demo, SETUP, chosen, work, out), work, out, chosen


def test_what_says_most_comes_first(demo) -> None:
    full = replace(SETUP, rates=(3.0, 2.0), seeds=3)
    runs = experiment.runs(demo, full)
    assert [r.variant for r in runs[:6]] == NAMES
    assert {(r.rate, r.replay, r.seed) for r in runs[:6]} == {(3.0, False, 0)}
    assert {(r.rate, r.replay) for r in runs[:18]} == {(3.0, False)}
    assert {(r.rate, r.replay, r.seed) for r in runs[18:24]} == {(3.0, True, 0)}
    assert {(r.rate, r.replay, r.seed) for r in runs[24:30]} == {(2.0, False, 0)}
    assert len({r.name for r in runs}) == len(runs) == 6 * 2 * 2 * 3


def test_each_run_trains_and_is_measured(smoke) -> None:
    result, work, _, chosen = smoke
    assert list(result["runs"]) == ["base", *(r.name for r in chosen)]
    assert result["planned"] == 24 and result["tasks"] == list(tasks.TASKS)
    base = result["runs"]["base"]
    for run in chosen:
        found = result["runs"][run.name]
        assert found["steps"] == len(found["losses"]) == 4 and set(found["points"]) == {"0.5", "1"}
        assert "chrf" in found["points"]["1"] and "chrf" not in found["points"]["0.5"]
        whole = sum(found["points"]["1"]["loss"]["en-fr"])
        assert (
            whole < sum(base["loss"]["en-fr"]) and found["points"]["1"]["tokens"] == base["tokens"]
        )
    assert not list((work / "runs").iterdir())  # what was measured is thrown away
    replay = [json.loads(x) for x in (work / "train/general.jsonl").read_text().splitlines()]
    assert 0 < len(replay) <= SETUP.size.replay


def test_what_is_done_is_not_done_again(smoke, demo, monkeypatch, tmp_path) -> None:
    result, work, _, chosen = smoke
    monkeypatch.setattr(experiment, "_one", None)
    again = experiment.experiment(demo, SETUP, chosen, work, tmp_path / "x.json")
    assert again["runs"] == result["runs"]
    listed = experiment._listed(experiment.runs(demo, SETUP), work)
    assert listed[:3] == ["done  base", "done  full-0.01-seed0", "-     two-stages-0.01-seed0"]
    assert sum(line.startswith("done") for line in listed) == 3
    with pytest.raises(UserError, match="results of another setup"):
        experiment.experiment(demo, replace(SETUP, steps=6), chosen, work, tmp_path / "x.json")


def test_a_killed_run_keeps_its_points(smoke, demo, monkeypatch) -> None:
    """Killed between two points: the first is not measured again, nothing is trained again."""
    result, work, out, _ = smoke
    run = experiment.runs(demo, SETUP)[3]
    measure, seen = experiment._Measured.measure, []

    def second_dies(self, *arguments, chrf):
        seen.append(chrf)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(self, *arguments, chrf=chrf)

    monkeypatch.setattr(experiment._Measured, "measure", second_dies)
    with pytest.raises(KeyboardInterrupt):
        experiment.experiment(demo, SETUP, [run], work, out)
    assert "begun bottom-0.01-seed0" in experiment._listed([run], work)
    assert json.loads(out.read_text())["runs"].keys() == result["runs"].keys()
    experiment.experiment(demo, SETUP, [run], work, out)
    assert seen == [True, False, False]
    assert set(json.loads(out.read_text())["runs"][run.name]["points"]) == {"0.5", "1"}


@pytest.mark.parametrize("variant", ["two stages", "LoRA"])
def test_half_a_change_is_half_of_it(variant, demo, tmp_path) -> None:
    """At 0 nothing differs; at 0.5 each tensor lies in the middle; only selected layers change."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    given = material.prepare(demo, SETUP.size, tmp_path, tokenizer)
    run = Run(variant, 1e-2, False, 0)
    recipe = training.recipe_of(run, demo, given, 4, 256, tmp_path / "runs" / run.name)
    at, losses = training.carry_out(recipe, run, given)
    assert len(losses) == 4
    base = AutoModelForCausalLM.from_pretrained(demo.model).state_dict()
    whole, half, none = dict(at(1.0)), dict(at(0.5)), dict(at(0.0))
    assert whole.keys() == half.keys()
    layers = {int(name.split(".")[2]) for name in whole}
    assert layers == ({0, 2, 3} if variant == "two stages" else {0, 1, 2, 3})
    assert any(not torch.equal(whole[n], base[n]) for n in whole)
    for name, tensor in whole.items():
        middle = (base[name].double() + tensor.double()) / 2
        torch.testing.assert_close(half[name].double(), middle, rtol=0, atol=1e-6)
        assert torch.equal(none.get(name, base[name]), base[name])


def test_scores_are_those_of_the_plain_model(demo) -> None:
    """Whatever sequences begin with in common, and however they are padded."""
    model = AutoModelForCausalLM.from_pretrained(demo.model).eval()
    generator = torch.Generator().manual_seed(0)
    for shared in (0, 1, 9):
        prefix = torch.randint(0, 250, (shared,), generator=generator)
        sequences = []
        for n in (2, 7, 30, 5):
            rest = torch.randint(0, 250, (n,), generator=generator)
            ids = torch.cat([prefix, rest])
            sequences.append(
                (ids, ids.masked_fill(torch.arange(len(ids)) < len(ids) - n // 2, -100))
            )
        # the likeliest token as its last one: a hit
        logits = model(input_ids=sequences[0][0][None]).logits[0]
        ids = sequences[0][0].clone()
        ids[-1] = logits[-2].argmax()
        sequences[0] = ids, ids.masked_fill(torch.arange(len(ids)) < len(ids) - 1, -100)
        found = score(model, sequences)
        assert [a.hit for a in found] == [True, False, False, False]
        for (ids, labels), answer in zip(sequences, found, strict=True):
            loss = model(input_ids=ids[None], labels=labels[None]).loss
            assert answer.tokens == int((labels != -100).sum())
            assert answer.loss == pytest.approx(loss.item() * answer.tokens, rel=1e-4)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_have_the_right_answers(task) -> None:
    shown, asked = tasks.make(task, 50)
    assert tasks.make(task, 50) == (shown, asked) and len(shown) == tasks.SHOTS
    assert len({q for q, _ in (*shown, *asked)}) == len(shown) + len(asked) > tasks.SHOTS + 30
    right = {
        "copying": lambda q: q.removeprefix("Repeat: "),
        "first word": lambda q: q.split()[2],
        "last word": lambda q: q.split()[-1],
        "sorting": lambda q: " ".join(sorted(q.split()[1:])),
        "counting": lambda q: str(len(q.split()) - 1),
        "adding": lambda q: str(int(q.split()[2]) + int(q.split()[4].strip("?"))),
        "next number": lambda q: str(int(q.split()[-1]) + 1),
        "yes or no": lambda q: "Yes" if q.split()[3] == q.split()[-1].strip("?") else "No",
        "format": lambda q: f"name={q.split()[0]}; age={q.split()[2]}",
        "capital": lambda q: tasks.CAPITALS[q.removeprefix("What is the capital of ").strip("?")],
        "opposite": lambda q: dict(tasks.OPPOSITES)[q.split()[-1].strip("?")],
    }[task]
    assert [a for _, a in asked] == [right(q) for q, _ in asked]


def test_an_answer_alone_is_asked(demo) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    for task, end in (("copying", "<|im_end|>"), ("capital", "\n")):
        _, asked = tasks.make(task, 3)
        for (question, answer), (ids, labels) in zip(
            asked, tasks.encode(task, 3, tokenizer), strict=True
        ):
            assert tokenizer.decode(labels[labels != -100]).strip(" ") == answer + end
            assert question in tokenizer.decode(ids[labels == -100])


def by_hand():
    """Two seeds of one variant that gains 2 nats and loses half of its answers."""

    def point(loss, hits, chrf=None):
        made = {"hits": {"t": hits}, "loss": {"en-fr": [loss, loss], "prose": [loss, loss]},
                "tokens": {"en-fr": [2, 2], "prose": [1, 1]}}  # fmt: skip
        return made | ({"chrf": {"en-fr": chrf}} if chrf else {})

    counts = [[10, 10, 8] * 8] * 2
    about = {"variant": "full", "rate": 1.0, "replay": False}
    points = [{"0.5": point(6.0, "1111"), "1": point(4.0, h, counts)} for h in ("1100", "1010")]
    return {
        "tasks": ["t"],
        "runs": {
            "base": point(8.0, "1111", [[10, 10, 4] * 8] * 2),
            "a": {**about, "points": points[0]},
            "b": {**about, "points": points[1]},
        },
    }


def test_changes_by_hand() -> None:
    found = figures.read(by_hand())
    key = ("full", 1.0, False)
    assert found.seeds == {key: 2} and found.directions == ["en-fr"] and found.most() == 2.0
    whole = found.changes(found.curves[key][1.0])
    assert whole["answers"]["change"] == pytest.approx(-50)
    assert whole["answers"]["low"] <= -50 <= whole["answers"]["high"]
    assert whole["translation"]["change"] == pytest.approx(2)
    assert whole["prose"]["change"] == pytest.approx(4) and whole["prose"]["verdict"] == "better"
    assert whole["chrf"]["change"] == pytest.approx(40)
    # half of the gain is where half of the change is; three quarters, between there and all
    middle = found.at_gain(key, 1.0)
    assert found.changes(middle)["answers"]["change"] == 0
    later = found.at_gain(key, 1.5)
    np.testing.assert_allclose(later.hits["t"], [1, 0.75, 0.75, 0.5])
    assert found.changes(later)["answers"]["change"] == pytest.approx(-25)
    assert found.at_gain(key, 2.1) is None
    each = [found.changes(p)["answers"]["change"] for p in found.single[key]]
    assert each == [-50, -50]


def test_docs_show_the_figures_of_the_results_file() -> None:
    result = json.loads(report.RESULTS.read_text())
    for document in report.DOCUMENTS:
        assert report.with_figures(document, result) == document.read_text(), document
    assert report.RESULTS.with_suffix(".png").is_file()


def test_the_report_of_what_there_is(smoke, tmp_path, monkeypatch) -> None:
    result, _, _, chosen = smoke
    text = report.table(result)
    assert f"{len(result['runs']) - 1} of 24 runs" in text
    assert "| full | 0.01 | - | 1 | " in text and "| top | 0.01 | 20 % | 1 | " in text
    assert "| copying | 0 % | +0 |" in text and "Layers: full: all, embedding, norm; " in text
    rows = report.summary(result).splitlines()[2:]  # the hotter rate without replay
    assert [row.split(" | ")[0] for row in rows] == ["| full"]
    picture = tmp_path / "x.png"
    report.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    bare = {**result, "runs": {"base": result["runs"]["base"]}}
    assert report.table(bare) == report.summary(bare) == "Not measured yet."
    file = tmp_path / "x.md"
    monkeypatch.setitem(report.DOCUMENTS, file, report.summary)
    file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter")
    filled = report.with_figures(file, result)
    assert filled.startswith("before") and filled.endswith("after") and "old" not in filled
    file.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.with_figures(file, result)


def test_without_the_demo_model_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    recipes = Path(experiment.__file__).parents[2] / "recipes/demo.yaml"
    (tmp_path / "recipes").mkdir()
    text = recipes.read_text().replace("build/demo/model", str(tmp_path / "nowhere"))
    (tmp_path / "recipes/demo.yaml").write_text(text)
    assert experiment.main(["--work", str(tmp_path / "w"), "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "make demo" in said and said.count("\n") == 1


def test_what_docs_conclude_is_what_the_table_says():
    """The paragraphs below the table are written by hand: they go with these seeds of each way."""
    text = (report.ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    whole, half, high, more = {}, {}, {}, {}
    for trained, rate, replay, seeds, _, _, right, _, at_half, at_more in (
        cells for cells in lines if len(cells) == 10 and cells[1].startswith("0.")
    ):
        assert seeds == ("3" if (rate, replay) == ("0.0005", "-") else "1")
        if rate != "0.0005":
            continue
        name = trained.removeprefix("| ") + (" replay" if "%" in replay else "")
        whole[name] = float(right.strip("*").split(" ")[0])
        half[name] = float(at_half.split(" ")[0])
        high[name] = float(at_half.rpartition(" ")[2].rstrip(")"))
        if not at_more.startswith("not reached"):
            more[name] = float(at_more.split(" ")[0])
    hot = [name for name in half if "replay" not in name]
    best, *others = sorted(hot, key=lambda n: -half[n])
    assert best == "two stages" and high[best] > 0
    assert all(-8.5 < half[n] < -3.5 and high[n] < 0 for n in others)
    assert set(others[-2:]) == {"full", "LoRA"}
    assert {n.split(" ")[0] for n in half if n not in more} == {"two", "bottom"}
    cheapest, second, third = sorted(more, key=lambda n: -more[n])[:3]
    assert {cheapest, second} == {"full", "full replay"} and more[third] < more[second] - 5
    assert -19.5 < more["full"] < more["full replay"] < -14.5
    seeds = dict(re.findall(r"- Seeds of (.+?) at 0.0005 apart: (.+)\.", text))
    apart = {n: [float(x) for x in found.split(", ")] for n, found in seeds.items()}
    spread = {n: round(max(found) - min(found), 1) for n, found in apart.items()}
    assert 13 < spread.pop("two stages") < 15
    assert 0.5 < min(spread.values()) and max(spread.values()) < 9
    # of replay
    assert whole["bottom replay"] > 0.6 * whole["bottom"]
    assert half["full replay"] > 0.6 * half["full"]
    for name in ("LoRA", "top", "joint"):
        assert half[name + " replay"] < half[name] + 1 and whole[name + " replay"] < whole[name] + 1
    assert whole["two stages replay"] < whole["two stages"] - 20
    assert half["two stages replay"] < half["two stages"] - 4
