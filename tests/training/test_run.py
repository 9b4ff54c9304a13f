"""The command line, end to end on a tiny model: train, go on, export, verify, and bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.training.workplace import PAIRS, losses, make_workplace, xplus
from xplus_fast.data.packed import PackedDataset
from xplus_fast.training import checkpoints, job, place
from xplus_fast.training.optimizer import AdamW

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workplace(tmp_path, tiny_model_dir):
    """A folder with a model, a corpus and a recipe of two stages."""
    make_workplace(tmp_path, tiny_model_dir)
    return tmp_path


def test_train_export_verify(workplace, tiny_model_dir, capsys):
    run, out = workplace / "run", workplace / "out"
    assert xplus("train", workplace / "recipe.yaml") == 0
    said = capsys.readouterr().out
    assert "low: trains layers 0-1 (2 of 6" in said and "high: trains layers 4-5 (2 of 6" in said
    assert "[[" in said  # the first example, its supervised part marked
    assert "report" in said
    assert [(s, n) for s, n, _ in losses(run)] == [
        (s, n) for s in ("low", "high") for n in range(1, 7)
    ]
    made = ("report.md", "report.html", "loss.png", "quality.png", "run.json")
    for name in (*made, "evaluation/before.json"):
        assert (run / name).stat().st_size > 0, name
    before, after = (
        json.loads((run / "evaluation" / f"{point}.json").read_text())
        for point in ("before", "after-high")
    )
    assert all(after["loss"][tag] < before["loss"][tag] for tag in ("en-sw", "sw-en"))

    assert xplus("export", run, out) == 0
    assert xplus("verify", tiny_model_dir, out) == 0
    said = capsys.readouterr().out
    assert "bit-identical" in said
    assert xplus("verify", tiny_model_dir, out, "--layers", "0-1,4-5") == 0
    assert xplus("verify", tiny_model_dir, out, "--layers", "0-1") == 1
    assert "model.layers.4" in capsys.readouterr().out
    assert xplus("verify", tiny_model_dir, out, "--layers", "0-1,4-5", "--also", "head") == 0
    assert xplus("verify", tiny_model_dir, out, "--layers", "0-1", "--also", "norm") == 2

    stock, base = (AutoModelForCausalLM.from_pretrained(f) for f in (out, tiny_model_dir))
    changed = {
        name.split(".")[2]
        for name, value in stock.state_dict().items()
        if not torch.equal(value, base.state_dict()[name])
    }
    assert changed == {"0", "1", "4", "5"}

    # the same recipe again: nothing is trained twice
    logged = losses(run)
    assert xplus("train", workplace / "recipe.yaml") == 0
    assert "trained before" in capsys.readouterr().out and losses(run) == logged
    assert xplus("train", workplace / "recipe.yaml", "training.save_steps=3") == 0
    assert xplus("train", workplace / "recipe.yaml", "stages.1.learning_rate=2e-3") == 2
    assert "stages.1.learning_rate: 0.001 there, 0.002 here" in capsys.readouterr().err
    (run / "mine.txt").write_text("a note")
    assert xplus("train", workplace / "recipe.yaml", "stages.0.steps=2", "--restart") == 0
    assert len(losses(run)) == 8
    assert (run / "mine.txt").read_text() == "a note"


def test_a_leaner_layout_trains_exports_and_goes_on(workplace, tiny_model_dir, capsys):
    """Frozen layers in NF4, streamed, all else on the host; cut off, and gone on with elsewhere."""
    run, out = workplace / "run", workplace / "out"
    lean = [
        "memory.frozen=nf4", "memory.placement=host", "memory.gradients=host",
        "memory.states=host", "memory.activations=offload", "memory.micro_batch_tokens=384",
    ]  # fmt: skip
    assert xplus("train", workplace / "recipe.yaml", "--dry-run", *lean) == 0
    said = capsys.readouterr().out
    assert "0-3      frozen nf4, streamed: forward only" in said and "4-5      trained" in said
    assert xplus("train", workplace / "recipe.yaml", *lean) == 0
    capsys.readouterr()
    about = json.loads((run / "run.json").read_text())
    assert about["stages"][0]["plan"]["layout"]["layers"][5]["format"] == "nf4"
    whole = losses(run)
    assert all(after < before for (_, _, before), (_, _, after) in [(whole[0], whole[5])])
    # the last stage anew from its second checkpoint, and with everything on the device
    shutil.rmtree(run / "high" / "final")
    shutil.rmtree(run / "high" / "checkpoint-6")
    there = ["memory.frozen=nf4", "memory.activations=keep", "memory.micro_batch_tokens=384"]
    assert xplus("train", workplace / "recipe.yaml", *there) == 0
    assert "going on from" in capsys.readouterr().out and losses(run) == whole
    assert xplus("train", workplace / "recipe.yaml", "memory.frozen=fp8") == 2
    assert "memory.frozen: 'nf4' there, 'fp8' here" in capsys.readouterr().err
    assert xplus("export", run, out) == 0
    assert xplus("verify", tiny_model_dir, out, "--layers", "0-1,4-5") == 0


def test_a_run_goes_on_in_the_formats_it_began_with(workplace, capsys, monkeypatch):
    """memory.frozen=auto: a plan for another card may choose otherwise."""
    assert xplus("train", workplace / "recipe.yaml") == 0
    monkeypatch.setattr(
        "xplus_fast.training.run.frozen_formats", lambda plan: {"fp8": "2-5", "head": "bf16"}
    )
    assert xplus("train", workplace / "recipe.yaml") == 2
    said = capsys.readouterr().err
    assert "its frozen format is no longer what the run began with (frozen format.0." in said


def test_a_stages_optimizer_is_gone_before_the_next_one_starts(workplace, monkeypatch):
    made, alive = [], []

    def start(self, *args, start=AdamW.__init__, **kwargs):
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(self))
        start(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "__init__", start)
    assert xplus("train", workplace / "recipe.yaml") == 0
    assert alive == [0, 0]


def test_formats_that_need_what_is_not_installed(workplace, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert xplus("train", workplace / "recipe.yaml", "memory.frozen=nf4") == 2
    assert capsys.readouterr().err.endswith(
        "nf4 is made by bitsandbytes: pip install bitsandbytes\n"
    )
    assert not (workplace / "run").exists()


def test_kill_at_any_moment_and_go_on(workplace):
    """Five kills, some while a checkpoint is being written: the run ends as an undisturbed one."""
    command = [sys.executable, "-m", "xplus_fast.cli", "train", str(workplace / "recipe.yaml")]
    options = ["data.heldout=0", "data.retention=[]", "stages.0.steps=12", "stages.1.steps=12"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}

    def start(output):
        return subprocess.Popen(
            [*command, *options, f"output={output}"], env=environment, cwd=workplace,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole, broken = workplace / "whole", workplace / "broken"
    process = start(whole)
    assert process.wait(240) == 0, process.stderr.read()

    rng, writing = random.Random(0), 0
    for kill in range(5):
        process = start(broken)
        had = broken.joinpath("metrics.jsonl")
        size = had.stat().st_size if had.exists() else 0
        while process.poll() is None and not (had.exists() and had.stat().st_size > size):
            time.sleep(0.002)  # until it makes a step
        deadline = time.monotonic() + (5 if kill % 2 else rng.uniform(0, 0.4))
        while process.poll() is None and time.monotonic() < deadline:
            if kill % 2 and any(broken.glob("*/.checkpoint-*")):
                writing += 1
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert writing >= 1
    process = start(broken)
    assert process.wait(240) == 0, process.stderr.read()
    assert losses(broken) == losses(whole)
    for stage in ("low", "high"):
        a, b = (load_file(run / stage / "final" / "trained.safetensors") for run in (whole, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert not list((broken / stage).glob(".*"))
    for run in (whole, broken):
        assert xplus("export", run, run / "out") == 0
    for file in (whole / "out").glob("*.safetensors"):
        assert file.read_bytes() == (broken / "out" / file.name).read_bytes()


def test_torchrun_gives_the_losses_of_one_process(workplace):
    """Two processes that share each step, in micro-batches, against one that takes it whole."""
    recipe, two = workplace / "recipe.yaml", workplace / "two"
    step = "training.tokens_per_step=2500"
    assert xplus("train", recipe, step, "training.report_to=[tensorboard]") == 0
    assert len(list((workplace / "run").glob("*/runs/*/events*"))) == 2  # a stage, one
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    other = [step, f"output={two}", "memory.micro_batch_tokens=192"]

    def torchrun():
        return subprocess.run(
            [sys.executable, *launcher, "-m", "xplus_fast.cli", "train", recipe, *other],
            env=environment, cwd=workplace, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    done = torchrun()
    assert done.returncode == 0, done.stderr[-3000:]
    one = [x for _, _, x in losses(workplace / "run")]
    assert [x for _, _, x in losses(two)] == pytest.approx(one, rel=1e-5)
    for run, times in ((workplace / "run", 0), (two, 1)):  # DDP's own place for each gradient
        about = json.loads((run / "run.json").read_text())["stages"][0]
        buckets = about["plan"]["device_bytes"]["gradient buckets"]
        assert buckets == times * 4 * about["trained_parameters"]
    assert (two / "report.md").exists()
    assert xplus("export", two, workplace / "out") == 0

    # cut off in a later epoch, it goes on with the same sequences
    epoch = json.loads((two / "high/checkpoint-4/trainer_state.json").read_text())["epoch"]
    assert epoch > 1 and epoch % 1
    logged = losses(two)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(two / "high" / name)
    assert torchrun().returncode == 0
    assert losses(two) == logged


def test_several_processes_sum_in_the_dtype_of_the_weights(workplace, monkeypatch, capsys):
    monkeypatch.setattr(place, "PartialState", lambda **_: None)
    monkeypatch.setattr(job, "watched", lambda _: nullcontext())
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = workplace / "recipe.yaml"
    assert xplus("train", recipe, "dtype=bfloat16", "memory.sums=32") == 2
    assert "memory.sums: 32 is for one process" in capsys.readouterr().err
    assert not (workplace / "run").exists()


def test_a_run_goes_on_with_the_same_steps_under_another_plan(workplace, capsys, monkeypatch):
    """Large micro-batches, then small ones: each step's sequences stay, so does the curve."""
    recipe, run = workplace / "recipe.yaml", workplace / "run"
    options = ["training.tokens_per_step=768", "training.save_total_limit=9"]

    def tokens(run):
        lines = (json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines())
        return [line["tokens"] for line in lines]

    assert xplus("train", recipe, *options, "memory.micro_batch_tokens=576") == 0
    whole, counted = losses(run), tokens(run)
    shutil.rmtree(run / "high" / "final")
    for step in (4, 6):
        shutil.rmtree(run / "high" / f"checkpoint-{step}")
    assert xplus("train", recipe, *options, "memory.micro_batch_tokens=192") == 0
    assert "going on from" in capsys.readouterr().out
    assert tokens(run) == counted and len(counted) == 12
    assert [x for *_, x in losses(run)] == pytest.approx([x for *_, x in whole], rel=1e-4)

    packed = PackedDataset.packed
    smaller = lambda self, tokens, shares=1: packed(self, tokens - 100, shares)  # noqa: E731
    monkeypatch.setattr(PackedDataset, "packed", smaller)
    assert xplus("train", recipe, *options) == 2
    assert "its steps an epoch is no longer what the run began with" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_never_touched(workplace, capsys):
    """The recipe's own folder as output: nothing in it is a run's."""
    before = {p.name for p in workplace.iterdir()}
    text = (workplace / "recipe.yaml").read_text()
    for options in ([], ["--restart"]):
        assert xplus("train", workplace / "recipe.yaml", f"output={workplace}", *options) == 2
        assert "is not empty and no run of ours" in capsys.readouterr().err
    assert {p.name for p in workplace.iterdir()} == before
    assert (workplace / "recipe.yaml").read_text() == text


def test_a_failed_start_leaves_the_output_free(workplace, capsys):
    bad = ["data.retention.0.path=gone.txt"]
    assert xplus("train", workplace / "recipe.yaml", *bad) == 2
    assert xplus("train", workplace / "recipe.yaml", *bad, "--dry-run") == 2
    out, err = capsys.readouterr()
    assert "gone.txt" in err and out == ""  # no plan of many lines before it
    assert not (workplace / "run").exists()


def test_going_on_with_other_data_or_another_model_is_refused(workplace, tiny_model_dir, capsys):
    model = workplace / "model"
    shutil.copytree(tiny_model_dir, model)
    command = ["train", workplace / "recipe.yaml", f"model={model}"]
    assert xplus(*command) == 0
    pairs = (workplace / "pairs.jsonl").read_text()
    (workplace / "pairs.jsonl").write_text(pairs.replace("cat", "dog"))
    capsys.readouterr()
    assert xplus(*command) == 2
    out, err = capsys.readouterr()
    assert "its data is no longer what the run began with" in err and "trains layers" not in out
    (workplace / "pairs.jsonl").write_text(pairs)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert xplus(*command) == 2
    assert "its model is no longer what the run began with" in capsys.readouterr().err


def test_dry_run_trains_nothing(workplace, capsys):
    assert xplus("train", workplace / "recipe.yaml", "--dry-run") == 0
    assert "first example" in capsys.readouterr().out
    assert not (workplace / "run").exists()


def test_stages_may_have_data_of_their_own_and_never_see_the_held_out(workplace, capsys):
    other = workplace / "other.jsonl"
    # the same pairs and more: what the first corpus holds out must stay out here, too
    extra = [(f"a dog {i} runs", f"mbwa {i} anakimbia") for i in range(20)]
    other.write_text("".join(json.dumps({"en": e, "sw": s}) + "\n" for e, s in [*PAIRS, *extra]))
    source = f"stages.1.sources=[{{path: {other}}}]"
    assert xplus("train", workplace / "recipe.yaml", source) == 0
    assert "112 sequences" in capsys.readouterr().out  # (60 - 4) pairs both ways
    about = json.loads((workplace / "run" / "run.json").read_text())
    assert about["stages"][1]["data"]["sequences"] == 2 * (60 - 4 + 20)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nowhere/at/all"], "nowhere/at/all: no such model folder"),
        (["stages.0.layers=bottom:7"], "bottom:7: the model has 6 layers"),
        (["stages.0.learning_rat=1"], "did you mean 'learning_rate'?"),
        (
            ["stages.0.learning_rate=fast"],
            "stages.0.learning_rate: a number or a mapping is wanted",
        ),
        (["stages.5.steps=1"], "the list has items 0 to 1"),
        (["data.pack_tokens=12"], "pairs.jsonl:1: "),
        (["data.sources.0.format=alpaca"], "pairs.jsonl"),
        (["data.sources.0.path=gone.jsonl"], "gone.jsonl"),
        (["device=warp"], "'warp' is no device"),
        (["data.prompt=no place for it"], "{text} is wanted"),
        (["training.tokens_per_step=64"], "less than one row"),
        (["training.adam_beta1=1.5"], "training.adam_beta1"),
        (["nonsense"], "an override reads key=value"),
    ],
)
def test_bad_recipes_are_one_line_and_exit_code_2(overrides, message, workplace, capsys):
    assert xplus("train", workplace / "recipe.yaml", *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("xplus-fast: ") and message in error
    assert not (workplace / "run" / "low").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"en": "a", "sw": "b"}\n{"en": \n', "data.jsonl:2: "),
        (b"", "empty"),
        (b'{"en": "caf\xe9", "sw": "b"}\n', "UTF-8"),
        (b'{"en": "a", "sw": ""}\n', "data.jsonl:1: "),
        (b'{"up": "a", "down": "b"}\n', "data.jsonl"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(content, message, workplace, capsys):
    (workplace / "data.jsonl").write_bytes(content)
    override = f"data.sources.0.path={workplace / 'data.jsonl'}"
    assert xplus("train", workplace / "recipe.yaml", override) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and message in error


def test_bad_records_are_skipped_and_counted_when_asked(workplace, capsys):
    lines = (workplace / "pairs.jsonl").read_text().splitlines()
    lines[4], lines[9] = '{"translation": ', '{"translation": {"en": "x", "sw": ""}}'
    (workplace / "pairs.jsonl").write_text("\n".join(lines))
    assert xplus("train", workplace / "recipe.yaml", "data.on_error=skip", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "pairs.jsonl:5" in said and "pairs.jsonl:10" in said


@pytest.mark.parametrize("slice", ["-2:", "4:6", "4-5"])
def test_every_form_of_selection_goes_on_the_command_line(slice, workplace, capsys):
    option = f"stages.1.layers={slice}"
    assert xplus("train", workplace / "recipe.yaml", option, "--dry-run") == 0
    assert "high: trains layers 4-5 (2 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["config", "size", "template", "header", "missing tensor", "no weights", "shape"]
)
def test_a_broken_model_folder_is_one_line_and_exit_code_2(
    damage, workplace, tiny_model_dir, capsys
):
    model = workplace / "model"
    shutil.copytree(tiny_model_dir, model)
    weights = model / "model.safetensors"
    if damage == "config":
        (model / "config.json").write_text("{")
    elif damage == "size":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    elif damage == "template":
        (model / "chat_template.jinja").write_text("{% for m in messages %}")
    elif damage == "header":
        data = bytearray(weights.read_bytes())
        at = data.index(b'"data_offsets":[') + 16
        data[at : at + 1] = b"9"
        weights.write_bytes(data)
    elif damage == "no weights":
        weights.unlink()
    else:
        tensors = load_file(weights)
        name = "model.layers.3.mlp.up_proj.weight"
        tensors[name] = tensors[name][1:].clone()
        if damage == "missing tensor":
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    assert xplus("train", workplace / "recipe.yaml", f"model={model}") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and str(model) in error
    assert not (workplace / "run").exists()


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(workplace, monkeypatch, capsys):
    write, calls = checkpoints.write_file, []

    def full(file, pieces, **options):
        calls.append(file)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return write(file, pieces, **options)

    monkeypatch.setattr(checkpoints, "write_file", full)
    assert xplus("train", workplace / "recipe.yaml") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left" in error or "full" in error
    left = checkpoints.latest_checkpoint(workplace / "run" / "low")
    assert left is not None and not list((workplace / "run" / "low").glob(".*"))
    monkeypatch.undo()
    assert xplus("train", workplace / "recipe.yaml") == 0
    assert len(losses(workplace / "run")) == 12


def test_unfinished_or_absent_runs_cannot_be_exported(workplace, tmp_path, capsys):
    assert xplus("export", tmp_path / "none", tmp_path / "out") == 2
    assert "no run is here" in capsys.readouterr().err


def test_an_interrupt_says_what_the_command_can_do(workplace, tiny_model_dir, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("xplus_fast.training.run.train", interrupt)
    monkeypatch.setattr("xplus_fast.training.export.verify", interrupt)
    assert xplus("train", workplace / "recipe.yaml") == 130
    said = "xplus-fast: stopped; start the same command again to go on"
    assert capsys.readouterr().err.strip() == said
    assert xplus("verify", tiny_model_dir, tiny_model_dir) == 130
    assert capsys.readouterr().err.strip() == "xplus-fast: stopped"


def test_help_answers_without_loading_torch():
    code = (
        "import sys; from xplus_fast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
