"""A run's folder: whose it is at any moment, who works in it, and whose results are in it."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.training.test_run import losses, workplace, xplus  # noqa: F401  (a fixture)
from xplus_fast.config import load_recipe
from xplus_fast.errors import UserError
from xplus_fast.locks import working_in
from xplus_fast.planning.cards import CARDS
from xplus_fast.training.run_folder import (
    card_of,
    claim,
    hold,
    look_at,
    read_recipe,
    throw_away,
)

QUICK = ["stages.0.steps=1", "stages.1.steps=1", "evaluation.translate=0", "data.retention=[]"]


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    tree = {
        "model": str(tiny_model_dir),
        "output": str(tmp_path / "run"),
        "stages": [{"layers": "bottom:1", "name": "low"}, {"layers": "top:1"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return load_recipe(tmp_path / "recipe.yaml")


def start(recipe, restart=False):
    """What a run does with its folder before it trains."""
    run, corpora = Path(recipe.output), [SimpleNamespace(summary={"folder": "cache/key"})] * 2
    with hold(run):
        if restart:
            throw_away(run)
        else:
            look_at(run, recipe)
        claim(run, recipe, Path(recipe.model), corpora, [1, 1], [{}, {}], CARDS["rtx4090"])


def test_a_run_goes_on_with_the_memory_that_it_was_planned_for(recipe):
    run, card = Path(recipe.output), CARDS["rtx4090"]
    less = replace(card, memory=card.memory // 2)
    assert card_of(run, less) is less and card_of(run, None) is None  # nothing is begun
    start(recipe)
    assert card_of(run, less) == card
    assert card_of(run, CARDS["h200"]) is CARDS["h200"] and card_of(run, None) is None
    start(recipe)  # the mark is still that of this run
    (run / ".xplus-run").write_text("[")
    assert card_of(run, less) is less


def train_something(run):
    for name in ("low/final", "stage-2/checkpoint-1", "evaluation"):
        (run / name).mkdir(parents=True)
        (run / name / "manifest.json").write_text("{}")
    for name in ("metrics.jsonl", "mine.txt"):
        (run / name).write_text("")


def begun(recipe):
    run = Path(recipe.output)
    assert json.loads((run / ".xplus-run").read_text())["data"] == ["key", "key"]
    assert read_recipe(run).stages == recipe.stages
    return sorted(p.name for p in run.iterdir() if p.name not in (".xplus-run", "recipe.yaml"))


def test_killed_before_the_mark_was_there(recipe):
    run = Path(recipe.output)
    run.mkdir()
    for name in ("..xplus-run.tmp", ".lock", ".xplus-run"):
        (run / name).write_text("{")
        start(recipe)
        assert begun(recipe) == []
        for file in run.iterdir():
            file.unlink()


@pytest.mark.parametrize("restart", [False, True])
def test_killed_before_the_mark_said_of_what(recipe, restart):
    run = Path(recipe.output)
    run.mkdir()
    (run / ".xplus-run").write_text("{}")
    (run / "recipe.yaml").write_text("model: x")  # of whatever recipe it was, and cut off
    start(recipe, restart)
    assert begun(recipe) == []


@pytest.mark.parametrize("restart", [False, True])
def test_killed_in_a_restart(recipe, restart):
    """The mark says nothing, the rest is partly gone: it goes whatever the next command is."""
    run = Path(recipe.output)
    start(recipe)
    train_something(run)
    (run / ".xplus-run").write_text("{}")
    shutil.rmtree(run / "evaluation")
    other = load_recipe(run.parent / "recipe.yaml", ["stages.0.name=other", "seed=1"])
    start(other, restart)
    assert begun(other) == ["mine.txt"]


@pytest.mark.parametrize("what", ["mark", "recipe gone", "recipe damaged"])
def test_a_damaged_run_can_be_thrown_away(recipe, what):
    run = Path(recipe.output)
    start(recipe)
    train_something(run)
    if what == "mark":
        (run / ".xplus-run").write_text('{"model"')
    elif what == "recipe gone":
        (run / "recipe.yaml").unlink()
    else:
        (run / "recipe.yaml").write_text("model: [")
    with pytest.raises(UserError) as caught:
        start(recipe)
    assert "--restart" in str(caught.value) or "recipe.yaml: not valid" in str(caught.value)
    assert "\n" not in str(caught.value)
    start(recipe, restart=True)
    assert begun(recipe) == ["mine.txt"]


def test_a_folder_of_something_else(recipe):
    run = Path(recipe.output)
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UserError, match="is not empty and no run of ours"):
            start(recipe, restart)
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder(workplace, tiny_model_dir, capfd, monkeypatch):  # noqa: F811
    """And evaluate and prepare: one line for the second, nothing harmed; freed by a kill."""
    for code in ("en", "sw"):
        (workplace / f"x.{code}").write_text("one two\n")
    evaluate = {
        "output": str(workplace / "verdict"),
        "translation": {
            "sets": [{"name": "x", "files": "x.{lang}", "directions": ["en-sw"]}],
        },
    }
    prepare = {"output": str(workplace / "prepared"), "corpora": [{"path": "pairs.jsonl"}],
               "quality": {"method": "none"}}  # fmt: skip
    monkeypatch.chdir(workplace)
    for name, tree in (("evaluate", evaluate), ("prepare", prepare)):
        (workplace / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for folder, *command in (
        ("run", "train", "recipe.yaml"),
        ("run", "train", "recipe.yaml", "--restart"),
        ("verdict", "evaluate", workplace, "evaluate.yaml"),
        ("prepared", "prepare", "prepare.yaml"),
        ("seen", "sensitivity", tiny_model_dir, "pairs.jsonl", "--out", "seen"),
    ):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            with working_in(workplace / folder):
                os.write(write, b"x")
                time.sleep(60)
            os._exit(0)
        os.read(read, 1)
        assert xplus(*command) == 2
        said = capfd.readouterr().err.strip().split("\n")[-1]
        assert said == f"xplus-fast: {workplace / folder}: in use by another process of xplus-fast"
        assert [p.name for p in (workplace / folder).iterdir()] == [".lock"]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_full_disk_of_what_reports_elsewhere_is_one_line(workplace, capsys, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "__init__", full)
    assert (
        xplus("train", workplace / "recipe.yaml", *QUICK, "training.report_to=[tensorboard]") == 2
    )
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said == f"xplus-fast: {workplace}/run/low: cannot be written (No space left on device)"


def test_one_output_however_it_is_spelt(workplace, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    save = ["training.save_steps=1", "output=~/mine", *QUICK, "stages.0.steps=2"]
    assert xplus("train", "recipe.yaml", *save) == 0
    run = tmp_path / "mine"
    whole = losses(run)
    shutil.rmtree(run / "low" / "final")
    shutil.rmtree(run / "low" / "checkpoint-2")
    shutil.rmtree(run / "high" / "final")
    capsys.readouterr()
    monkeypatch.chdir("elsewhere")
    save[1] = "output=gone/../../mine"
    assert xplus("train", "../recipe.yaml", *save) == 0
    assert f"going on from {run}/low/checkpoint-1" in capsys.readouterr().out
    assert sorted(losses(run)) == sorted(whole) and not list((tmp_path / "elsewhere").iterdir())
    assert xplus("export", "../mine", "x/../out") == 0
    assert (tmp_path / "elsewhere/out/config.json").exists()
    # what is not empty is not, either
    for output in ("gone/../../elsewhere", "~/elsewhere", "../elsewhere/."):
        assert xplus("train", "../recipe.yaml", f"output={output}") == 2
        assert f"{tmp_path}/elsewhere: is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["top:2", "bottom:2"])
def test_the_final_of_another_stage_is_refused(workplace, layers, capsys):  # noqa: F811
    """Of other layers; and of the same ones, whose names and shapes all agree."""
    run, command = workplace / "run", ["train", workplace / "recipe.yaml", *QUICK]
    command.append(f"stages.1.layers={layers}")
    assert xplus(*command) == 0
    for a, b in (("low/final", "kept"), ("high/final", "low/final"), ("kept", "high/final")):
        os.rename(run / a, run / b)
    capsys.readouterr()
    assert xplus(*command) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"{run}/low/final: not what stage low trains" in said
    assert xplus("export", run, workplace / "out") == 2
    assert "not what stage low trains" in capsys.readouterr().err
    shutil.rmtree(run / "low/final")
    shutil.copytree(run / "high/final", run / "low/final")
    shutil.rmtree(run / "low/final")
    shutil.rmtree(run / "high/final")
    assert xplus(*command) == 0
    assert xplus("export", run, workplace / "out") == 0


def test_export_and_evaluate_again_and_anew(workplace, capsys):  # noqa: F811
    command = ["train", workplace / "recipe.yaml", *QUICK]
    command += ["stages.0.warmup=0", "stages.1.warmup=0"]  # whose first steps change nothing
    assert xplus(*command) == 0
    run, out = workplace / "run", workplace / "out"
    for _ in range(2):  # killed after its last step, it is only done
        assert xplus("export", run, out) == 0
    for code in ("en", "sw"):
        (workplace / f"x.{code}").write_text("one two\nthree\n")
    tree = {
        "output": str(workplace / "verdict"),
        "translation": {
            "sets": [{
                "name": "x", "files": str(workplace / "x.{lang}"), "directions": ["en-sw"],
            }],
            "max_new_tokens": 2, "metrics": ["chrf"],
        },
        "bootstrap": 5,
    }  # fmt: skip
    (workplace / "evaluate.yaml").write_text(yaml.safe_dump(tree))
    evaluate = ["evaluate", workplace / "run", workplace / "evaluate.yaml", "--json"]
    model = workplace / "verdict/model"
    assert xplus(*evaluate) == 0
    first, made = capsys.readouterr().out, (model / "config.json").stat().st_mtime_ns
    assert xplus(*evaluate) == 0
    assert capsys.readouterr().out[-200:] == first[-200:]
    assert (model / "config.json").stat().st_mtime_ns == made
    before = (model / "model.safetensors").read_bytes()
    # the same stages, other weights
    assert xplus(*command, "--restart", "stages.0.learning_rate=1e-2") == 0
    assert xplus(*evaluate) == 0
    assert (model / "model.safetensors").read_bytes() != before
    capsys.readouterr()
    assert xplus("export", run, out) == 2
    assert "exists already" in capsys.readouterr().err
    assert xplus("export", run, workplace / "again") == 0
    exported = (workplace / "again/model.safetensors").read_bytes()
    assert (model / "model.safetensors").read_bytes() == exported
