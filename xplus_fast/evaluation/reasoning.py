"""Reasoning and knowledge: tasks of lm-evaluation-harness, by its own command line.

Its figures are therefore its own, digit for digit. Its cache keeps every answer as it is made.
Tasks that execute what a model writes run only if the recipe allows it, and in two steps: the
model answers and nothing is judged; then, in limits and without model or network, the harness
judges what was answered.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.evaluation import livecodebench
from xplus_fast.evaluation.generate import Subject, load_kind
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.sandbox import last_error, permitted, readable, run_limited
from xplus_fast.files import move, remove
from xplus_fast.foreign import check_packages
from xplus_fast.options import parse_bytes

REPLAY = Path(__file__).with_name("replay.py")
TAIL = 1 << 16  # bytes of what the harness says that are kept to look for a reason


def run_tasks(
    subject: Subject, recipe: EvaluateRecipe, out: Path, *, show: bool, what: str = "model"
) -> dict[str, Any]:
    """Each task's figures, {task: {"scores": {...}, ...} or {"missing": why}}.

    Results are kept in `out` by the hash of the model and of the options: a task that is there is
    not run again, and one that was cut off goes on. Raises `UserError` where lm-evaluation-harness
    is missing.
    """
    tasks, found = recipe.reasoning.tasks, {}
    for left in out.glob(".*"):  # of a process that was killed
        remove(left)
    for i, task in enumerate(tasks):
        folder = out / f"{task}-{_key(subject, recipe)}"
        if task == livecodebench.NAME:
            folder = out / f"{task}-{_key(subject, recipe, recipe.reasoning.livecodebench)}"
            found[task] = livecodebench.measure(
                subject,
                recipe,
                folder,
                generations=out.parent / "generations",
                show=show,
                what=what,
            )
            continue
        if not _results(folder):
            if show:
                print(f"{what}: {task}, {i + 1} of {len(tasks)} tasks", file=sys.stderr, flush=True)
            why = _run(subject, task, recipe, folder, out / f"answers-{_key(subject, recipe)}")
            if why:
                found[task] = {"missing": why}
                continue
        found[task] = read_results(folder, task)
    return found


def check_setup(recipe: EvaluateRecipe) -> None:
    """See at once that what all tasks of the harness need is there. Raises `UserError`."""
    r = recipe.reasoning
    readable(r.code_reads)
    if r.include_path and not Path(r.include_path).is_dir():
        raise UserError(f"reasoning.include_path: {r.include_path}: no such folder")
    if any(task != livecodebench.NAME for task in r.tasks):
        python = _python(recipe)
        needs = ["lm-eval", *(["vllm"] if harness_model(recipe) == "vllm" else [])]
        check_packages(python, needs, option="reasoning.python")


def check_task(task: str, recipe: EvaluateRecipe) -> None:
    """See that a task is known and may be run, which takes seconds. Raises `UserError`."""
    if task == livecodebench.NAME:
        return livecodebench.check(recipe)
    r = recipe.reasoning
    about = _look(_python(recipe), tuple(r.tasks), r.include_path)[task]
    if not about["known"]:
        raise UserError(
            f"lm-evaluation-harness has no task '{task}'; `lm-eval ls tasks` lists them"
        )
    if about["executes"] and not r.allow_code:
        raise UserError("it executes what the model writes; reasoning.allow_code=true lets it")
    if about["judges"]:
        raise UserError(f"{about['judges'][0]} executes code where it cannot be limited")
    if about["executes"]:
        permitted(r.code_isolation)


def _key(subject: Subject, recipe: EvaluateRecipe, *more: object) -> str:
    """A hash of all that decides a figure, the files of one's own tasks included."""
    r = recipe.reasoning
    told = [
        subject.digest,
        harness_model(recipe),
        _dtype(recipe),
        recipe.seed,
        r.limit,
        r.fewshot,
        r.chat,
        *more,
    ]
    key = hashlib.sha256(repr(told).encode())
    if r.include_path:
        for file in sorted(Path(r.include_path).rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                key.update(str(file.relative_to(r.include_path)).encode() + file.read_bytes())
    return key.hexdigest()[:16]


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/results_*.json"))


def _run(
    subject: Subject, task: str, recipe: EvaluateRecipe, folder: Path, cache: Path
) -> str | None:
    """Run one task; why it could not be, or None."""
    r = recipe.reasoning
    try:
        check_task(task, recipe)
        reads = readable(r.code_reads) + ([Path(r.include_path)] if r.include_path else [])
    except UserError as e:
        return str(e)
    python = _python(recipe)
    about = _look(python, tuple(r.tasks), r.include_path)[task]
    working = folder.with_name(f".{folder.name}")
    remove(working)
    command = command_line(subject, task, recipe, working, cache)
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if about["executes"]:
        # the harness's own self-test of its judge runs; no answer is judged here
        command += ["--predict_only", "--confirm_run_unsafe_code"]
        environment["HF_ALLOW_CODE_EVAL"] = "1"
    if subject.harness is None:
        code, said = _show([python, "-m", "lm_eval", *command], environment)
    else:
        code, said = subject.harness(command, environment)
    if code or not _results(working):
        return last_error(said)
    if about["executes"]:
        answers = working.with_name(f"{working.name}.answers").absolute()
        remove(answers)
        move(working, answers)
        command = [python, "-I", str(REPLAY), "run", str(answers)]
        command += judge_line(task, recipe, working)
        try:
            code, said = run_limited(
                command, seconds=r.code_seconds, memory=parse_bytes(r.code_memory, "code_memory"),
                environment={"HF_ALLOW_CODE_EVAL": "1"}, out=working, least=r.code_isolation,
                reads=[REPLAY, answers, *reads],
            )  # fmt: skip
        except UserError as e:
            return str(e)
        if code or not _results(working):
            return last_error(said)
        remove(answers)
    remove(folder)
    move(working, folder)
    return None


def _python(recipe: EvaluateRecipe) -> str:
    python = recipe.reasoning.python
    if python is None and importlib.util.find_spec("lm_eval") is None:
        raise UserError("reasoning: lm-eval is not installed: pip install 'xplus-fast[reasoning]'")
    return python or sys.executable


@cache
def _look(python: str, tasks: tuple[str, ...], include_path: str | None) -> dict[str, Any]:
    """What the harness knows of the tasks, asked once: it reads 14 000 files to say so."""
    named = [t for t in tasks if t != livecodebench.NAME]
    more = ["--include_path", include_path] if include_path else []
    command = [python, "-I", str(REPLAY), "look", *named, *more]
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"reasoning.python: {python}: {e.strerror}") from None
    if ran.returncode:
        raise UserError(f"reasoning: lm-evaluation-harness does not run: {last_error(ran.stderr)}")
    return json.loads(ran.stdout.splitlines()[-1])


def harness_model(recipe: EvaluateRecipe) -> str:
    """Which of the harness's own models asks: "vllm" or "hf"."""
    found = recipe.reasoning.python is None and importlib.util.find_spec("vllm") is not None
    return "vllm" if recipe.engine == "vllm" or (recipe.engine == "auto" and found) else "hf"


def _dtype(recipe: EvaluateRecipe) -> str:
    """In which the harness has the weights: as `generate` has them; vLLM chooses for itself."""
    if harness_model(recipe) == "vllm":
        return recipe.dtype
    return load_kind(recipe.dtype, recipe.device)[0]


def command_line(
    subject: Subject, task: str, recipe: EvaluateRecipe, out: Path, cache: Path
) -> list[str]:
    """What lm-evaluation-harness's own command is given for a task."""
    r = recipe.reasoning
    arguments = f"pretrained={subject.folder},dtype={_dtype(recipe)},trust_remote_code=False"
    if r.chat:
        arguments += ",enable_thinking=False"
    command = [
        "run", "--model", harness_model(recipe), "--model_args", arguments,
        "--batch_size", str(recipe.batch_size), "--use_cache", str(cache),
        *judge_line(task, recipe, out),
    ]  # fmt: skip
    if recipe.device != "auto":
        command += ["--device", recipe.device]
    if r.fewshot is not None:
        command += ["--num_fewshot", str(r.fewshot)]
    if r.chat:
        command += ["--apply_chat_template"]
    return command


def judge_line(task: str, recipe: EvaluateRecipe, out: Path) -> list[str]:
    """Those of its options that need no model."""
    r = recipe.reasoning
    options = ["--tasks", task, "--output_path", str(out.absolute()), "--log_samples"]
    options += ["--seed", str(recipe.seed)]
    if r.limit is not None:
        options += ["--limit", str(r.limit)]
    if r.include_path is not None:
        options += ["--include_path", str(Path(r.include_path).absolute())]
    if r.allow_code:
        options += ["--confirm_run_unsafe_code"]
    return options


def _show(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command, its progress shown on a terminal; exit code and the end of what it said."""
    shown = sys.stderr.isatty()
    tail = b""
    try:
        running = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as e:
        raise UserError(f"reasoning.python: {command[0]}: {e.strerror}") from None
    assert running.stdout is not None
    with running:
        while piece := os.read(running.stdout.fileno(), 4096):
            tail = (tail + piece)[-TAIL:]
            if shown:
                sys.stderr.write(piece.decode(errors="replace"))
                sys.stderr.flush()
    return running.returncode, tail.decode(errors="replace")


def read_results(folder: Path, task: str) -> dict[str, Any]:
    """A task's figures as the harness wrote them, which of them fall when it gets better, and
    where its samples are."""
    file = _results(folder)[-1]
    tree = json.loads(file.read_text(encoding="utf-8"))
    results = tree["results"]
    own = results.get(task) or next(iter(results.values()))
    scores = {
        key.replace(",none", ""): value
        for key, value in own.items()
        if isinstance(value, int | float) and "_stderr" not in key and key != "sample_len"
    }
    better = tree.get("higher_is_better", {}).get(task, {})
    samples = [str(p) for p in sorted(file.parent.glob("samples_*.jsonl"))]
    return {
        "scores": scores, "samples": samples, "results": str(file),
        "falling": [k for k in scores if better.get(k.partition(",")[0]) is False],
    }  # fmt: skip


def sample_scores(samples: list[str], metric: str) -> NDArray[np.float64] | None:
    """A metric's value of each document, in their order; None where it has none."""
    name, _, wanted = metric.partition(",")
    found: dict[tuple[str, int], float] = {}
    for file in samples:
        for line in Path(file).read_bytes().splitlines():  # of bytes: only line ends of ASCII
            row = json.loads(line)
            if wanted and row.get("filter", wanted) != wanted:
                continue
            value = row.get(name)
            if not isinstance(value, int | float):
                return None
            found[file.rpartition("samples_")[2].rpartition("_")[0], row["doc_id"]] = float(value)
    return np.array([found[key] for key in sorted(found)]) if found else None
