"""What a finished run left behind, read for its reports, and the figures they share.

From recipe.yaml, run.json, metrics.jsonl and evaluation/*.json, and nothing else, so that a report
can be written again at any time.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from xplus_fast.errors import UserError
from xplus_fast.manifest import read_manifest
from xplus_fast.training import watch
from xplus_fast.training.checkpoints import FINAL, FINAL_TENSORS

RETENTION = "retention text"  # its row's name, among those of the directions

Steps = dict[str, list[dict[str, Any]]]  # stage name -> its lines of metrics.jsonl
Measured = dict[str, dict[str, Any]]  # "before", "after bottom", ... -> what was measured
Row = tuple[str, list[float | None], list[float | None]]  # name, loss and chrF++ at each of those


@dataclass(frozen=True)
class Finished:
    """A finished run. rows: of what was measured. curve: of `xplus-fast evaluate RUN --scales`."""

    name: str
    recipe: str
    about: dict[str, Any]  # run.json
    steps: Steps
    measured: Measured
    rows: list[Row]
    during: list[tuple[str, int, dict[str, Any]]]  # stage, step, what was measured there
    curve: dict[str, Any] | None


def read_run(run: Path) -> Finished:
    """Raises `UserError` for a folder that is no finished run, or a file that cannot be read."""
    steps = _read_steps(run / "metrics.jsonl")
    about = _read_json(run / "run.json")
    recipe = _read(run / "recipe.yaml")
    measured = {}
    for label in ["before", *(f"after {stage['name']}" for stage in about["stages"])]:
        path = run / "evaluation" / f"{label.replace(' ', '-', 1)}.json"
        if path.exists():
            measured[label] = _read_json(path)
    curve = run / "evaluation" / "curve.json"
    found = _read_json(curve) if curve.exists() else None
    if found is not None and found["checksums"] != _checksums(run, about):
        found = None  # the run was trained again since
    rows, during = rows_of(measured), watch.points(run)
    return Finished(run.resolve().name, recipe, about, steps, measured, rows, during, found)


def _checksums(run: Path, about: dict[str, Any]) -> list[str]:
    finals = [run / stage["name"] / FINAL for stage in about["stages"]]
    return [read_manifest(folder)[FINAL_TENSORS]["sha256"] for folder in finals]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a report needs the folder of a finished run") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON ({e.msg})") from None


def _read_steps(path: Path) -> Steps:
    steps: Steps = {}
    for number, text in enumerate(_read(path).split("\n"), 1):
        if not text:  # after the last line
            continue
        try:
            line = json.loads(text)
            steps.setdefault(line["stage"], []).append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of metrics: {text[:60]!r}") from None
    if not steps:
        raise UserError(f"{path}: empty; a report needs at least one step")
    return steps


def rows_of(measured: Measured) -> list[Row]:
    """One row a direction, then their mean if there are several, then retention."""
    values = measured.values()
    rows: list[Row] = [
        (tag, [v["loss"].get(tag) for v in values], [v["chrf"].get(tag) for v in values])
        for tag in sorted({tag for v in values for tag in v["loss"]})
    ]
    if len(rows) > 1:
        rows.append(
            (f"mean of {len(rows)}", mean_of([r[1] for r in rows]), mean_of([r[2] for r in rows]))
        )
    if any(v["retention"] for v in values):
        retained = [(v["retention"] or {}).get("loss") for v in values]
        rows.append((RETENTION, retained, [None] * len(retained)))
    return rows


def mean_of(table: list[list[float | None]]) -> list[float | None]:
    """Column means over the rows without gaps: figures to be compared are of the same rows."""
    whole = [[x for x in row if x is not None] for row in table if None not in row]
    return [fmean(column) for column in zip(*whole, strict=True)] or [None] * len(table[0])


def number(x: float | None, decimals: int) -> str:
    return "" if x is None else f"{x:.{decimals}f}"


def percent(values: list[float | None]) -> str:
    a, b = values[0], values[-1]
    return "" if a is None or b is None or len(values) < 2 else f"{100 * (b - a) / a:+.1f} %"


def points(values: list[float | None]) -> str:
    a, b = values[0], values[-1]
    return "" if a is None or b is None or len(values) < 2 else f"{b - a:+.1f}"


def smooth(y: np.ndarray) -> np.ndarray:
    """Moving average under a Hann window of a tenth of the steps, nine at least.

    At the ends, where the window has one side only, the value there of the line that fits it best:
    an average would stop short of the first and the last steps of a curve that falls.
    """
    n, half = len(y), max(9, len(y) // 10 | 1) // 2
    window, offset = np.hanning(2 * half + 3)[1:-1], np.arange(-half, half + 1)

    def moment(order: int, of: np.ndarray) -> np.ndarray:
        weights = window * offset**order  # np.convolve turns them round
        return np.convolve(of, weights[::-1])[half : half + n]

    m0, m1, m2 = (moment(order, np.ones(n)) for order in range(3))
    if n == 1:  # no line through one point
        return y.astype(float)
    return (m2 * moment(0, y) - m1 * moment(1, y)) / (m2 * m0 - m1**2)


def span(values: list[float], least: float, room: float = 0.04) -> tuple[float, float]:
    """The ends of an axis for these values. It is `least` long at least, so that no small change
    looks large, and has `room` on both sides, as a share of the values' own range."""
    low, high = min(values), max(values)
    more = max(0.0, least - (high - low)) / 2 + (high - low) * room
    return low - more, high + more
