"""The experiment on a tiny model: every variant, going on, and the figures in the docs."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.recipe import experiment as rb
from benchmarks.recipe import report
from xplus_fast.planning.memory import layer_parameters

ROOT = Path(__file__).parents[2]
NAMES = [
    "two stages", "bottom only", "top only", "joint", "full", "LoRA", "as many at the bottom",
    "as many at the top",
]  # fmt: skip


def run(out, *arguments):
    return rb.main(["--smoke", "--steps", "4", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "new" / "recipe.json"
    assert run(out) == 0
    return json.loads(out.read_text()), out


def test_every_variant_trains_its_own_on_the_same_data(smoke) -> None:
    result, out = smoke
    assert list(result["variants"]) == NAMES
    found = {n: v for n, v in result["variants"].items() if v["status"] == "ok"}
    assert set(NAMES) - set(found) <= {"LoRA"}  # needs peft
    assert all(len(v["losses"]) == 4 for v in found.values())
    assert result["settings"]["rows"] == 2 and result["settings"]["tokens"] <= 2 * 128
    # before anything is learnt, the same row has the same loss in every variant
    first = {round(v["losses"][0], 4) for v in found.values()}
    assert len(first) == 1
    one = layer_parameters(shape_of_smoke())
    sizes = {n: v["trained_parameters"] for n, v in found.items() if n != "LoRA"}
    assert sizes == {
        "two stages": 3 * one, "bottom only": one, "top only": 2 * one, "joint": 3 * one,
        "full": 4 * one + (258 + 1) * 64, "as many at the bottom": 3 * one,
        "as many at the top": 3 * one,
    }  # fmt: skip
    base = result["base"]["loss"]["en-fr"]
    assert all(v["loss"]["en-fr"] < base - 0.05 for v in found.values())
    assert len({v["loss"]["en-fr"] for v in found.values()}) == len(found)
    for v in found.values():
        low, high = v["chrf_interval"]["en-fr"]
        assert low <= v["chrf"]["en-fr"] <= high and v["retention"]["loss"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "commit", "versions", "device"} <= set(result)


def shape_of_smoke():
    from types import SimpleNamespace

    from xplus_fast.model.families import shape_of

    return shape_of(
        SimpleNamespace(
            model_type="llama", hidden_act="silu", num_hidden_layers=4, hidden_size=64,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=258,
            rms_norm_eps=1e-6, tie_word_embeddings=True,
        )
    )  # fmt: skip


def test_the_second_stage_starts_from_the_first(tmp_path) -> None:
    recipe = rb.tiny_recipe(tmp_path)
    setup = rb._set_up(recipe, 4)
    model = rb._load(recipe)
    start = {n: p.clone() for n, p in rb._load(recipe).state_dict().items()}
    model, _, _ = rb._train(model, "layers", "bottom:1", setup, 2, 0)
    middle = {n: p.clone() for n, p in model.state_dict().items()}
    model, _, names = rb._train(model, "layers", "top:2", setup, 2, 1)
    assert {n.split(".")[2] for n in names} == {"2", "3"}
    for name, p in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else ""
        assert torch.equal(p, middle[name]) == (layer not in ("2", "3")), name
        assert torch.equal(middle[name], start[name]) == (layer != "0"), name


def test_a_stopped_run_goes_on(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "recipe.json"
    assert run(out, "--only", "joint") == 0
    first = json.loads(out.read_text())
    assert list(first["variants"]) == ["joint"]
    assert "| top only | not measured |" in capsys.readouterr().out

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rb, "_write", _counting(rb._write, 1, stop))
    with pytest.raises(KeyboardInterrupt):
        run(out, "--only", "bottom only,joint,top only")
    monkeypatch.undo()
    held = json.loads(out.read_text())["variants"]
    assert list(held) == ["bottom only", "joint"]  # in their order, what was whole
    assert held["joint"] == first["variants"]["joint"]
    assert run(out, "--only", "bottom only,joint") == 0
    assert json.loads(out.read_text())["variants"] == held


def _counting(write, times, otherwise):
    done = []

    def counted(*arguments):
        done.append(1)
        return write(*arguments) if len(done) <= times else otherwise()

    return counted


def test_without_peft_a_row_says_so_and_is_tried_again(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "recipe.json"
    find = rb.importlib.util.find_spec
    monkeypatch.setattr(
        rb.importlib.util, "find_spec", lambda n, *a: None if n == "peft" else find(n, *a)
    )
    assert run(out, "--only", "LoRA") == 0
    assert "| not importable: peft |" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("peft", reason="trains the LoRA variant")
    assert run(out, "--only", "LoRA") == 0
    assert json.loads(out.read_text())["variants"]["LoRA"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "an even number from 2 is wanted, found 3"),
        (["--only", "top only, middle"], "'middle' is not one of two stages, bottom only"),
        (["--steps", "2"], "holds figures of other settings; --restart throws them away"),
    ],
)
def test_bad_input_is_one_line(arguments, message, smoke, capsys) -> None:
    _, out = smoke
    before = out.read_text()
    assert run(out, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert out.read_text() == before


def test_without_the_demo_model_one_line(tmp_path, capsys) -> None:
    text = (ROOT / "recipes/demo.yaml").read_text().replace("build/demo/model", "nowhere")
    (tmp_path / "demo.yaml").write_text(text)
    assert rb.main(["--recipe", str(tmp_path / "demo.yaml"), "--out", str(tmp_path / "x")]) == 2
    assert "make demo" in capsys.readouterr().err


def test_gains_by_hand(smoke) -> None:
    def figures(a, b, chrf, kept):
        return {
            "status": "ok", "loss": {"x": a, "y": b}, "chrf": {"x": chrf, "y": chrf + 2},
            "retention": {"loss": kept},
        }  # fmt: skip

    result = {
        "base": figures(4.0, 6.0, 10.0, 2.0),
        "variants": {"a": figures(3.0, 5.0, 14.0, 2.1), "b": {"status": "not importable: peft"}},
    }
    gains = report.gains(result)
    assert list(gains) == ["a"]
    assert gains["a"] == pytest.approx((0.2, 4.0, 0.05))


def test_docs_show_the_figures_of_the_results_file() -> None:
    result = json.loads(report.RESULTS.read_text())
    assert list(result["variants"])[:6] == NAMES[:6]
    assert all(found["status"] == "ok" for found in result["variants"].values())
    for document in report.DOCUMENTS:
        assert report.with_figures(document, result) == document.read_text(), document
    assert report.RESULTS.with_suffix(".png").is_file()


def test_a_document_without_markers_is_refused(tmp_path, smoke, monkeypatch) -> None:
    result, _ = smoke
    file = tmp_path / "x.md"
    monkeypatch.setitem(report.DOCUMENTS, file, report.summary)
    file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter")
    filled = report.with_figures(file, result)
    assert filled.startswith("before") and filled.endswith("after") and "old" not in filled
    assert "| joint | -" in filled
    file.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.with_figures(file, result)
