"""Reasoning and knowledge: tasks of lm-evaluation-harness, by its own command line.

Its figures are therefore its own, digit for digit. Tasks that execute what a model writes run only
if the recipe allows it, and then in a process with limits and, where the system lets one, without
a network.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.options import parse_bytes

CODE = ("humaneval", "mbpp", "livecodebench", "cruxeval", "code_")  # tasks that execute code
FILES = 1 << 30  # bytes of a file that executed code may write


def run_tasks(model: Path, digest: str, recipe: EvaluateRecipe, out: Path) -> dict[str, Any]:
    """Each task's figures, {task: {"scores": {...}, "samples": path} or {"missing": why}}.

    Results are kept in `out` by the model's and the options' hash: a task that is there is not run
    again. Raises `UserError` where lm-evaluation-harness is missing.
    """
    found = {}
    for task in recipe.reasoning.tasks:
        folder = out / f"{task}-{digest[:16]}-{_options_key(recipe)}"
        if not any(folder.glob("**/results_*.json")):
            why = _run(model, task, recipe, folder)
            if why:
                found[task] = {"missing": why}
                continue
        found[task] = read_results(folder, task)
    return found


def _options_key(recipe: EvaluateRecipe) -> str:
    r = recipe.reasoning
    return "-".join(map(str, (r.limit or "all", r.fewshot, int(r.chat), recipe.dtype)))


def _run(model: Path, task: str, recipe: EvaluateRecipe, folder: Path) -> str | None:
    """Run one task; why it could not be, or None."""
    r = recipe.reasoning
    if r.python is None and importlib.util.find_spec("lm_eval") is None:
        raise UserError("reasoning: lm-eval is not installed: pip install 'xplus-fast[reasoning]'")
    executes = task.startswith(CODE)
    if executes and not r.allow_code:
        return "it executes what the model writes; reasoning.allow_code=true lets it"
    working = folder.with_name(f".{folder.name}")
    shutil.rmtree(working, ignore_errors=True)
    command = [*command_line(model, task, recipe, working)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    limits = None
    if executes:
        command = [*without_network(), *command]
        environment |= {"HF_ALLOW_CODE_EVAL": "1", "HF_HUB_OFFLINE": "1"}
        limits = lambda: _limit(r.code_seconds, parse_bytes(r.code_memory, "code_memory"))  # noqa: E731
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=limits
    )
    if ran.returncode or not any(working.glob("**/results_*.json")):
        lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
        said = next((x for x in reversed(lines) if "Error" in x or "not found" in x), None)
        return (said or (lines or ["no reason given"])[-1]).strip()[:300]
    shutil.rmtree(folder, ignore_errors=True)
    working.rename(folder)
    return None


def command_line(model: Path, task: str, recipe: EvaluateRecipe, out: Path) -> list[str]:
    """lm-evaluation-harness's own command for a task."""
    r = recipe.reasoning
    arguments = f"pretrained={model},dtype={'auto' if recipe.dtype == 'auto' else recipe.dtype}"
    kind = "vllm" if recipe.engine != "generate" and importlib.util.find_spec("vllm") else "hf"
    if r.chat:
        arguments += ",enable_thinking=False"
    command = [
        r.python or sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args",
        arguments, "--tasks", task, "--output_path", str(out), "--log_samples",
        "--batch_size", str(recipe.batch_size), "--seed", str(recipe.seed),
    ]  # fmt: skip
    if recipe.device != "auto":
        command += ["--device", recipe.device]
    if r.limit is not None:
        command += ["--limit", str(r.limit)]
    if r.fewshot is not None:
        command += ["--num_fewshot", str(r.fewshot)]
    if r.include_path is not None:
        command += ["--include_path", r.include_path]
    if r.chat:
        command += ["--apply_chat_template"]
    if task.startswith(CODE):
        command += ["--confirm_run_unsafe_code"]
    return command


def without_network() -> list[str]:
    """A prefix that takes the network away from a command, where this system lets one do so."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    prefix = [unshare, "--user", "--map-root-user", "--net"]
    tried = subprocess.run([*prefix, "true"], capture_output=True)
    return prefix if tried.returncode == 0 else []


def _limit(seconds: int, memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILES, FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_results(folder: Path, task: str) -> dict[str, Any]:
    """A task's figures as the harness wrote them, and where its samples are."""
    file = sorted(folder.glob("**/results_*.json"))[-1]
    tree = json.loads(file.read_text(encoding="utf-8"))
    results = tree["results"]
    own = results.get(task) or next(iter(results.values()))
    scores = {
        key.replace(",none", ""): value
        for key, value in own.items()
        if isinstance(value, int | float) and "_stderr" not in key and key != "sample_len"
    }
    samples = [str(p) for p in sorted(file.parent.glob("samples_*.jsonl"))]
    return {"scores": scores, "samples": samples, "results": str(file)}


def sample_scores(samples: list[str], metric: str) -> NDArray[np.float64] | None:
    """A metric's value of each document, in their order; None where it has none."""
    name = metric.partition(",")[0]
    found: dict[tuple[str, int], float] = {}
    for file in samples:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            wanted = metric.partition(",")[2]
            if wanted and row.get("filter", wanted) != wanted:
                continue
            value = row.get(name)
            if not isinstance(value, int | float):
                return None
            found[file.rpartition("samples_")[2].rpartition("_")[0], row["doc_id"]] = float(value)
    return np.array([found[key] for key in sorted(found)]) if found else None
