"""Output that is full, closed or of another alphabet: no traceback, nothing lost, one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xplus_fast.cli import main
from xplus_fast.terminal import one_line

ROOT = Path(__file__).parents[1]
PLAN = ["plan", "RECIPE", "--card", "rtx4090"]
TRACE = "Traceback"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    lines = [{"en": f"number {i} \u4f60", "sw": f"nambari {i} \u00e9\u4f60"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    tree = {
        "model": str(tiny_model_dir), "output": str(tmp_path / "run"),
        "data": {"sources": [{"path": str(tmp_path / "pairs.jsonl")}], "pack_tokens": 128,
                 "cache": str(tmp_path / "cache")},
        "stages": [{"layers": "top:1", "steps": 2}],
        "training": {"tokens_per_step": 128},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def shell(recipe: Path, arguments: list[str], redirect: str, **more: str) -> tuple[int, str]:
    """Run a command under `sh`; its exit code, and what came on standard error."""
    words = [str(recipe) if a == "RECIPE" else a for a in arguments]
    command = " ".join([sys.executable, "-m", "xplus_fast.cli", *words])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    environment |= more
    # nobody reads a pipe any more: the command begins when its reader has gone
    wait = "sleep 0.3; " if redirect.startswith("|") else ""
    script = f"({wait}{command}; echo $? >{recipe.parent}/code) {redirect}"
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True,
                          cwd=recipe.parent, timeout=120)  # fmt: skip
    return int((recipe.parent / "code").read_text()), done.stderr.decode()


@pytest.mark.parametrize("arguments", [PLAN, ["--help"], ["plan", "--help"]], ids=str)
@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        (">/dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("| true", 2, "standard output cannot be written (Broken pipe)"),
        (">&-", 0, ""),
        (">/dev/full 2>/dev/full", 2, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written(
    recipe: Path, arguments: list[str], redirect: str, code: int, says: str
) -> None:
    found, said = shell(recipe, arguments, redirect)
    assert TRACE not in said and says in said and said.count("\n") == bool(says)
    assert found == code


def test_a_terminal_of_another_alphabet(recipe: Path) -> None:
    renamed = recipe.parent / "\u4f60.yaml"
    renamed.write_text(recipe.read_text())
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    code, said = shell(renamed, ["train", "RECIPE", "--dry-run"], ">out.txt", **ascii_only)
    assert code == 0 and TRACE not in said
    out = (recipe.parent / "out.txt").read_bytes()
    assert b"dry run: nothing was trained" in out and b"\\u4f60" in out
    for variables in (ascii_only, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        for words in (["plan", "RECIPE", "seed=\u4f60"], ["plan", "\u4f61.yaml"]):
            code, said = shell(renamed, words, "", **variables)
            assert code == 2 and TRACE not in said and said.startswith("xplus-fast: ")


def test_training_goes_on_when_nobody_can_read_of_it(recipe: Path) -> None:
    code, said = shell(recipe, ["train", "RECIPE"], ">/dev/full")
    assert code == 2 and TRACE not in said
    assert "standard output cannot be written (No space left on device); the command went" in said
    assert (recipe.parent / "run" / "report.md").is_file()


def test_the_streams_are_given_back(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    before = sys.stdout, sys.stderr
    assert main(["train", str(recipe), "seed=-1"]) == 2
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().err.startswith("xplus-fast: seed: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "a\0b"], ["train", "x" * 5000],
        ["verify", "a\0b", "c"], ["verify", "x" * 256, "c"],
        ["export", "y" * 300, "z"], ["export", "y", "z\0"], ["sensitivity", "m" * 300, "d"],
        ["sensitivity", "m", "d" * 300], ["evaluate", "m\0", "RECIPE"],
        ["evaluate", "m", "e" * 300],
        ["evaluate", "m", "RECIPE", "--base", "b" * 300], ["plan", "RECIPE", "--budget", "\0"],
        ["plan", "RECIPE", "--card", "c" * 9999], ["train", "RECIPE", "output=" + "o" * 300],
        ["train", "RECIPE", 'output="a\\0b"'], ["train", "line\nfeed"], ["plan", "\x1b[2J"],
        ["train", "RECIPE", "report_to=[foo]"], ["train", "RECIPE", "training.report_to=[foo]"],
        ["train", "RECIPE", "training.report_to=[none, tensorboard]"],
        ["train", "RECIPE", "device=\u4f60"], ["prepare", "p" * 300], ["prepare", "\0"],
    ],
    ids=lambda a: " ".join(a)[:40],
)  # fmt: skip
def test_arguments_that_name_nothing(
    arguments: list[str], recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(recipe) if a == "RECIPE" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("xplus-fast: ") and err.count("\n") == 1 and len(err) < 900, err
    assert err.strip().isprintable()


def test_one_line_shows_what_a_terminal_would_obey() -> None:
    assert one_line("a\nb\x1b[2J\u2028\u00e9") == r"a\nb\x1b[2J\u2028" + "\u00e9"
