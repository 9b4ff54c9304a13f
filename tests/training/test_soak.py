"""A long run's memory: 2,000 steps, and what each of them leaves behind."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from xplus_fast.cli import main
from xplus_fast.training.stage import RunLog

STEPS, WARM, EVERY = 2000, 600, 20
MOST = 1000.0  # bytes a step


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def test_memory_does_not_grow(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc: resident memory is read there")
    pairs = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(64)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    recipe = {
        "model": str(tiny_model_dir), "output": str(tmp_path / "run"),
        "data": {
            "sources": [{"path": str(tmp_path / "pairs.jsonl")}], "pack_tokens": 24,
            "cache": str(tmp_path / "cache"),
        },
        "stages": [{"layers": "top:1", "steps": STEPS}],
        "training": {"tokens_per_step": 24, "save_steps": 500},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seen: list[tuple[int, int]] = []
    on_log = RunLog.on_log

    def watched(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        on_log(self, args, state, *more, **kwargs)
        if state.global_step >= WARM and state.global_step % EVERY == 0:
            gc.collect()
            seen.append((state.global_step, resident()))

    monkeypatch.setattr(RunLog, "on_log", watched)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    steps, sizes = np.array(sorted(set(seen))).T
    assert len(steps) == (STEPS - WARM) // EVERY + 1
    slope = np.polyfit(steps, sizes, 1)[0]
    assert slope < MOST, f"{slope:.0f} bytes a step"
