"""Two runs' losses, compared to the last digit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import losses_equal

LINES = [
    {"stage": stage, "step": step, "loss": 2.0 / step, "grad_norm": 0.1 * step, "seconds": 1.0}
    for stage in ("low", "high")
    for step in (1, 2, 3)
]


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def changed(i: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**line, **(changes if k == i else {})} for k, line in enumerate(LINES)]


def said(a: Path, b: Path, capsys: Any) -> tuple[int, str, str]:
    code = losses_equal.main([str(a), str(b)])
    return code, *capsys.readouterr()


def test_equal_runs(tmp_path: Path, capsys: Any) -> None:
    a = write(tmp_path / "a", LINES)
    b = write(tmp_path / "b", [{**line, "seconds": 2.0} for line in LINES])  # time is no loss
    text = "6 steps, equal to the last digit: loss and gradient norm\n"
    assert said(a, b, capsys) == said(a, b / "metrics.jsonl", capsys) == (0, text, "")
    bare = [{k: v for k, v in line.items() if k != "grad_norm"} for line in LINES]
    assert said(a, write(tmp_path / "bare", bare), capsys)[0] == 0
    nan = changed(2, loss=math.nan)
    assert said(write(tmp_path / "n", nan), write(tmp_path / "m", nan), capsys)[0] == 0


one_up = math.nextafter(LINES[4]["loss"], 9)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (changed(4, loss=one_up), f"differs  loss of high step 2: 1.0 -> {one_up!r}\n"),
        (changed(1, grad_norm=0.3), "differs  gradient norm of low step 2: 0.2 -> 0.3\n"),
        (LINES[:5], "differs  loss of high step 3: 0.6666666666666666 -> none\n"
         "differs  gradient norm of high step 3: 0.30000000000000004 -> none\n"),
        (LINES[:2] + LINES[3:], "differs  loss of low step 3 is high step 1\n"
         "differs  gradient norm of low step 3 is high step 1\n"),
    ],
)  # fmt: skip
def test_the_first_difference_is_told(
    lines: list[dict[str, Any]], text: str, tmp_path: Path, capsys: Any
) -> None:
    a, b = write(tmp_path / "a", LINES), write(tmp_path / "b", lines)
    assert said(a, b, capsys) == (1, text, "")
    assert said(b, a, capsys)[0] == 1


@pytest.mark.parametrize("text", [None, "", "no json\n", '{"loss": 1.0}\n', "[1]\n"])
def test_what_is_no_run_is_refused(text: str | None, tmp_path: Path, capsys: Any) -> None:
    a, other = write(tmp_path / "a", LINES), tmp_path / "b"
    if text is not None:
        write(other, [])
        (other / "metrics.jsonl").write_text(text)
    code, out, err = said(a, other, capsys)
    assert (code, out) == (2, "") and err.startswith(f"losses_equal: {other}")
    assert err.count("\n") == 1
