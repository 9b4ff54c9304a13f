"""`benchmarks.preparation.measure` on a small corpus, and the figures in the docs."""

import json
from pathlib import Path

import pytest

from benchmarks.preparation import measure as prepare

ROOT = Path(__file__).parents[2]
pytest.importorskip("py3langid", reason="identifies languages")


def test_smoke(tmp_path, capsys) -> None:
    pytest.importorskip("django", reason="its catalogs are the corpus")
    out = tmp_path / "prepare.json"
    assert prepare.main(["--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [r["overrides"] for r in result["runs"]][:2] == [["workers=1"], ["workers=2"]]
    assert all(r["seconds"] > 0 and r["bytes"] > 5e7 for r in result["runs"])
    assert all(0 < r["user_seconds"] <= r["cpu_seconds"] for r in result["runs"])
    assert all(5e7 < r["worker_bytes"] <= r["bytes"] for r in result["runs"])
    assert 150 < result["characters"] < 350
    assert len({r["digest"] for r in result["runs"]}) == 1  # the same rows, however made
    assert result["all_rows"]["rows"] == 20_000 and result["all_rows"]["bytes"] > 5e7
    shown = capsys.readouterr().out
    assert "pairs a second, one worker" in shown and "missed" in shown  # few pairs show start-up


def test_the_docs_show_the_results_file() -> None:
    result = json.loads((ROOT / "benchmarks/results/prepare.json").read_text())
    text = (ROOT / "docs/preparation.md").read_text()
    assert prepare.fill(text, prepare.BEGIN, prepare.table(result), prepare.END) == text
