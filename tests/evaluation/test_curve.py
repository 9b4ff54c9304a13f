"""`evaluate --scales` and `compare`: the curve of a run, in one loaded model."""

import json

import pytest
import torch
import yaml

from tests.evaluation.conftest import write_task
from tests.training.workplace import make_workplace, write_recipe, xplus
from xplus_fast.evaluation import front, in_place
from xplus_fast.evaluation.front import Point

LOAD = in_place.load
SENTENCES = {
    "en": [f"the cat number {i} sleeps" for i in range(50, 58)],
    "sw": [f"paka namba {i} analala" for i in range(50, 58)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    """Two runs that moved their model far, a test set, a task, and a recipe that asks both."""
    pytest.importorskip("lm_eval", reason="runs a task: pip install 'xplus-fast[reasoning]'")
    folder = tmp_path_factory.mktemp("curve")
    recipe = make_workplace(folder, tiny_model_dir)
    recipe["data"] |= {"heldout": 0, "retention": []}
    for stage in recipe["stages"]:
        stage |= {"steps": 8, "learning_rate": 1e-2}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    recipe |= {"output": str(folder / "other"), "stages": recipe["stages"][1:]}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    for code, lines in SENTENCES.items():
        (folder / f"{code}.devtest").write_text("\n".join(lines) + "\n")
    rows = [{"q": f"cat {a}", "c": [f" {a + i}" for i in range(3)], "a": 0} for a in range(12)]
    write_task(folder / "tasks", rows)
    return folder


def asked(place, out, tasks=True, limit=None):
    tree = {
        "output": str(out),
        "translation": {
            "sets": [{"name": "mine", "files": str(place / "{lang}.devtest"),
                      "directions": ["en-sw", "sw-en"], "limit": limit}],
            "metrics": ["chrf"], "max_new_tokens": 8,
        },
        "reasoning": {"tasks": ["sums"], "include_path": str(place / "tasks")} if tasks else {},
        "bootstrap": 40,
        "engine": "generate",
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_curve_is_the_exported_folders_evaluations_answer_for_answer(
    place, tmp_path, capsys, monkeypatch, tiny_model_dir
):
    out = tmp_path / "curve"
    made = []
    monkeypatch.setattr(in_place, "load", lambda *a: made.append(a) or LOAD(*a))
    before = files(place / "run")
    command = ("evaluate", place / "run", asked(place, out), "--scales", "0,0.5", "--json")
    assert xplus(*command) == 0
    curve = json.loads(capsys.readouterr().out)
    assert len(made) == 1  # loaded once
    assert not list(out.rglob("*.safetensors"))  # and no model written
    assert files(place / "run") - before <= {"evaluation/curve.json"}
    assert list(curve["points"]) == ["0", "0.5"]
    assert curve["points"]["0"]["translation"] == {
        "change": 0, "low": 0, "high": 0, "verdict": "same",
    }  # fmt: skip
    assert curve["points"]["0.5"]["translation"]["change"] != 0

    folder = tmp_path / "model"
    assert xplus("export", place / "run", folder, "--scale", "0.5") == 0
    capsys.readouterr()
    alone = tmp_path / "alone"
    command = ("evaluate", folder, asked(place, alone), "--base", tiny_model_dir, "--json")
    assert xplus(*command) == 0
    theirs = json.loads(capsys.readouterr().out)
    ours = json.loads((out / "points" / "0.5" / "verdict.json").read_text())
    assert ours["rows"] == theirs["rows"] and ours["means"] == theirs["means"]
    assert ours["means"] == curve["points"]["0.5"]
    for direction in ("en-sw", "sw-en"):
        name = f"tuned.mine.{direction}.txt"
        assert (out / "points" / "0.5" / name).read_text() == (alone / name).read_text()
    # each finds what the other answered: their digests are one
    assert {f.name for f in (alone / "generations").iterdir()} <= {
        f.name for f in (out / "generations").iterdir()
    }
    assert {f.name for f in (alone / "reasoning").glob("sums-*")} <= {
        f.name for f in (out / "reasoning").glob("sums-*")
    }
    for name in ("curve.md", "curve.csv", "curve.png"):
        assert (out / name).stat().st_size > 100
    monkeypatch.setattr(in_place, "load", lambda *a: pytest.fail("a model was loaded again"))
    assert xplus("evaluate", place / "run", asked(place, out), "--scales", "0,0.5") == 0
    assert "translation +0.00 (+0.00 to +0.00) same" in capsys.readouterr().out


def test_a_grid_by_stage_leaves_the_others_layers_alone(place, tmp_path):
    changes = in_place.Changes(place / "run")
    recipe = in_place.EvaluateRecipe(str(tmp_path))
    here = in_place.InPlace(changes, recipe)
    whole = here.subject(changes.at("1")).load()
    after = {n: p.clone() for n, p in whole.named_parameters()}
    model = here.subject(changes.at("low=0,high=1")).load()
    base = here.subject(changes.at("0"))
    mixed = {n: p.clone() for n, p in model.named_parameters()}
    stock = {n: p.clone() for n, p in base.load().named_parameters()}
    assert here.loaded == 1
    for name, value in mixed.items():
        top = name.startswith(("model.layers.4.", "model.layers.5."))
        assert torch.equal(value, after[name] if top else stock[name]), name
    fresh = LOAD(changes.base, "auto", "cpu")
    assert all(torch.equal(p, stock[n]) for n, p in fresh.named_parameters())


def test_conditions_and_comparison(place, tmp_path, capsys):
    out, other = tmp_path / "a", tmp_path / "b"
    command = ["evaluate", place / "run", asked(place, out, tasks=False), "--scales", "0,1"]
    assert xplus(*command, "--fail-if", "translation@1 < -1000") == 0
    assert xplus(*command, "--fail-if", "translation@0 > -1") == 1
    assert xplus(*command, "--fail-if", "translation@0.3 > -1") == 2
    assert "'0.3' is none of the scales 0, 1" in capsys.readouterr().err
    assert xplus("compare", place / "run", place / "other", "--out", tmp_path / "c") == 2
    assert "no curve is here" in capsys.readouterr().err
    assert (
        xplus("evaluate", place / "other", asked(place, other, tasks=False), "--scales", "0.5,1")
        == 0
    )
    capsys.readouterr()
    assert xplus("compare", place / "run", place / "other", "--out", tmp_path / "c", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["run"], r["point"]) for r in found["points"]] == [
        ("run", "0"), ("run", "1"), ("other", "0.5"), ("other", "1"),
    ]  # fmt: skip
    assert found["runs"]["run"]["layers"] == "low: bottom:2; high: top:2"
    assert found["runs"]["other"]["layers"] == "top:2"
    text = (tmp_path / "c/comparison.md").read_text()
    assert "| other | top:2 | 0.01 | pairs.jsonl | 0.5 |" in text
    assert (tmp_path / "c/comparison.png").stat().st_size > 1000
    # by the evaluations' own folders, the same
    assert xplus("compare", out, other, "--out", tmp_path / "d") == 0
    assert "a    0      +0.00" in capsys.readouterr().out
    assert (
        xplus(
            "evaluate", place / "other", asked(place, other, tasks=False, limit=3), "--scales", "1"
        )
        == 0
    )
    assert xplus("compare", place / "run", place / "other", "--out", tmp_path / "c") == 2
    assert "were not asked the same" in capsys.readouterr().err
    assert xplus("compare", place / "run", place / "run", "--out", tmp_path / "c") == 2
    # the base is told once, whichever of them has it
    assert xplus("evaluate", place / "other", asked(place, other, tasks=False), "--scales",
                 "0.0,1") == 0  # fmt: skip
    assert xplus("evaluate", place / "run", asked(place, out, tasks=False), "--scales", "1") == 0
    capsys.readouterr()
    assert xplus("compare", place / "run", place / "other", "--out", tmp_path / "c", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["run"], r["point"]) for r in found["points"]] == [
        ("run", "1"), ("other", "0.0"), ("other", "1"),
    ]  # fmt: skip
    (out / "curve.json").write_text("{}")
    assert xplus("compare", out, other, "--out", tmp_path / "c") == 2
    assert "curve.json: not a curve: no run" in capsys.readouterr().err


def test_a_point_that_answers_nothing_is_a_result(place, tmp_path, capsys, monkeypatch):
    whole = in_place.InPlace._at

    def silenced(self, at):
        model = whole(self, at)
        if len(at):  # any but the base
            model.lm_head.weight.data.zero_()
            model.lm_head.weight.data[model.config.eos_token_id] = 1e-6
            model.model.norm.weight.data.fill_(1.0)
        return model

    monkeypatch.setattr(in_place.InPlace, "_at", silenced)
    out = tmp_path / "o"
    recipe = asked(place, out, tasks=False)
    assert xplus("evaluate", place / "run", recipe, "--scales", "0,1", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["points"]) == ["0", "1"]


def test_a_condition_without_a_scale_needs_a_point_to_choose(place, tmp_path, capsys):
    recipe = asked(place, tmp_path / "o", tasks=False)
    command = ("evaluate", place / "run", recipe, "--scales", "0,1")
    assert xplus(*command, "--fail-if", "translation < 100") == 2
    assert "about one point: 'translation@1 ...'" in capsys.readouterr().err
    assert not (tmp_path / "o" / "generations").exists()


def test_what_is_installed_does_not_change_who_answers(place, tmp_path, monkeypatch):
    """With vLLM there and engine: auto, answers and results are kept as what they are."""
    import importlib.util

    from xplus_fast.evaluation import curve

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: name == "vllm" or found(name, *a))  # fmt: skip
    engines = []
    monkeypatch.setattr(curve, "check", lambda *a: [])
    monkeypatch.setattr(curve, "measure", lambda *a, **k: engines.append(a[3].engine) or STOP())
    recipe = in_place.EvaluateRecipe(str(tmp_path / "o"))
    with pytest.raises(StopIteration):
        curve.curve(place / "run", None, recipe, ["1"])
    assert engines == ["generate"]


def STOP():
    raise StopIteration


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scales", "0,1.6"], "a scale from 0 to 1.5"),
        (["--scales", "mid=0,1"], "'mid' is no stage of"),
        (["--scales", "2=0,1"], "layer 2 of '2' was not trained"),
        (["--scales", "1", "engine=vllm"], "engine=generate"),
        (["--scales", "1", "reasoning.python=python3"], "reasoning.python names another Python"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    place, tmp_path, capsys, monkeypatch, arguments, said
):
    monkeypatch.setattr(in_place, "load", lambda *a: pytest.fail("a model was loaded"))
    assert xplus("evaluate", place / "run", asked(place, tmp_path / "o"), *arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_run_of_another_base_and_a_folder_that_is_no_run_are_refused(place, tmp_path, capsys):
    from tests.assets import save_small_tokenizer, save_tiny_model

    save_small_tokenizer(tmp_path / "tokenizer")
    save_tiny_model(tmp_path / "another", tmp_path / "tokenizer")
    config = json.loads((tmp_path / "another/config.json").read_text())
    (tmp_path / "another/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    recipe = asked(place, tmp_path / "o")
    base = ("--base", tmp_path / "another")
    assert xplus("evaluate", place / "run", recipe, *base, "--scales", "1") == 2
    assert "is not what" in capsys.readouterr().err
    assert xplus("evaluate", tmp_path / "another", recipe, "--scales", "1") == 2
    assert "no run is here" in capsys.readouterr().err


def point(label, translation, reasoning, verdict):
    means = {"translation": {"change": translation, "low": None, "high": None, "verdict": ""}}
    means["reasoning"] = {"change": reasoning, "low": reasoning - 1, "high": reasoning + 1,
                          "verdict": verdict}  # fmt: skip
    return Point(label, "run", means)


def test_the_front_the_choice_and_what_more_costs():
    points = [
        point("0", 0.0, 0.0, "same"),
        point("0.25", 2.0, 0.5, "same"),
        point("0.5", 3.0, -0.5, "same"),
        point("0.6", 2.9, -0.8, "same"),
        point("0.75", 5.0, -3.5, "worse"),
        point("1", 4.0, -6.0, "worse"),
    ]
    assert [p.label for p in front.front(points)] == ["0.75", "0.5", "0.25"]
    best = front.chosen(points)
    assert best is not None and best.label == "0.5"
    first, second = front.in_words(points)
    assert first.startswith("0.5: translation +3.00, reasoning -0.50 (-1.50 to +0.50)")
    assert second.startswith("one more chrF++ costs 1.50 points of reasoning (on the way to 0.75")
    assert front.in_words(points[:3])[1] == "no point that was measured has more"
    assert front.chosen([points[0], points[4]]) is None
    assert "without losing" in front.in_words([points[0], points[4]])[0]


def test_a_picture_and_a_table_of_two_runs(tmp_path):
    points = [point("0", 0.0, 0.0, "same"), point("1", 3.0, -2.0, "worse")]
    points.append(Point("0.5", "other", point("", 2.0, 0.1, "same").means))
    about = {"run": {"layers": "top:2"}, "other": {"layers": "all"}}
    assert front.table(points, about).splitlines() == [
        "| run | layers | point | translation | reasoning | front |",
        "|---|---|---|---|---|---|",
        "| run | top:2 | 0 | +0.00 | +0.00 (-1.00 to +1.00) same |  |",
        "| run | top:2 | 1 | +3.00 | -2.00 (-3.00 to -1.00) worse | yes |",
        "| other | all | 0.5 | +2.00 | +0.10 (-0.90 to +1.10) same | yes |",
    ]
    front.draw(points, tmp_path / "two.png")
    front.draw([Point(p.label, p.run, {"translation": p.means["translation"]}) for p in points],
               tmp_path / "one.png")  # fmt: skip
    assert (tmp_path / "two.png").stat().st_size != (tmp_path / "one.png").stat().st_size
