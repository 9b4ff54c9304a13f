"""The benchmark of frozen formats on a tiny model, its arithmetic, and the figures in the docs."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.memory import frozen_formats as ff

ROOT = Path(__file__).parents[2]
pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("formats") / "new" / "formats.json"
    assert ff.main(["--smoke", "--steps", "22", "--out", str(out)]) == 0
    return json.loads(out.read_text()), out


def test_smoke_measures_every_stage_in_every_format(smoke) -> None:
    result, out = smoke
    assert list(result["stages"]) == ["bottom:1", "top:2"]
    for stage in result["stages"].values():
        formats = stage["formats"]
        assert list(formats) == ["bf16", "int8", "fp8", "nf4"]
        assert all(len(found["losses"]) == 22 for found in formats.values())
        assert len({tuple(found["losses"]) for found in formats.values()}) == 4
        assert formats["bf16"]["rounding"] == 0
        # 127 steps to the largest of 64 normal weights: 0.6 %
        assert 0.005 < formats["int8"]["rounding"] < 0.007
        # e4m3 keeps 3 bits: 2.6 % of a normal weight; NF4 in blocks of 64: about 9 %
        assert 0.02 < formats["fp8"]["rounding"] < 0.03
        assert 0.08 < formats["nf4"]["rounding"] < 0.10
        int8, fp8, nf4 = (formats[f]["gradients"] for f in ("int8", "fp8", "nf4"))
        assert int8["cosine"]["all"] > fp8["cosine"]["all"]
        assert 0.99 < fp8["cosine"]["all"] < 1
        assert nf4["error"]["all"] > fp8["error"]["all"] > 2 * int8["error"]["all"] > 0
        assert nf4["cosine"]["least"] <= nf4["cosine"]["median"] < 1
        assert max(formats[f]["curve"]["worst_window"] for f in ("fp8", "nf4")) < 0.05
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "commit", "versions", "device"} <= set(result)


def test_the_export_is_measured_unquantized(tmp_path) -> None:
    """Where nothing is learnt, every format exports the untrained model."""
    setup = ff._tiny(tmp_path)
    base = ff._heldout_loss(ff._load(setup, (), "bf16"), setup.heldout)
    found, _ = ff._train(setup, "top:2", "nf4", 2, 1e-12, 1e-13)
    assert found["heldout"] == pytest.approx(base, abs=1e-6)
    inside = ff._heldout_loss(ff._load(setup, (2, 3), "nf4"), setup.heldout)
    assert abs(inside - base) > 1e-4


def test_what_trains_reaches_the_export(tmp_path) -> None:
    setup = ff._tiny(tmp_path)
    base = ff._heldout_loss(ff._load(setup, (), "bf16"), setup.train)
    learnt = ff.Setup(setup.folder, setup.train, setup.train, setup.stages)
    found, _ = ff._train(learnt, "top:2", "fp8", 20, 1e-2, 1e-3)
    assert found["heldout"] < base - 0.1


def test_gradients_by_hand() -> None:
    true = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1.0])}
    mine = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 1.0])}
    found = ff.compare_gradients(mine, true)
    assert found["cosine"]["least"] == pytest.approx(math.sqrt(0.5))
    assert found["cosine"]["all"] == pytest.approx(26 / math.sqrt(27 * 26))
    assert found["error"]["all"] == pytest.approx(math.sqrt(1 / 26))
    assert (found["error"]["most"], found["error"]["median"]) == (1.0, 0.5)
    with pytest.raises(AssertionError):
        ff.compare_gradients({"a": mine["a"]}, true)


def test_curves_by_hand() -> None:
    true = [2.0] * 60
    mine = [2.0] * 40 + [2.2] * 20
    found = ff.compare_curves(mine, true)
    assert found["worst_step"] == pytest.approx(0.1) == found["worst_window"] == found["end"]
    windows = [0.0] * 21 + [0.1 * i / 20 for i in range(1, 21)]
    assert found["mean"] == pytest.approx(sum(windows) / 41) == found["mean_distance"]
    down = ff.compare_curves([1.8] * 20, [2.0] * 20)
    assert (down["mean"], down["worst_window"]) == pytest.approx((-0.1, 0.1))
    assert ff.moving_average([1.0, 2.0]) == [1.5]


def test_a_missed_bar_is_said(smoke) -> None:
    result = json.loads(json.dumps(smoke[0]))
    assert [line.count("kept") for line in ff.verdicts(result)] == [1, 1, 1, 1, 1]
    formats = result["stages"]["top:2"]["formats"]
    formats["fp8"]["curve"]["worst_window"] = 0.011
    formats["nf4"]["curve"]["worst_window"] = 0.049
    formats["fp8"]["gradients"]["cosine"]["all"] = 0.98
    said = ff.verdicts(result)
    assert ["missed" in line for line in said] == [False, True, False, False, True]


def test_without_the_demo_model_one_line(tmp_path, capsys) -> None:
    recipe = (ROOT / "recipes/demo.yaml").read_text().replace("build/demo/model", "nowhere")
    (tmp_path / "demo.yaml").write_text(recipe)
    assert ff.main(["--recipe", str(tmp_path / "demo.yaml"), "--out", str(tmp_path / "x")]) == 2
    assert "make demo" in capsys.readouterr().err


def test_docs_show_the_figures_of_the_results_file() -> None:
    result = json.loads((ROOT / "benchmarks/results/frozen_formats.json").read_text())
    assert result["steps"] == 200 and list(result["stages"]) == ["bottom:4", "top:8"]
    text = (ROOT / "docs/memory.md").read_text()
    assert ff.with_table(text, result) == text
    assert (ROOT / "benchmarks/results/frozen_formats.png").is_file()
    with pytest.raises(ValueError, match="markers"):
        ff.with_table("no markers", result)
