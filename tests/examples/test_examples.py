"""Every file of examples/ is run as a user would run it, on a tiny model."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.training.workplace import losses, make_workplace, write_recipe, xplus
from xplus_fast.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRAINED = {"trainer.py": {2, 3, 4, 5}, "trl_sft.py": {0, 1, 2, 3}}  # of the tiny model's layers


def environment(**more: str) -> dict[str, str]:
    """As after `pip install`: our packages and commands are found, there is no GPU."""
    bin = Path(sys.executable).parent
    return {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", **more,
    }  # fmt: skip


def run(folder: Path, *command: Any, **more: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment(**more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {i}", "completion": f"number {i} it is"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def changed_layers(base: Path, result: Path) -> set[int]:
    """Layers of which a tensor changed; nothing else may have."""
    before, after = load_file(base / "model.safetensors"), load_file(result / "model.safetensors")
    assert before.keys() == after.keys()
    found = {name for name, value in before.items() if not torch.equal(value, after[name])}
    layers = {re.match(r"model\.layers\.(\d+)\.", name) for name in found}
    assert None not in layers, found
    return {int(match[1]) for match in layers if match}


def test_the_readme_names_every_example() -> None:
    named = re.findall(r"^\| \[([^]]+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(p.name for p in EXAMPLES.iterdir() if p.name[0] not in "R_")


@pytest.mark.parametrize("script", TRAINED)
def test_a_script_trains_its_layers(script: str, pairs: Path, tiny_model_dir: Path) -> None:
    if script == "trl_sft.py":
        pytest.importorskip("trl", "1.16")
    out = pairs.parent / "out"
    said = run(pairs.parent, sys.executable, EXAMPLES / script, tiny_model_dir, pairs, out)
    found = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", said)]
    assert len(found) == 3 and found[-1] < found[0]  # 24 rows, 8 a step
    assert changed_layers(tiny_model_dir, out) == TRAINED[script]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 6
    assert (out / "tokenizer.json").is_file()


def test_the_script_for_trainer_runs_under_torchrun(pairs: Path, tiny_model_dir: Path) -> None:
    script, out = EXAMPLES / "trainer.py", pairs.parent / "out"
    launcher = ("torchrun", "--standalone", "--nproc-per-node=2")
    said = run(pairs.parent, *launcher, script, tiny_model_dir, pairs, out)
    assert len(re.findall("'loss'", said)) == 2  # 16 rows a step
    assert changed_layers(tiny_model_dir, out) == TRAINED["trainer.py"]


def test_several_gpus_give_the_losses_of_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_workplace(tmp_path, tiny_model_dir)
    assert xplus("train", tmp_path / "recipe.yaml", f"output={tmp_path / 'one'}") == 0
    script = EXAMPLES / "several_gpus.sh"
    assert os.access(script, os.X_OK)
    run(tmp_path, script, "recipe.yaml", "training.save_steps=3", GPUS="2")
    one, two = ([x for _, _, x in losses(tmp_path / name)] for name in ("one", "run"))
    assert two == pytest.approx(one, rel=1e-5) and len(two) == 12
    # without GPUS it counts them
    tool = tmp_path / "bin" / "torchrun"
    write_tool(tool, 'echo "$@"')
    write_tool(tool.with_name("nvidia-smi"), 'echo "GPU 0: a"; echo "GPU 1: b"; echo "GPU 2: c"')
    said = run(tmp_path, script, "a.yaml", "seed=1", PATH=f"{tool.parent}:{os.environ['PATH']}")
    assert said == "--standalone --nproc-per-node=3 -m xplus_fast train a.yaml seed=1\n"


# --- Slurm


def write_tool(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


# As many processes as tasks, and the highest of their exit codes.
SRUN = """
while [ "${1#-}" != "$1" ]; do shift; done
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
echo "${pids[@]}" > tasks
for pid in "${pids[@]}"; do
  wait "$pid"; code=$?; [ "$code" -le "${most:-0}" ] || most=$code
done
exit "${most:-0}"
"""


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_slurm_job_saves_goes_back_into_the_queue_and_goes_on(
    tasks: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    recipe = make_workplace(tmp_path, tiny_model_dir)
    recipe["stages"] = [{"layers": "top:2", "learning_rate": 1e-3, "steps": 30}]
    recipe["training"]["save_steps"] = 1000
    recipe["evaluation"]["translate"] = 0
    write_recipe(tmp_path, recipe)
    tools = tmp_path / "bin"
    write_tool(tools / "srun", SRUN)
    write_tool(tools / "xplus-fast", f'exec {sys.executable} -m xplus_fast "$@"')
    show, ask = '[ "$1" = show ] && echo 127.0.0.1', '[ "$1" = requeue ] && echo "$2" >> requeued'
    write_tool(tools / "scontrol", f"{show} || {{ {ask}; }}")
    slurm = environment(
        PATH=f"{tools}:{os.environ['PATH']}", SLURM_NTASKS=str(tasks), SLURM_JOB_NODELIST="node1",
        SLURM_JOB_ID=str(1000 + os.getpid()),
    )  # fmt: skip
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), "recipe.yaml"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=tmp_path, env=slurm, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    job, metrics = start(), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None and time.monotonic() < deadline, job.stdout
        time.sleep(0.02)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "which is saved; start the same command again" in said
    assert (tmp_path / "requeued").read_text() == slurm["SLURM_JOB_ID"] + "\n"
    saved = len(losses(tmp_path / "run"))
    assert 0 < saved < 30
    if tasks > 1:
        return  # that several go on as one does, other tests say

    job = start()  # as Slurm does
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said[-3000:]
    assert [n for _, n, _ in losses(tmp_path / "run")] == list(range(1, 31))
    assert (tmp_path / "requeued").read_text().count("\n") == 1
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_slurm_job_that_fails_is_not_put_back(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    write_tool(tools / "srun", SRUN)
    write_tool(tools / "xplus-fast", "exit 2")
    write_tool(tools / "scontrol", '[ "$1" = show ] && echo node1 || touch requeued')
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sbatch", "recipe.yaml"], cwd=tmp_path,
        env=environment(PATH=f"{tools}:{os.environ['PATH']}", SLURM_NTASKS="1",
                        SLURM_JOB_NODELIST="node1", SLURM_JOB_ID="7"),
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "requeued").exists()


def test_slurm_signals_the_run_and_not_the_shell() -> None:
    text = (EXAMPLES / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert re.fullmatch(r"USR1@\d+", asked["signal"])  # B: would be the shell
    assert "requeue" in asked and asked["open-mode"] == "append"


@pytest.mark.parametrize("name", ["several_gpus.sh", "slurm.sbatch"])
def test_the_shell_reads_it(name: str) -> None:
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)


# --- the notebook


NOTEBOOK = json.loads((EXAMPLES / "l4.ipynb").read_text())


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its Python is executed; of its shell lines, ours are run and pip's are looked at."""
    monkeypatch.chdir(tmp_path)
    make_workplace(tmp_path, tiny_model_dir)
    shown: list[Any] = []
    display = types.ModuleType("IPython.display")
    vars(display).update(Image=Path, Markdown=str, display=lambda *what: shown.extend(what))
    jupyter = types.ModuleType("IPython")
    vars(jupyter).update(version_info=(9, 0), get_ipython=lambda: None)  # matplotlib asks
    monkeypatch.setitem(sys.modules, "IPython", jupyter)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    # what a user may change is in the cell that says so
    mine = {
        "MODEL": str(tiny_model_dir), "SOURCE": {"path": str(tmp_path / "pairs.jsonl")},
        "LAYERS": ["bottom:2", "top:2"], "STEPS": 2,
    }  # fmt: skip
    names: dict[str, Any] = {}
    ours = []
    for cell in (c for c in NOTEBOOK["cells"] if c["cell_type"] == "code"):
        lines = "".join(cell["source"]).splitlines()
        exec("\n".join(x for x in lines if x[0:1] not in ("!", "%")), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert mine.keys() <= names.keys()
            names |= mine
        for line in (x for x in lines if x[0:1] in ("!", "%")):
            words = shlex.split(line[1:].format(**names))
            if words[0] == "pip":
                check_install(words)
                continue
            assert words[0] in PROJECT["scripts"], line
            ours.append(words[1])
            if words[1] == "plan":
                words += ["--card", "l4", "--host-memory", "8GB"]  # none is here
            assert main(words[1:]) == 0, line
    assert ours == ["plan", "train", "export", "verify"]
    assert "bit-identical" in capsys.readouterr().out
    report, picture = shown
    assert "chrF++" in report and picture.is_file()
    assert len(losses(tmp_path / "runs" / "l4")) == 4


def check_install(words: list[str]) -> None:
    assert words[:3] == ["pip", "install", "-q"]
    match = re.fullmatch(r"(.+)\[(\w+)\]", words[3])
    assert match and match[2] in PROJECT["optional-dependencies"]
    assert (EXAMPLES / match[1]).resolve() == ROOT


def test_the_notebook_says_that_a_t4_is_refused(
    tmp_path: Path, tiny_model_dir: Path, capsys: Any
) -> None:
    text = "".join(NOTEBOOK["cells"][0]["source"])
    assert "A T4 is not enough" in text and "7.5" in text
    make_workplace(tmp_path, tiny_model_dir)
    assert xplus("plan", tmp_path / "recipe.yaml", "--card", "t4") == 2
    assert "t4 has compute capability 7.5 and no bf16" in capsys.readouterr().err


def test_the_notebook_is_one_without_results() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
