"""The fit benchmark without a GPU: every path on tiny models; what the report makes of figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import fit, fit_report
from benchmarks.models import RandomWeights, make_config
from xplus_fast.model.families import shape_of
from xplus_fast.options import parse_bytes
from xplus_fast.planning.cards import CARDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")
    out = tmp_path_factory.mktemp("fit") / "new" / "fit.json"
    assert fit.main(["--smoke", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_smoke_carries_out_what_each_case_pins(smoke) -> None:
    layouts = {name: found["layout"] for name, found in smoke["cases"].items()}
    assert layouts.keys() == fit.SMOKE.keys()
    for name, wanted in (
        ("plain", ("4 x bf16 device", "2 x trained keep", "gradients device")),
        ("bf16-streamed", ("5 x bf16 host keep", "gradients host")),
        ("fp8-host-states", ("4 x fp8 device,", "2 x trained recompute", "32-bit states host")),
        ("nf4-streamed-offload", ("4 x nf4 host offload", "head fp8, embedding host", "8-bit")),
        ("mixed-formats-rounding", ("2 x nf4 host", "2 x fp8 host recompute_mlp", "8-bit")),
    ):
        assert all(part in layouts[name] for part in wanted), layouts[name]
    for found in smoke["cases"].values():
        assert len(found["losses"]) == len(found["seconds"]) == 3
        assert found["tokens_per_second"] > 0
        # the same weights and packs in every layout; formats and bf16 move the loss a little
        assert found["losses"][0] == pytest.approx(smoke["cases"]["plain"]["losses"][0], rel=0.005)
        assert set(found["losses"]) - {found["losses"][0]}  # another pack, another loss


def test_a_smoke_case_that_lacks_a_library_leaves_the_others(monkeypatch, capsys) -> None:
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    assert fit.main(["--smoke", "--only", "nf4-streamed-offload,plain"]) == 1
    said = capsys.readouterr()
    assert "nf4-streamed-offload: not run" in said.err and "pip install bitsandbytes" in said.err
    assert "nf4" not in said.out and "plain: loss" in said.out


def test_a_case_in_its_own_process() -> None:
    found = fit.spawn("plain", 3, "--smoke")
    assert found["status"] == "ok" and len(found["losses"]) == 3


def test_a_case_that_dies_says_why(monkeypatch) -> None:
    monkeypatch.setattr(fit.sys, "executable", "/bin/false")
    found = fit.judge(fit.spawn("plain", 3, "--smoke"))
    assert (found["status"], found["exit"]) == ("failed", 1)
    assert "ok" not in found
    assert fit_report.describe_case("x", found).startswith("x: failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("arguments", [["--quick"], ["--only", "8B-stage2-24GB"]])
def test_without_a_gpu_one_line_and_exit_2(arguments, capsys) -> None:
    assert fit.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "no CUDA GPU" in said.err


def test_an_unknown_case_is_named(capsys) -> None:
    assert fit.main(["--only", "8B-stage3-24GB"]) == 2
    said = capsys.readouterr().err
    assert "8B-stage3-24GB" in said and "8B-stage2-24GB" in said


def test_cases_are_those_of_the_bar_and_have_plans() -> None:
    assert set(fit.CASES) == {
        f"{case}-{budget}"
        for case, budget in (
            ("8B-stage1", "16GB"), ("8B-stage2", "16GB"), ("8B-stage1", "24GB"),
            ("8B-stage2", "24GB"), ("14B-stage1", "24GB"), ("14B-stage2", "24GB"),
            ("8B-stage1", "80GB"), ("8B-stage2", "80GB"), ("8B-stage1", "uncapped"),
            ("8B-stage2", "uncapped"),
        )
    }  # fmt: skip
    for case in fit.CASES.values():
        plan = fit.make_plan(case, CARDS["h100-80"], host=100 * 10**9)
        budget = parse_bytes(case.budget, "") if case.budget else CARDS["h100-80"].memory
        assert 0.8 * budget < plan.device_total <= budget
        assert fit.STEP % plan.micro_batch_tokens == 0


def test_streaming_is_compared_with_all_else_alike() -> None:
    resident, streamed = (fit._overlap_case(name, CARDS["h200"]) for name in fit.OVERLAPS)
    a, b = (fit.make_plan(case, CARDS["h200"], host=10**11) for case in (resident, streamed))
    assert {x.placement for x in a.layout.layers} == {"device"}
    assert [x.placement for x in b.layout.layers] == ["host"] * 21 + ["device"] * 15
    assert [x.activations for x in a.layout.layers] == [x.activations for x in b.layout.layers]
    assert a.update == b.update and a.micro_batch_tokens == b.micro_batch_tokens == 16384


def measured(allocated=15.0, process=15.9, budget=16.0, loss=11.9) -> dict:
    parts = {"trained layers": 15.0, "margin": 0.3, "CUDA context": 0.6}
    return fit.judge(
        {
            "status": "ok",
            "losses": [loss],
            "budget": budget,
            "plan": {"device_bytes": parts, "device_total": 15.9},
            "measured": {"allocated": allocated, "process": process, "reserved": allocated},
        }
    )


def test_a_plan_is_right_within_five_percent_and_within_its_budget() -> None:
    assert measured()["ok"] and measured()["off"] == {"allocated": 0.0, "process": 0.0}
    assert measured(allocated=15 / 1.049)["ok"] and not measured(allocated=15 / 1.051)["ok"]
    assert measured(allocated=15 / 0.951)["ok"] and not measured(allocated=15 / 0.949)["ok"]
    assert not measured(process=15.9 / 1.051)["ok"]
    assert not measured(process=16.1)["ok"] and measured(process=16.1, budget=17.0)["ok"]
    assert not measured(loss=float("nan"))["ok"]


@pytest.mark.parametrize(("extra", "ok"), [(0.09, True), (0.11, False)])
def test_overlap_is_the_share_that_streaming_adds(extra, ok) -> None:
    order = []

    def run(name: str, steps: int) -> dict:
        order.append(name.rpartition("-")[2])
        seconds = 2.0 * (1 + extra if name.endswith("streamed") else 1)
        return {
            "status": "ok", "seconds": [99.0, *[seconds] * (steps - 1)], "layout": name,
            "plan": {"host_bytes": {"frozen layers": 8e9}}, "copy_rate": 2e10,
        }  # fmt: skip

    found = fit.measure_overlap(3, 2, run)
    assert order == ["resident", "streamed", "streamed", "resident"]
    assert found["share"] == pytest.approx(extra) and found["ok"] is ok
    assert found["copy_seconds"] == pytest.approx(0.4)
    assert found["hidden"] == pytest.approx(1 - 2 * extra / 0.4)
    assert f"{extra:+.1%}" in fit_report.describe_overlap(found)
    died = fit.measure_overlap(3, 1, lambda *_: {"status": "failed", "error": "out of memory"})
    assert not died["ok"] and "out of memory" in fit_report.describe_overlap(died)


def test_packs_are_full_of_sentences_half_supervised() -> None:
    packs = fit.make_packs(4, 4096, 500)
    lengths = [n for pack in packs for n in pack["lengths"]]
    assert all(sum(p["lengths"]) == len(p["input_ids"]) == len(p["labels"]) == 4096 for p in packs)
    assert 80 < sum(lengths) / len(lengths) < 110
    assert 0.48 < sum(float((p["labels"] != -100).float().mean()) for p in packs) / 4 < 0.52
    assert not torch.equal(packs[0]["input_ids"], packs[1]["input_ids"])


def test_random_weights_have_a_checkpoints_shapes() -> None:
    shape = shape_of(make_config("tiny"))
    weights = RandomWeights(shape, torch.device("cpu"))
    names = tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    qkv = weights.read(names, torch.bfloat16)
    assert qkv.shape == shape.packed_shapes()["qkv"] and qkv.dtype == torch.bfloat16
    assert 0.018 < float(qkv.float().std()) < 0.022
    norm = weights.read(("model.norm.weight",), torch.float32, staged=True)
    assert torch.equal(norm, torch.ones(shape.hidden))


def test_docs_hold_the_table_of_the_results_file() -> None:
    file = ROOT / "benchmarks/results/fit.json"
    result = json.loads(file.read_text()) if file.exists() else None
    text = (ROOT / "docs/memory.md").read_text()
    assert fit_report.with_table(text, result) == text
    assert "not measured on a GPU" in fit_report.table(None)


def test_table_shows_plan_and_measurement() -> None:
    found = measured(allocated=15e9, process=15.9e9)
    found["plan"]["device_total"], found["off"] = 15.9e9, {"allocated": 0.01, "process": -0.02}
    found["tokens_per_second"] = 4321.0
    result = {
        "cases": {"a": found, "b": {"status": "failed", "error": "x"}},
        "device": {"name": "card"}, "versions": {"torch": "2"},
    }  # fmt: skip
    said = fit_report.table(result)
    assert "| a | 15.90 GB | 15.90 GB (-2.0%) | 15.15, 15.00 GB (+1.0%) | 4,321 |" in said
    assert "| b | failed |" in said
