"""Evaluation while a stage trains: a few held-out sentences every so many steps.

It changes nothing of the training: no random state is touched, and the model comes back as it was.
A point that was measured before a run was cut off is not measured again.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from xplus_fast.config import Recipe
from xplus_fast.data.readers import Example
from xplus_fast.evaluation.heldout import measure
from xplus_fast.files import write_json
from xplus_fast.training.shortage import ran_out

_FILE = re.compile(r"during-(.+)-(\d+)\.json")


class Watch(TrainerCallback):
    """Every `evaluation.every` steps: `evaluation.few` held-out examples of each direction."""

    def __init__(
        self, recipe: Recipe, stage: str, run: Path, tokenizer: Any,
        heldout: dict[str, list[Example]], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.stage, self.run, self.say = recipe, stage, run, say
        self.tokenizer = tokenizer
        few = recipe.evaluation.few
        self.heldout = {tag: examples[:few] for tag, examples in heldout.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.recipe.evaluation.every or not state.is_world_process_zero:
            return
        file = self.run / "evaluation" / f"during-{self.stage}-{step}.json"
        if file.exists():
            return
        try:
            found = measure(
                kwargs["model"], self.tokenizer, self.heldout, (), data=self.recipe.data,
                config=self.recipe.evaluation, show=False,
            )  # fmt: skip
        except RuntimeError as e:
            if not ran_out(e):
                raise
            self.say(f"step {step}: no memory is left to translate in; going on without")
            return
        write_json(file, found)
        scores = [
            f"{tag} loss {loss:.3f}"
            + (f", chrF++ {found['chrf'][tag]:.1f}" if tag in found["chrf"] else "")
            for tag, loss in found["loss"].items()
        ]
        self.say(f"step {step}: {'; '.join(scores)}")


def section(run: Path) -> str:
    """What the report says of it: a line for each point, and the last point's translations."""
    points = []
    for file in (run / "evaluation").glob("during-*.json"):
        if match := _FILE.fullmatch(file.name):
            points.append((match[1], int(match[2]), json.loads(file.read_text())))
    if not points:
        return ""
    points.sort(key=lambda p: p[:2])
    tags = sorted(points[-1][2]["loss"])
    lines = [
        "## While it trained", "",
        "A few held-out sentences of each direction: a trend, too few for a verdict.", "",
        "| stage, step | " + " | ".join(f"{t} loss, chrF++" for t in tags) + " |",
        "|---|" + "---|" * len(tags),
    ]  # fmt: skip
    for stage, step, found in points:
        cells = []
        for tag in tags:
            loss, score = found["loss"].get(tag), found["chrf"].get(tag)
            cells.append(
                ("-" if loss is None else f"{loss:.3f}")
                + (f", {score:.1f}" if score is not None else "")
            )
        lines.append(f"| {stage}, {step} | " + " | ".join(cells) + " |")
    stage, step, last = points[-1]
    lines += ["", f"Translations at {stage}, step {step}:", ""]
    for tag, samples in last["samples"].items():
        lines += [f"- {tag}: {s['source']} -> {s['output']}" for s in samples[:1]]
    return "\n".join(lines)
