"""The kernels' benchmark on a CPU: every op through gate, JSON, table, pictures and README."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.kernels import measure as kernels
from benchmarks.kernels import report as kernel_report
from benchmarks.kernels.case import SIZES, TINY, Maker, Provider, error, sampled_rows
from benchmarks.kernels.ops import OPS, plan
from xplus_fast import cli

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("bench") / "new" / "kernels.json"
    code = kernels.main(["--smoke", "--out", str(out)])
    return SimpleNamespace(code=code, out=out, result=json.loads(out.read_text()))


def test_smoke_runs_every_op_in_every_way(smoke) -> None:
    assert smoke.code == 0
    assert smoke.result["finished"] and smoke.result["seconds"] < 60
    rows = smoke.result["rows"]
    assert {(r["op"], r["way"]) for r in rows} == {(n, w) for n, op in OPS.items() for w in op.ways}
    for r in rows:
        allowed = ("ok", "needs CUDA") if r["provider"] != "F.linear_cross_entropy" else None
        assert allowed is None or r["status"] in allowed or "not importable" in r["status"], r
        if r["status"] == "ok":
            assert 0 < r["ms_p20"] <= r["ms"] <= r["ms_p80"] and r["calls"] >= 5
            assert r.get("gbps", r.get("tflops")) > 0
            assert r["provider"] == "bare GEMMs" or r["error"] <= r["bound"]
    for r in rows:  # of each op here and now: ours, and somebody to compare with
        if r["provider"] == "ours":
            assert r["status"] == "ok", r
    assert {"command", "commit", "versions", "device", "limits"} <= set(smoke.result)
    assert smoke.result["limits"]["copy_bytes"] > 0


def test_pictures_and_table_come_with_it(smoke) -> None:
    text = kernel_report.table(smoke.result)
    assert len(text.splitlines()) == len(smoke.result["rows"]) + 3
    assert "needs CUDA" in text and "copy " in text.splitlines()[-1]
    for kind in ("share", "speedup_tiny"):
        picture = smoke.out.with_name(f"kernels_{kind}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_runs_without_matplotlib(smoke, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    said = kernel_report.draw(smoke.result, smoke.out.with_name("none"))
    assert said == ["no pictures: matplotlib is not installed"]


# --- the gate


def _spoiled(case, change):
    """The case with another provider: eager's outputs, the last of which `change` spoils."""
    eager = case.providers["eager"]

    def bind(inputs):
        call = eager.bind(inputs)

        def run():
            *others, last = call()
            last = last.clone()
            change(last)
            return (*others, last)

        return run

    return dataclasses.replace(
        case, providers={**case.providers, "spoiled": Provider(bind, mutates=eager.mutates)}
    )


SPOILS = {
    "a little off": lambda y: y.mul_(1.02),
    "one element": lambda y: y[-1, -1].sub_(1.0),
    "NaN": lambda y: y[0, 0].fill_(torch.nan),
    "last row not stored": lambda y: y[-1].zero_(),
    "sign": lambda y: y.neg_(),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("op", "way"), [("rms_norm", "forward"), ("swiglu", "full")])
def test_a_wrong_provider_gets_no_time(op, way, spoil, tmp_path, monkeypatch, capsys) -> None:
    build = OPS[op].build
    wrong = dataclasses.replace(
        OPS[op], build=lambda *a: _spoiled(build(*a), SPOILS[spoil]), ways=(way,)
    )
    monkeypatch.setitem(OPS, op, wrong)
    out = tmp_path / "k.json"
    assert kernels.main(["--smoke", "--ops", op, "--out", str(out)]) == 1
    rows = {r["provider"]: r for r in json.loads(out.read_text())["rows"] if r["op"] == op}
    assert rows["spoiled"]["status"].startswith("wrong: ") and "ms" not in rows["spoiled"]
    assert rows["ours"]["status"] == rows["eager"]["status"] == "ok"
    assert f"{op} {way} tiny T=96 spoiled: wrong" in capsys.readouterr().err


def test_an_update_that_does_nothing_is_wrong() -> None:
    for op in ("adamw_update 32-bit", "adamw_update 8-bit"):
        case = OPS[op].build(TINY, 1, "full")
        inputs, rows = case.make(Maker(0, CPU)), sampled_rows(case, CPU)
        names = ("param", "exp_avg", "exp_avg_sq")
        more = ("master",) if "32" in op else ("exp_avg_absmax", "exp_avg_sq_absmax")
        idle = [inputs[name] for name in names + more]
        truth = case.truth(inputs, rows)
        assert error(case.view(idle, rows), truth, case.bound)[1]


def test_a_failure_of_ours_is_a_row_and_exit_code_1(tmp_path, monkeypatch) -> None:
    def failing(size, T, way):
        def bind(inputs):
            raise RuntimeError("no such kernel\nsecond line")

        case = OPS_RMS(size, T, way)
        return dataclasses.replace(case, providers={**case.providers, "ours": Provider(bind)})

    OPS_RMS = OPS["rms_norm"].build
    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(OPS["rms_norm"], build=failing))
    out = tmp_path / "k.json"
    assert kernels.main(["--smoke", "--ops", "rms_norm", "--out", str(out)]) == 1
    rows = [r for r in json.loads(out.read_text())["rows"] if r["op"] == "rms_norm"]
    assert {r["status"] for r in rows if r["provider"] == "ours"} == {
        "failed: RuntimeError: no such kernel"
    }
    assert all(r["status"] == "ok" for r in rows if r["provider"] == "eager")


def test_a_missing_module_is_a_row(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xplus_kernels.fp8", None)
    case = OPS["quantize_fp8"].build(TINY, 8, "forward")
    rows = kernels.run_case(case, CPU, 0.01, {"copy_bytes": 1e9}, False)
    status = {r["provider"]: r["status"] for r in rows}
    assert status["ours"].startswith("not importable: ") and status["eager"] == "ok"


def test_error_says_what_is_wrong() -> None:
    x = torch.randn(4, 8)
    assert error([x], [x.clone()], 0.01) == (0, "")
    assert error([x], [x, x], 0.01)[1] == "1 outputs, not 2"
    assert "shape" in error([x[:2]], [x], 0.01)[1]
    nan = x.clone()
    nan[0, 0] = math.nan
    assert error([nan], [x], 0.01)[1] and error([nan], [x], 0.01)[0] == math.inf
    far = torch.zeros(100, 1000)
    far[0, 0] = 1  # small in the norm
    assert error([far + 1], [torch.ones(100, 1000)], 0.01)[1].endswith("elements off, bound 0.01")


# --- what a case is


def test_names_sizes_and_work() -> None:
    assert [(s.name, s.H, s.N, s.K, s.F) for s in SIZES] == [
        ("8B", 4096, 32, 8, 12_288), ("14B", 5120, 40, 8, 17_408),
    ]  # fmt: skip
    T, size = 8192, SIZES[0]
    norm = OPS["rms_norm"].build(size, T, "backward")
    assert norm.bytes == 6 * T * 4096 and norm.limit == "copy_bytes"
    head = OPS["linear_cross_entropy"].build(size, T, "full")
    assert head.flops == 2 * 2 * T * 4096 * 151_936 and head.limit == "bare GEMMs"
    rope = OPS["qk_norm_rope"].build(size, T, "backward")
    assert rope.bytes == T * 128 * (6 * 40 + 4 * 8)
    full = OPS["varlen_attention full"].build(size, T, "forward")
    assert full.flops == 4 * 32 * 128 * 2 * (4096 * 4097 // 2)
    block = OPS["frozen_linear fp8"].build(size, T, "forward")
    weights = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12_288
    assert block.flops == 2 * T * weights and block.limit == "fp8_flops"


def test_plan_puts_the_first_tokens_first_and_weights_once() -> None:
    cases = plan(OPS, SIZES, (8192, 1024))
    assert [T for *_, T in cases] == sorted((T for *_, T in cases), reverse=True)
    assert [c for c in cases if c[0] == "transpose_fp8"] == [
        ("transpose_fp8", "forward", size, 8192) for size in SIZES
    ]


def test_autograd_ways_agree() -> None:
    """Backward apart, on a kept graph and twice, is the full one's gradient."""
    for op in ("rms_norm", "swiglu", "varlen_attention full"):
        cases = {way: OPS[op].build(TINY, 40, way) for way in ("forward", "backward", "full")}
        inputs = cases["full"].make(Maker(3, CPU))
        for name in ("eager", "ours"):
            calls = {w: c.providers[name].bind(inputs) for w, c in cases.items()}
            parts = [*calls["forward"](), *calls["backward"]()]
            again = [*calls["forward"](), *calls["backward"]()]
            for a, b, c in zip(parts, again, calls["full"](), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
                torch.testing.assert_close(a, c, rtol=0, atol=0)


def test_sets_pass_the_l2_twice_between_uses(monkeypatch) -> None:
    card = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for size in (2**23, 2**25, 2**27, 2**31):
        count = timing.set_count(size, torch.device("cuda", 0))
        assert count >= 2 and (count - 1) * size >= 100 * 2**20


def test_rounds_take_the_sets_in_turn(monkeypatch) -> None:
    """With stand-ins for CUDA's events: whoever calls, all other sets lie between two uses."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(used)

        def elapsed_time(self, end) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    used: list[tuple[str, int]] = []
    for names in ("ab", "abc", "a"):
        used.clear()
        calls = {n: [lambda n=n, i=i: used.append((n, i)) for i in range(4)] for n in names}
        taken = timing._gpu_rounds(calls, 0.05, CPU)
        assert {n: len(t) for n, t in taken.items()} == dict.fromkeys(names, len(taken["a"]))
        assert all(t == 1e-3 for times in taken.values() for t in times)  # one call an event pair
        timed = used[5 * len(names) :]  # after every set once, and once more for the estimate
        assert [i for _, i in timed] == [j % 4 for j in range(len(timed))]
        first = [timed[r * len(names)][0] for r in range(len(names))]
        assert "".join(first) == names  # each round begins with another


# --- README


def _measured(smoke) -> dict:
    rows = []
    for size, ms in (("8B", 0.5), ("14B", 1.0)):
        for provider, times in (("ours", 1.0), ("eager", 4.0), ("Liger", 2.5)):
            rows.append(
                {
                    "op": "rms_norm", "way": "forward", "size": size, "tokens": 8192,
                    "provider": provider, "status": "ok", "ms": ms * times, "share": 0.9 / times,
                    "limit": "copy_bytes", "peak_bytes": 1, "ms_p20": 1, "ms_p80": 1,
                }
            )  # fmt: skip
    rows.append({**rows[0], "tokens": 1024, "ms": 99.0})
    return {**smoke.result, "rows": rows}


def test_readme_section_holds_the_figures(smoke) -> None:
    text = kernel_report.readme_section(_measured(smoke))
    line = next(line for line in text.splitlines() if "`rms_norm`" in line)
    cells = "`rms_norm` | forward | 0.500, 90% | 1.000, 90% | device copy"
    assert line == f"| {cells} | 4.00 / 4.00 | 2.50 / 2.50 |"
    assert "T = 8192" in text and "99" not in text


def test_readme_is_filled_between_its_markers(smoke, tmp_path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "kernels.json"
    readme.write_text(f"before\n{kernel_report.BEGIN}\nold\n{kernel_report.END}\nafter\n")
    arguments = [str(results), "--readme", str(readme)]
    assert kernel_report.main(arguments) == 0
    assert kernel_report.NOT_MEASURED in readme.read_text() and "old" not in readme.read_text()
    results.write_text(json.dumps(_measured(smoke)))
    for _ in range(2):  # filling twice is filling once
        assert kernel_report.main(arguments) == 0
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n")
        assert text.count("`rms_norm`") == 1 and kernel_report.NOT_MEASURED not in text
    readme.write_text("no markers")
    assert kernel_report.main(arguments) == 2 and readme.read_text() == "no markers"


def test_kernels_readme_says_what_the_results_file_says() -> None:
    text, results = (ROOT / kernel_report.README).read_text(), ROOT / kernel_report.RESULTS
    if results.exists():
        assert kernel_report.fill_readme(text, json.loads(results.read_text())) == text
    else:
        assert kernel_report.NOT_MEASURED in text


# --- command line


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without CUDA")
@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_without_cuda_one_line_and_2(arguments, capsys) -> None:
    for main, start in ((kernels.main, []), (cli.main, ["bench", "kernels"])):
        try:
            code = main([*start, *arguments])
        except SystemExit as e:
            code = e.code
        assert code == 2
        said = capsys.readouterr().err
        assert said.endswith(": needs CUDA; --smoke runs tiny sizes on this CPU\n")


@pytest.mark.parametrize(
    "arguments",
    [["--ops", "nothing"], ["--ops", ","], ["--smoke", "--quick"], ["--unknown"], ["--out"],
     ["--smoke", "--out", "/dev/null/x.json"]],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernels.main(arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_cli_hands_its_arguments_on(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(kernels, "main", lambda arguments: seen.append(list(arguments)) or 7)
    assert cli.main(["bench", "kernels", "--quick", "--ops", "swiglu"]) == 7
    assert cli.main(["bench", "kernels"]) == 7
    assert seen == [["--quick", "--ops", "swiglu"], []]


def test_cli_needs_a_checkout(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "xplus_fast" / "cli.py"))
    assert cli.main(["bench", "kernels"]) == 2
    assert "checkout of the source" in capsys.readouterr().err


def test_a_prefix_names_several_ops() -> None:
    parser = kernels._Parser()
    assert kernels._names("rms_norm", parser) == ["rms_norm"]
    assert kernels._names("frozen, swiglu", parser) == [
        "frozen_linear bf16", "frozen_linear fp8", "frozen_linear int8", "frozen_linear nf4",
        "swiglu",
    ]  # fmt: skip
