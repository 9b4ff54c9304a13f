"""Evaluation while a stage trains: it is told, kept, and changes nothing."""

import json

import pytest
import torch

from tests.training.test_run import losses, workplace, xplus  # noqa: F401  (a fixture)
from xplus_fast.training import watch


def test_points_are_measured_told_and_change_nothing(workplace, capsys, monkeypatch):  # noqa: F811
    recipe, run = workplace / "recipe.yaml", workplace / "run"
    assert xplus("train", recipe) == 0
    plain = losses(run)
    watched = ("evaluation.every=2", "evaluation.few=3", f"output={workplace / 'watched'}")
    capsys.readouterr()
    assert xplus("train", recipe, *watched) == 0
    said, run = capsys.readouterr().out, workplace / "watched"
    assert losses(run) == plain
    files = sorted(p.name for p in (run / "evaluation").glob("during-*.json"))
    assert files == [f"during-{s}-{n}.json" for s in ("high", "low") for n in (2, 4, 6)]
    found = json.loads((run / "evaluation/during-low-2.json").read_text())
    assert set(found["loss"]) == {"en-sw", "sw-en"} and len(found["samples"]["en-sw"]) == 1
    assert f"step 2: en-sw loss {found['loss']['en-sw']:.3f}" in said
    assert f"sw-en chrF++ {found['chrf']['sw-en']:.1f}" in said
    report = (run / "report.md").read_text()
    assert "## While it trained" in report and "| low, 4 | " in report and "en-sw: " in report
    # a point that is there is not measured again
    monkeypatch.setattr(watch, "measure", lambda *a, **k: 1 / 0)
    import shutil

    shutil.rmtree(run / "high")
    assert xplus("train", recipe, *watched) == 0
    assert losses(run) == plain


def test_no_room_to_translate_in_stops_nothing(workplace, capsys, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(watch, "measure", full)
    assert xplus("train", workplace / "recipe.yaml", "evaluation.every=3") == 0
    said = capsys.readouterr().out
    assert said.count("no memory is left to translate in; going on without") == 4
    assert len(losses(workplace / "run")) == 12
    monkeypatch.setattr(watch, "measure", lambda *_, **__: [].pop())
    with pytest.raises(IndexError):
        xplus("train", workplace / "recipe.yaml", "evaluation.every=3", "--restart")


def test_without_points_the_report_says_nothing(tmp_path):
    assert watch.section(tmp_path, ["stage-1"]) == ""
