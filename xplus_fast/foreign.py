"""Metrics whose models need a Python environment of their own: unbabel-comet, MetricX.

They run there in a process, by a file's path or a few lines: nothing of this project can be
imported there.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from xplus_fast.errors import UserError
from xplus_fast.files import scratch, write_text

METRICX = Path(__file__).with_name("evaluation") / "metricx.py"
SECONDS = 60  # that a Python may take to say what is installed

_COMET = """
import json, sys
from comet import download_model, load_from_checkpoint
name, inside, outside = sys.argv[1:]
path = name if name.endswith(".ckpt") else download_model(name)
data = [json.loads(line) for line in open(inside, encoding="utf-8")]
made = load_from_checkpoint(path).predict(data, batch_size=16, progress_bar=False)
json.dump(made["scores"], open(outside, "w"))
"""
_INSTALLED = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
"""


def check_packages(python: str, packages: Sequence[str], *, option: str) -> None:
    """See that a Python runs and that packages are installed for it, which are not imported.

    option: names the Python in a recipe. Raises `UserError`.
    """
    said = _ask(python, [_INSTALLED, *packages], option, "is no Python that runs")
    if missing := said.split():
        raise UserError(
            f"{option}: {', '.join(missing)} is not installed in the environment of {python}"
        )


def check_import(python: str, module: str, *, option: str) -> None:
    """See that a module can be imported, which may take seconds. Raises `UserError`."""
    _ask(python, [f"import {module}"], option, f"cannot import {module}")


def _ask(python: str, command: Sequence[str], option: str, otherwise: str) -> str:
    try:
        ran = subprocess.run(
            [python, "-c", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except OSError as e:
        raise UserError(f"{option}: {python}: {e.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{option}: {python} does not answer in {SECONDS} s") from None
    if ran.returncode:
        raise UserError(f"{option}: {python} {otherwise} ({_last(ran.stderr)})")
    return ran.stdout


def comet_scores(
    rows: Sequence[dict[str, str]], python: str, model: str, *, option: str
) -> list[float]:
    """Scores by a model of unbabel-comet, in a process of the Python that has it.

    rows: "src", "mt" and, for models that want one, "ref". model: a name on the hub, or a
    checkpoint file. option: names the Python in a recipe. Raises `UserError` where that Python or
    its unbabel-comet does not run.
    """
    needs = f"it needs an environment with unbabel-comet: {option} names its Python"
    return _scores(rows, [python, "-c", _COMET, model], model, needs, option)


def metricx_scores(
    rows: Sequence[dict[str, str]], python: str, model: str, tokenizer: str, *, option: str
) -> list[float]:
    """Errors that MetricX finds in each translation, 0 to 25, in a process of another Python.

    rows: "source", "hypothesis", "reference". model, tokenizer: names on the hub, or folders.
    option: names the Python in a recipe. Raises `UserError` where it does not run.
    """
    needs = f"it needs torch, transformers and sentencepiece: {option} names their Python"
    command = [python, str(METRICX), model, tokenizer]
    return _scores(rows, command, model, needs, option)


def _scores(
    rows: Sequence[dict[str, str]], command: list[str], model: str, needs: str, option: str
) -> list[float]:
    """What a command writes into the second of two files that it is told: a number a row."""
    if not rows:
        return []
    with scratch("xplus-metric-") as folder:
        given, made = folder / "rows.jsonl", folder / "scores.json"
        write_text(given, "".join(json.dumps(row) + "\n" for row in rows))
        try:
            ran = subprocess.run(
                [*command, str(given), str(made)], stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace",
            )  # fmt: skip
        except OSError as e:
            raise UserError(f"{option}: {command[0]}: {e.strerror}") from None
        if ran.returncode or not made.exists():
            said = _last(ran.stderr)
            raise UserError(f"{model} does not run in {command[0]} ({said}); {needs}")
        scores = json.loads(made.read_text())
    if len(scores) != len(rows):
        raise UserError(f"{model}: {len(scores)} scores of {len(rows)} rows")
    return scores


def _last(said: str) -> str:
    return (said.strip().splitlines() or ["no reason given"])[-1]
