"""A stage that ends when it no longer improves, and with its best step; held-out data of one's own;
what may change between a run and its resumption."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.workplace import losses, make_workplace, train_killed, write_recipe, xplus


@pytest.fixture
def place(tmp_path, tiny_model_dir):
    """A recipe under which what is held out, other words, becomes worse after a few steps."""
    recipe = make_workplace(tmp_path, tiny_model_dir)
    lines = ['{"translation": {"en": "Good morning.", "sw": "Bonjour tout le monde."}}\n']
    (tmp_path / "other.jsonl").write_text("".join(lines))
    validation = [{"path": str(tmp_path / "other.jsonl")}]
    recipe["data"] |= {"retention": [], "heldout": 0, "validation": validation}
    recipe["stages"] = [{"layers": "top:2", "name": "only", "learning_rate": 3e-2, "steps": 14,
                         "warmup": 0.0}]  # fmt: skip
    recipe["training"]["save_steps"] = 4
    recipe["evaluation"] |= {"every": 1, "few": 4, "translate": 0}
    return tmp_path, recipe


def measured(run):
    found = {}
    for file in (run / "evaluation").glob("during-only-*.json"):
        tags = json.loads(file.read_text())["loss"]
        found[int(file.stem.rpartition("-")[2])] = sum(tags.values()) / len(tags)
    return dict(sorted(found.items()))


def final(run):
    return load_file(run / "only" / "final" / "trained.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_stops_and_ends_with_its_best_step(place, capsys):
    folder, recipe = place
    recipe["evaluation"] |= {"patience": 3, "keep": "best"}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    run, said = folder / "run", capsys.readouterr().out
    found = measured(run)
    best = min(found, key=found.get)
    last = losses(run)[-1][1]
    assert last == best + 3 < 14 and list(found) == list(range(1, last + 1))
    assert (
        f"stage only ends early: held-out loss was best at step {best}, 3 evaluations ago" in said
    )
    assert f"stage only ends with step {best}, the best that was measured" in said
    # what the same steps give without any of it, cut there
    recipe["output"] = str(folder / "plain")
    recipe["evaluation"] = {"every": 1, "few": 4, "translate": 0}
    recipe["training"] |= {"save_steps": 1, "save_total_limit": 20}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    whole = load_file(folder / "plain/only" / f"checkpoint-{best}" / "trained.safetensors")
    assert same(final(run), whole)
    assert not same(final(run), final(folder / "plain"))
    after = json.loads((run / "evaluation/after-only.json").read_text())["loss"]
    assert sum(after.values()) / len(after) == pytest.approx(found[best], rel=1e-5)


def test_patience_alone_ends_with_the_last_step(place):
    folder, recipe = place
    recipe["evaluation"] |= {"patience": 2}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    best = min(found := measured(folder / "run"), key=found.get)
    assert losses(folder / "run")[-1][1] == best + 2 < 14


@pytest.mark.parametrize("kill_at", [4])
def test_cut_off_anywhere_it_decides_the_same(place, kill_at, tmp_path_factory):
    folder, recipe = place
    recipe["evaluation"] |= {"patience": 3, "keep": "best"}
    path = write_recipe(folder, recipe)
    code = f"""
import os, signal
from xplus_fast.training import watch
whole = watch.write_json
def write(file, found):
    whole(file, found)
    if file.name == "during-only-{kill_at}.json" and not os.path.exists({str(folder / "killed")!r}):
        open({str(folder / "killed")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
watch.write_json = write
"""
    train_killed(path, code)
    assert xplus("train", path) == 0
    recipe["output"] = str(folder / "whole")
    assert xplus("train", write_recipe(folder, recipe)) == 0
    assert losses(folder / "run") == losses(folder / "whole")
    assert same(final(folder / "run"), final(folder / "whole"))
    assert measured(folder / "run") == measured(folder / "whole")


def test_by_retention(place):
    folder, recipe = place
    recipe["data"] |= {"validation": [], "retention": [{"path": str(folder / "english.txt")}]}
    recipe["evaluation"] |= {"keep": "best", "by": "retention"}
    recipe["stages"][0]["steps"] = 4
    assert xplus("train", write_recipe(folder, recipe)) == 0
    found = {}
    for file in (folder / "run/evaluation").glob("during-only-*.json"):
        retention = json.loads(file.read_text())["retention"]
        found[int(file.stem.rpartition("-")[2])] = retention["loss"]
    after = json.loads((folder / "run/evaluation/after-only.json").read_text())["retention"]
    assert after["loss"] == pytest.approx(min(found.values()), rel=1e-5) and len(found) == 4


def test_validation_data_of_ones_own_are_held_out(place, capsys):
    folder, recipe = place
    pairs = [("the cat number 3 sleeps", "paka namba 3 analala"), ("a dog", "mbwa")]
    lines = [json.dumps({"translation": {"en": e, "sw": s}}) + "\n" for e, s in pairs]
    (folder / "mine.jsonl").write_text("".join(lines))
    recipe["data"] |= {"heldout": 0, "validation": [{"path": str(folder / "mine.jsonl")}]}
    recipe["stages"][0]["steps"] = 2
    assert xplus("train", write_recipe(folder, recipe)) == 0
    said = capsys.readouterr().out
    assert "validation: en-sw 2, sw-en 2" in said
    assert "data: 118 sequences" in said  # of 120: one of the pairs is in both
    before = json.loads((folder / "run/evaluation/before.json").read_text())
    assert set(before["loss"]) == {"en-sw", "sw-en"}
    recipe["data"]["heldout"] = 3
    assert xplus("train", write_recipe(folder, recipe), "--restart") == 2
    assert "data.heldout and data.validation are both given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"patience": 2, "every": 0}}, "evaluation.patience: goes with"),
        ({"evaluation": {"keep": "best", "every": 0}}, "evaluation.keep: goes with"),
        ({"evaluation": {"by": "chrf"}}, "evaluation.by: decides nothing"),
        ({"evaluation": {"keep": "best", "by": "chrf"}}, "evaluation.translate is 0"),
        ({"evaluation": {"keep": "best", "by": "retention"}}, "data.retention is empty"),
        ({"evaluation": {"keep": "best"}, "data": {"validation": []}}, "nothing is held out"),
        ({"evaluation": {"patience": 0}}, "evaluation.patience"),
        ({"evaluation": {"keep": "first"}}, "evaluation.keep"),
        ({"data": {"validation": [{"path": "x", "share": 0.5}]}}, "data.validation.0.share"),
    ],
)  # fmt: skip
def test_what_would_decide_nothing_is_refused(place, capsys, changes, said):
    folder, recipe = place
    for key, value in changes.items():
        recipe[key] |= value
    assert xplus("train", write_recipe(folder, recipe), "--dry-run") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_what_does_not_change_training_may_change_between_runs(place, capsys):
    folder, recipe = place
    recipe["stages"][0]["steps"] = 2
    path = write_recipe(folder, recipe)
    assert xplus("train", path) == 0
    assert xplus("train", path, "evaluation.every=2", "evaluation.few=2") == 0
    assert "trained before" in capsys.readouterr().out
    assert xplus("train", path, "evaluation.translate=7") == 2  # before and after would differ
    assert "evaluation.translate: 0 there, 7 here" in capsys.readouterr().err
    assert xplus("train", path, "evaluation.keep=best") == 2


def test_by_chrf_of_what_is_no_translation_is_refused_before_the_model_is_loaded(place, capsys):
    folder, recipe = place
    (folder / "en-sw.txt").write_text("A text in a file of such a name.\n\nAnother paragraph.\n")
    recipe["data"]["validation"] = [{"path": str(folder / "en-sw.txt"), "format": "text"}]
    recipe["evaluation"] |= {"keep": "best", "by": "chrf", "translate": 2}
    assert xplus("train", write_recipe(folder, recipe)) == 2
    assert "chrf, and no translations are held out: en-sw" in capsys.readouterr().err
    recipe["evaluation"] |= {"keep": "last", "by": "loss"}
    recipe["stages"][0]["steps"] = 1
    assert xplus("train", write_recipe(folder, recipe)) == 0  # it is measured, and not translated
    before = json.loads((folder / "run/evaluation/before.json").read_text())
    assert list(before["loss"]) == ["en-sw"] and before["chrf"] == {}


def test_unfit_validation_data_are_left_out_or_stop_before_anything_is_loaded(place, capsys):
    folder, recipe = place
    long = {"translation": {"en": "word " * 900, "sw": "neno " * 900}}
    with (folder / "other.jsonl").open("a") as f:
        f.write(json.dumps(long) + "\n")
    path = write_recipe(folder, recipe)
    assert xplus("train", path, "--dry-run") == 2
    assert "longer than the token budget" in capsys.readouterr().err
    assert xplus("train", path, "--dry-run", "data.on_error=skip") == 0
    assert "validation: en-sw 1, sw-en 1" in capsys.readouterr().out


def test_the_report_has_the_figure_that_decided_in_the_stages_order(place):
    folder, recipe = place
    recipe["data"] |= {"validation": [], "retention": [{"path": str(folder / "english.txt")}]}
    recipe["evaluation"] |= {"keep": "best", "by": "retention", "every": 2}
    recipe["stages"] = [{**recipe["stages"][0], "name": name, "steps": 2} for name in ("z", "a")]
    assert xplus("train", write_recipe(folder, recipe)) == 0
    lines = (folder / "run/report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| z, 2 |", "| a, 2 |"))]
    assert [row[2] for row in rows] == ["z", "a"] and "| stage, step | retention loss |" in lines
    kept = json.loads((folder / "run/evaluation/during-a-2.json").read_text())["retention"]
    assert rows[1] == f"| a, 2 | {kept['loss']:.3f} |"
