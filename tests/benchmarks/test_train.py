"""The training benchmark on a toy model: who runs, who is disqualified, what is told of it."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compare, report
from benchmarks.models import make_config
from benchmarks.training import clock as train_clock
from benchmarks.training import contestants as train_contestants
from benchmarks.training import profile
from benchmarks.training import race as train
from benchmarks.training import report as train_report
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.padding_free import flat, register
from benchmarks.training.workloads import (
    SMOKE,
    NamedWeights,
    Scale,
    make_steps,
    necessary_work,
)
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.planning.flops import assumed_work, layer_gemms, necessary_flops

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")
    out = tmp_path_factory.mktemp("train") / "train.json"
    assert train.main(["--smoke", "--out", str(out)]) == 0
    return json.loads(out.read_text()), out


def test_every_contestant_runs_or_says_why(smoke):
    result, out = smoke
    by_name = {(r["contestant"], r["mix"]): r for r in result["rows"]}
    assert {name for name, _ in by_name} == set(CONTESTANTS)
    for name, contestant in CONTESTANTS.items():
        mixes = [mix for of, mix in by_name if of == name]
        assert mixes == (["pairs"] if contestant.once else ["pairs", "full"])
    for (name, _), row in by_name.items():
        if row["status"] == "ok":
            assert row["tokens_per_s"] > 0 and len(row["losses"]) == 3
            assert all(map(math.isfinite, row["losses"]))
            split = row["split"]
            assert sum(split.values()) == pytest.approx(
                sorted(row["seconds"])[len(row["seconds"]) // 2], rel=1e-6
            )
            some = {k for k, v in split.items() if v > 0}
            assert some >= {"backward", "head", "trained forward", "optimizer"}, (name, split)
            assert split["streams"] == 0  # a CPU has none
            everything = name in ("full fine-tuning", *(n for n in CONTESTANTS if "LoRA" in n))
            assert everything or "frozen forward" in some, (name, split)
            assert row["share"] > 0 and abs(row["loss_off"]) <= CONTESTANTS[name].loose
        else:
            assert row["why"] and row["status"] == "not run", (name, row)
    ran = {name for (name, _), r in by_name.items() if r["status"] == "ok"}
    assert {"ours, bf16", "ours, int8 frozen", "ours, fp8 frozen", "ours, nf4 frozen",
            "ours, 24 GB", "ours, prompts apart", "stock Trainer", "tuned", "tuned + compile",
            "full fine-tuning"} <= ran  # fmt: skip
    liger = by_name["tuned + Liger", "pairs"]
    assert liger["why"] in ("needs CUDA", "not importable here"), liger
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_all_contestants_train_on_the_same_tokens(smoke):
    rows = [r for r in smoke[0]["rows"] if r["status"] == "ok" and r["mix"] == "pairs"]
    assert len({tuple(r["tokens"]) for r in rows}) == 1
    exact = [r["losses"][0] for r in rows if CONTESTANTS[r["contestant"]].loose < 0.01]
    assert max(exact) - min(exact) < 2e-3 * exact[0]


def test_no_tuned_contestant_computes_padding(smoke):
    """A rival that pads would be beaten for nothing: only stock, as people run it, does."""
    rows = [r for r in smoke[0]["rows"] if r["status"] == "ok" and r["mix"] == "pairs"]
    assert {r["contestant"] for r in rows if r["computed"] != r["tokens"]} == {"stock Trainer"}
    stock = next(r for r in rows if r["contestant"] == "stock Trainer")
    assert sum(stock["computed"]) > 1.5 * sum(stock["tokens"])
    for rival in ("tuned + Liger", "tuned", "tuned + compile", "LoRA r64", "full fine-tuning"):
        assert dict(CONTESTANTS[rival].options)["rows"], rival


def test_flat_rows_give_the_gradients_of_sentences_by_themselves():
    """In fp32: one after the other through SDPA, against all in one row."""
    torch.manual_seed(0)
    models = []
    for attention in ("sdpa", register()):
        model = AutoModelForCausalLM.from_config(
            make_config("tiny"), dtype=torch.float32, attn_implementation=attention
        )
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    sentences = [s for row in make_steps(SMOKE, "pairs", 1, 256)[0] for s in row]
    assert len({len(s) for s in sentences}) > 3
    batch = flat(sentences)
    supervised = int((batch["labels"][..., 1:] != -100).sum())
    for s in sentences:
        own = models[0](input_ids=s.ids[None], labels=s.labels[None], num_items_in_batch=supervised)
        own.loss.backward()
    models[1](**batch, num_items_in_batch=supervised).loss.backward()
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


def test_a_wrong_gradient_disqualifies_what_trains_the_same(smoke):
    rows = copy.deepcopy([r for r in smoke[0]["rows"] if r["mix"] == "pairs"])
    for row in rows:
        if row["contestant"] in ("tuned", "full fine-tuning"):
            row["grad_norms"][0] *= 1.2
    train.judge(rows, SMOKE, smoke[0]["limits"])
    wrong = {r["contestant"]: r["why"] for r in rows if r["status"] == "wrong gradient"}
    assert list(wrong) == ["tuned"] and "its norm is +" in wrong["tuned"]


def test_time_runs_out_for_contestants_not_for_stages(monkeypatch, tmp_path):
    begun = []

    def child(name, scale, stage, mixes):
        begun.append((name, stage))
        return {"status": "not run", "why": "of no matter"}

    monkeypatch.setattr(train, "run_child", child)
    scale = replace(SMOKE, stages=(("stage1", "bottom:2"), ("stage2", "top:2")))
    names, out = list(CONTESTANTS), tmp_path / "train.json"
    result = train.race(scale, names, ["stage1", "stage2"], ["full"], 9, True, out)
    assert begun[:4] == [
        ("ours, bf16", "stage1"), ("ours, bf16", "stage2"),
        ("tuned + Liger", "stage1"), ("tuned + Liger", "stage2"),
    ]  # fmt: skip
    assert [r["contestant"] for r in result["rows"]] == names * 2
    late = train.race(scale, names, ["stage1"], ["full"], -1, True, out)
    assert {r["status"] for r in late["rows"]} == {"not begun"}


# the call that Unsloth documents, and that it be imported first, as it demands
UNSLOTH = """
import sys

FIRST = "transformers" not in sys.modules


class FastLanguageModel:
    @staticmethod
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit, full_finetuning,
                        use_gradient_checkpointing):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        assert full_finetuning and not load_in_4bit
        assert use_gradient_checkpointing == "unsloth"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.gradient_checkpointing_enable()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == model.config.vocab_size
        return model, tokenizer
"""


@pytest.fixture
def unsloth(tmp_path, monkeypatch):
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    yield tmp_path
    sys.modules.pop("unsloth", None)


def test_unsloth_loads_the_weights_that_all_start_from(unsloth):
    stage = SMOKE.stages[0][0]
    theirs, stock = (
        train.run_child(name, SMOKE, stage, ["pairs"]) for name in ("Unsloth", "stock Trainer")
    )
    assert theirs["status"] == "ok", theirs
    assert theirs["mixes"]["pairs"]["losses"] == stock["mixes"]["pairs"]["losses"]
    assert theirs["mixes"]["pairs"]["grad_norms"] == stock["mixes"]["pairs"]["grad_norms"]


def test_unsloth_is_imported_before_transformers(unsloth, monkeypatch):
    seen = {}
    monkeypatch.setenv("PYTHONPATH", str(unsloth))

    def run(command, **options):
        seen["command"] = command
        code = command[command.index("-c") + 1]
        probe = code.split("; ")[0] + "; import unsloth; print(unsloth.FIRST)"
        done = real([command[0], "-c", probe], **options)
        seen["first"] = done.stdout.strip()
        return SimpleNamespace(returncode=1, stderr="stopped", stdout="")

    real = train.subprocess.run
    monkeypatch.setattr(train.subprocess, "run", run)
    assert train._spawn("Unsloth", "8B", "stage1", ["pairs"], 60)["why"] == "stopped"
    assert seen["first"] == "True"
    assert "run_module('benchmarks.training.race', run_name='__main__'" in seen["command"][2]


def test_an_earlier_result_is_kept_aside(tmp_path):
    out = tmp_path / "train.json"
    train.keep_earlier(out)  # there is none yet
    out.write_text(json.dumps({"commit": "abc", "time": "2026-01-02T03:04:05+00:00"}))
    train.keep_earlier(out)
    assert [p.name for p in tmp_path.iterdir()] == ["train-2026-01-02T030405-abc.json"]


def test_a_wrong_loss_disqualifies(smoke):
    rows = copy.deepcopy([r for r in smoke[0]["rows"] if r["mix"] == "pairs"])
    cheat = next(r for r in rows if r["contestant"] == "tuned")
    cheat["losses"][0] *= 1.02
    train.judge(rows, SMOKE, smoke[0]["limits"])
    assert cheat["status"] == "wrong loss" and "+2.0" in cheat["why"]
    assert sum(r["status"] == "wrong loss" for r in rows) == 1
    shown = train_report.table({**smoke[0], "rows": rows})
    assert "| tuned | wrong loss: +2.0" in shown


def test_steps_are_full_and_the_same_every_time():
    scale = Scale("8B")
    for mix in ("pairs", "full"):
        steps = make_steps(scale, mix, 2, 1000)
        again = make_steps(scale, mix, 2, 1000)
        works = [necessary_work(step) for step in steps]
        assert all(0.97 * 16384 < w.data_tokens <= 16384 for w in works)
        assert all((0.1 < w.saved < 0.3) == (mix == "pairs") for w in works)
        for step, other in zip(steps, again, strict=True):
            assert len(step) == 4
            for row, same in zip(step, other, strict=True):
                assert sum(map(len, row)) <= 4096
                assert all(torch.equal(a.ids, b.ids) for a, b in zip(row, same, strict=True))
    (full,) = make_steps(scale, "full", 1, 10)
    assert [[len(s) for s in row] for row in full] == [[4096]] * 4
    assert necessary_work(full).supervised == 4 * 2048


def test_peers_see_every_sentence_once():
    scale = Scale("8B")
    (step,) = make_steps(scale, "pairs", 1, 1000)
    sentences = [s for row in step for s in row]
    for rows, count in ((1, 4), (4, 1)):
        tuned = train_contestants._batches(step, rows, scale)
        assert [s for batch in tuned for s in batch] == sentences and len(tuned) == count
    stock = train_contestants._batches(step, 0, scale)
    assert [s for batch in stock for s in batch] == sentences and max(map(len, stock)) == 8


def test_weights_are_those_of_their_names():
    shape = shape_of(make_config("tiny"))
    weights = NamedWeights(shape, torch.device("cpu"))
    names = tuple(f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
    whole = weights.read(names, torch.float32)
    assert torch.equal(whole, torch.cat([weights.read((n,), torch.float32) for n in names]))
    assert not torch.equal(whole[:32], whole[-32:])


def test_limits_count_trained_layers_in_bf16(smoke):
    row = next(r for r in smoke[0]["rows"] if r["contestant"] == "ours, bf16")
    shape = shape_of(make_config("tiny"))
    limits = {"bf16_flops": 1e9, "fp8_flops": 2e9}
    bf16 = train._limit(shape, row, limits)
    fp8 = train._limit(shape, {**row, "contestant": "ours, fp8 frozen"}, limits)
    assert 0.5 * bf16 < fp8 < bf16
    doubled = {"bf16_flops": 2e9, "fp8_flops": 2e9}
    assert train._limit(shape, row, doubled) == pytest.approx(bf16 / 2)


def test_without_a_gpu_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main([]) == 2 and profile.main([]) == 2
    err = capsys.readouterr().err
    assert "train: no CUDA GPU here" in err and "profile: no CUDA GPU here" in err
    assert train.main(["--smoke", "--only", "nobody"]) == 2
    assert train.main(["--smoke", "--mixes", "many"]) == 2


def test_products_are_told_by_their_sizes():
    shape = Shape("qwen3", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=24,
                  vocabulary=100, eps=1e-6, tied=False)  # fmt: skip
    t = 11
    weights = {k: v for k, v in shape.packed_shapes().items() if len(v) == 2} | {"head": (100, 8)}
    assert set(weights) == {"qkv", "o", "gate_up", "down", "head"}
    for part, (rows, columns) in weights.items():
        forward, dx = ([t, columns], [columns, rows]), ([t, rows], [rows, columns])
        for pair in (forward, dx, ([rows, t], [t, columns])):
            assert profile.product_part("aten::mm", pair, shape) == part
            assert profile.product_part("aten::addmm", ([t, rows], *pair), shape) == part
    assert profile.product_part("aten::mm", ([t, 7], [7, 100]), shape) is None
    assert profile.product_part("aten::add", ([t, 8], [8, 100]), shape) is None
    assert profile.product_part("aten::mm", ([t, 8, 1], [8, 100]), shape) is None


def test_bytes_that_a_step_has_to_move():
    """Counted by hand for two layers, of which the upper one trains."""
    shape = Shape("qwen3", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=16,
                  vocabulary=100, eps=1e-6, tied=False)  # fmt: skip
    found = profile.necessary_bytes(
        shape, [1], tokens=10, supervised=3, element=2, update=UpdateLayout()
    )
    one = 10 * 2 * 8  # [T, H] in bf16, bytes
    assert found["norms"] == one * (5 * 2 + 3 * 4)  # five norms forward, three of them back
    assert found["qk_norm_rope"] == 10 * 2 * 24 * (2 + 2 + 3)
    assert found["swiglu"] == 10 * 2 * 16 * (3 + 3 + 5)
    assert found["head"] == 2 * 3 * 100 * 2
    qkv, o, gate_up, down, norms = 32 * 8, 8 * 16, 32 * 8, 8 * 16, 8 + 8 + 4 + 4
    parameters = qkv + o + gate_up + down + norms
    assert found["optimizer"] == parameters * (2 * 12 + 2 + 2 + 2)
    idle = profile.necessary_bytes(
        shape, [], tokens=10, supervised=3, element=2, update=UpdateLayout()
    )
    assert idle["norms"] == one * 10 and idle["optimizer"] == 0


@pytest.mark.parametrize("name, layers", [("bottom 4", range(4)), ("top 15", range(21, 36))])
def test_the_documents_bytes_and_flops_are_computed(name, layers):
    shape, work = shape_of(make_config("8B")), assumed_work(True)
    work = work.at(round(16384 * (1 - work.saved)))
    moved = profile.necessary_bytes(
        shape, layers, tokens=work.tokens, supervised=work.supervised, element=2,
        update=UpdateLayout(),
    )  # fmt: skip
    flops = necessary_flops(shape, layers, (), work)
    cells = [*moved.values(), sum(moved.values()), flops.total / 1e3]
    row = " | ".join(f"{cell / 1e9:.0f}" for cell in cells)
    document = (ROOT / "docs/performance.md").read_text()
    assert f"| {name} of 36 | {row} |" in document
    apart, n = assumed_work(False), len(layers)
    units = 36 + 36 - min(layers) + n  # forward, dX, dW
    one = necessary_flops(
        shape, layers, (), replace(apart, queries=apart.tokens, supervised=apart.tokens)
    )
    assert one.linear == units * layer_gemms(shape, apart)
    ours = flops.linear / (layer_gemms(shape, apart) / apart.data_tokens * work.data_tokens)
    assert f"dW = {units} | {ours:.1f} |" in document


def test_compare_flags_what_became_worse(smoke, tmp_path, capsys):
    result, out = smoke
    slower = copy.deepcopy(result)
    row = next(r for r in slower["rows"] if r["status"] == "ok")
    row["tokens_per_s"] *= 0.9
    (tmp_path / "new.json").write_text(json.dumps(slower))
    assert compare.main([str(out), str(out)]) == 0
    assert compare.main([str(out), str(tmp_path / "new.json")]) == 1
    said = capsys.readouterr().out
    assert f"WORSE   -10.0%  {row['stage']} {row['mix']}: {row['contestant']}, tokens/s" in said
    assert compare.main([str(tmp_path / "new.json"), str(out)]) == 0  # faster
    assert compare.main([str(out), str(tmp_path / "no.json")]) == 2
    (tmp_path / "other.json").write_text(json.dumps({**result, "device": {"name": "another"}}))
    assert compare.main([str(out), str(tmp_path / "other.json")]) == 2


def test_compare_tells_whether_losses_are_equal(smoke, tmp_path, capsys):
    result, out = smoke
    assert compare.main([str(out), str(out), "--same-losses"]) == 0
    ran = [r for r in result["rows"] if r["status"] == "ok"]
    said = capsys.readouterr().out
    assert f"{len(ran)} of {len(ran)} loss curves are equal to the last bit" in said
    other = copy.deepcopy(result)
    row = next(r for r in other["rows"] if r["status"] == "ok")
    row["grad_norms"][1] *= 1 + 1e-12
    (tmp_path / "new.json").write_text(json.dumps(other))
    assert compare.main([str(out), str(tmp_path / "new.json")]) == 0
    assert compare.main([str(out), str(tmp_path / "new.json"), "--same-losses"]) == 1
    name = f"{row['stage']} {row['mix']}: {row['contestant']}"
    assert f"differs  {name}: gradient norm of step 2:" in capsys.readouterr().out
    row["grad_norms"] = ran[0]["grad_norms"][:1]  # of a run that was cut off
    (tmp_path / "new.json").write_text(json.dumps(other))
    assert compare.main([str(out), str(tmp_path / "new.json"), "--same-losses"]) == 1


def test_compare_reads_what_the_kernel_benchmark_writes(tmp_path, capsys):
    row = {"op": "rms_norm", "way": "forward", "size": "8B", "tokens": 8192, "provider": "ours"}
    for name, ms in (("a", 1.0), ("b", 1.2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [{**row, "ms": ms}]}))
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "WORSE   +20.0%  rms_norm forward 8B 8192 ours, ms" in capsys.readouterr().out


@pytest.mark.parametrize("mix, lengths", [("full", [128]), ("1k", [32] * 4)])
def test_rows_of_sequences_of_one_length(mix, lengths):
    steps = make_steps(SMOKE, mix, 2, 100)
    assert [[[len(s) for s in row] for row in step] for step in steps] == [[lengths] * 2] * 2


def test_a_history_over_commits(smoke, tmp_path, monkeypatch):
    for i, commit in enumerate(("aaa", "bbb")):
        run = {**smoke[0], "smoke": False, "model": "8B", "commit": commit, "time": str(i)}
        if commit == "bbb":  # measures something more, which is drawn first
            rows = [{**r, "mix": "1k"} for r in run["rows"] if r["mix"] == "pairs"]
            run["rows"] = [*rows, *run["rows"]]
        (tmp_path / f"train-{commit}.json").write_text(json.dumps(run))
    others = {"model": "14B"}, {"device": {"name": "another card"}}
    for i, other in enumerate(others):
        run = {**smoke[0], "smoke": False, "commit": "ccc", "time": f"-{i}", **other}
        (tmp_path / f"train-other{i}.json").write_text(json.dumps(run))
    assert [r["commit"] for r in train_report.history(tmp_path)] == ["aaa", "bbb"]
    drawn = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    train_report.draw_history(tmp_path, tmp_path / "history.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["aaa", "bbb"]
    lines = {str(line.get_label()): list(line.get_xdata()) for line in axes.lines}
    stage = smoke[0]["rows"][0]["stage"]
    assert lines[f"ours, bf16: {stage}, pairs"] == [0, 1]
    assert lines[f"ours, bf16: {stage}, 1k"] == [1]
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_profile_groups_what_a_step_computes(tmp_path, capsys):
    assert profile.main(["--smoke", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    groups, products = found["groups"], found["products"]
    # six layers forward, two of them dX and dW: in one micro-batch
    assert {products[part]["calls"] for part in ("gate_up", "down")} == {10}
    assert products["o"]["calls"] >= 10  # in so small a block others have its sizes
    assert products["head"]["seconds"] > 0
    assert groups["GEMMs"]["seconds"] > 0 < groups["attention"]["calls"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "| GEMMs |" in capsys.readouterr().out
    kernels = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT": "GEMMs", "_rms_norm_fwd_kernel": "norms",
        "pytorch_flash::flash_bwd_dq_dk_dv_loop": "attention", "_adamw_kernel": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copies", "_qk_norm_rope_fwd_kernel": "qk_norm_rope",
        "_quantize_fp8_kernel": "quantize", "something": "other",
    }  # fmt: skip
    assert {name: profile.group(name) for name in kernels} == kernels


def test_the_documents_show_the_results_files():
    for path, text in report.rewritten().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m benchmarks.report"
    assert report.main(["--check"]) == 0
    assert "not measured on a GPU" in train_report.readme_section(None)


def test_waits_are_taken_out_of_the_part_they_lie_in(monkeypatch):
    """A clock on made-up times: waits of the computing stream alone, once each."""
    times = iter(range(100))
    waited = []
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *both: waited.append(both))
    layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    for frozen in (0, 3):
        layers[frozen].requires_grad_(False)
    model = SimpleNamespace(layers=layers, register_forward_pre_hook=lambda *_, **__: Nothing(),
                            register_forward_hook=lambda *_: Nothing())  # fmt: skip
    clock = train_clock.Clock(SimpleNamespace(model=model), torch.device("cpu"), warm=0)
    monkeypatch.setattr(clock, "_now", lambda: next(times))
    mine, other = SimpleNamespace(cuda_stream=7), SimpleNamespace(cuda_stream=8)
    clock._wait(mine, "early", 7)  # before any step
    clock.on_step_begin(None, SimpleNamespace(global_step=0), None)  # 0
    clock._forward = True
    for i, layer in enumerate(layers):
        if i == 2:
            clock._wait(mine, "weights", 7)  # 2 to 3, in the trained layers' forward
            clock._wait(other, "another stream's", 7)
        layer(torch.zeros(1, 1))  # before 1, at 1; before 3 and after it, at 4 and 5
    clock._end()  # 6
    clock._wait(mine, "an input", 7)  # 7 to 8, in the backward
    clock.on_pre_optimizer_step()  # 9
    clock.on_step_end()  # 10
    next(times), next(times)  # a batch is made
    clock.on_step_begin(None, SimpleNamespace(global_step=1), None)  # 13
    clock.on_pre_optimizer_step()  # 14
    clock.on_step_end()  # 15
    clock.close()
    assert clock.seconds == [10, 5]
    whole = dict.fromkeys(train_clock.PARTS, 0)
    assert clock.split(1) == whole | {"between steps": 3, "backward": 1, "optimizer": 1}
    assert clock.split(0) == whole | {
        "frozen forward": 2, "trained forward": 2, "head": 1, "backward": 2, "optimizer": 1,
        "streams": 2,
    }  # fmt: skip
    assert [event for _, event in waited] == [
        "early", "weights", "another stream's", "an input",
    ]  # fmt: skip


class Nothing:
    def remove(self):
        pass
