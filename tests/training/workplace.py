"""A folder with a corpus and a recipe of two stages for the tiny model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from xplus_fast.cli import main

PAIRS = [(f"the cat number {i} sleeps", f"paka namba {i} analala") for i in range(60)]


def make_workplace(folder: Path, model: Path) -> dict[str, Any]:
    """Write pairs.jsonl, english.txt and recipe.yaml into a folder; returns the recipe."""
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"translation": {"en": e, "sw": s}}) + "\n" for e, s in PAIRS)
    )
    (folder / "english.txt").write_text("A plain paragraph.\n\nAnother one, longer.\n")
    recipe: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "run"),
        "data": {
            "sources": [{"path": str(folder / "pairs.jsonl")}],
            "retention": [{"path": str(folder / "english.txt")}],
            "heldout": 4,
            "pack_tokens": 192,
            "cache": str(folder / "cache"),
        },
        "stages": [
            {"layers": "bottom:2", "name": "low", "learning_rate": 1e-3, "steps": 6},
            {"layers": "top:2", "name": "high", "learning_rate": 1e-3, "steps": 6},
        ],
        "training": {"tokens_per_step": 384, "save_steps": 2},
        "evaluation": {"translate": 2, "samples": 1, "max_new_tokens": 4},
    }
    write_recipe(folder, recipe)
    return recipe


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def xplus(*arguments: Any) -> int:
    """`xplus-fast ...`: its exit code."""
    return main([str(a) for a in arguments])


def train_killed(path: Path, before: str) -> None:
    """`xplus-fast train` in a process of its own, which `before`, Python, ends with kill -9."""
    train = f"from xplus_fast.cli import main\nraise SystemExit(main(['train', {str(path)!r}]))"
    code = f"{before}\n{train}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def losses(run: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every step in a run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines]
