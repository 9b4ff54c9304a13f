"""Evaluation while a stage trains: a few held-out sentences every so many steps.

It changes nothing of the training: no random state is touched, and the model comes back as it was.
A point that was measured before a run was cut off is not measured again, and what was decided by it
is decided again: to stop a stage that no longer improves, and to end it with its best step.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from xplus_fast.config import Recipe
from xplus_fast.data.readers import Example
from xplus_fast.files import write_json
from xplus_fast.measuring.heldout import measure
from xplus_fast.training.place import Place, share
from xplus_fast.training.shortage import ran_out

_FILE = re.compile(r"during-(.+)-(\d+)\.json")


class Watch(TrainerCallback):
    """Every `evaluation.every` steps: `evaluation.few` held-out examples of each direction.

    With `evaluation.patience` or `keep: best`, the last step too. texts: of retention, where it
    decides. `best_step`: so far; 0 if nothing was measured.
    """

    def __init__(
        self, recipe: Recipe, stage: str, run: Path, tokenizer: Any,
        heldout: dict[str, list[Example]], texts: list[str], place: Place,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.stage, self.run, self.say = recipe, stage, run, say
        self.tokenizer, self.place = tokenizer, place
        options, self.texts = recipe.evaluation, texts
        self.heldout = {tag: examples[: options.few] for tag, examples in heldout.items()}
        self.decides = options.patience is not None or options.keep == "best"
        self.best_step, self.best, self.since = 0, float("inf"), 0  # the lower, the better

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where a run goes on: decide again by what was measured up to there."""
        if not self.decides or not self.place.first:
            self._agree(control)
            return
        for _stage, step, found in points(self.run, self.stage):
            if step <= state.global_step:
                self._look(step, found)
        self._agree(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        last = self.decides and step >= state.max_steps
        if step % self.recipe.evaluation.every and not last:
            return
        if self.place.first:
            found = self._measure(step, kwargs["model"])
            if found is not None and self.decides:
                self._look(step, found)
        self._agree(control)
        if self.decides and self.recipe.evaluation.keep == "best" and self.best_step == step:
            control.should_save = True
            state.best_global_step = step  # its checkpoint is not removed with the oldest

    def _measure(self, step: int, model: Any) -> dict[str, Any] | None:
        file = self.run / "evaluation" / f"during-{self.stage}-{step}.json"
        if file.exists():
            return json.loads(file.read_text())
        try:
            found = measure(
                model, self.tokenizer, self.heldout, self.texts, data=self.recipe.data,
                config=self.recipe.evaluation, show=False,
            )  # fmt: skip
        except RuntimeError as e:
            if not ran_out(e):
                raise
            self.say(f"step {step}: no memory is left to translate in; going on without")
            return None
        write_json(file, found)
        scores = [f"{tag} loss {loss:.3f}" for tag, loss in found["loss"].items()]
        scores += [f"{tag} chrF++ {score:.1f} (higher is better)"
                   for tag, score in found["chrf"].items()]  # fmt: skip
        if found["retention"]:
            scores.append(f"retention loss {found['retention']['loss']:.3f}")
        self.say(f"step {step}: {', '.join(scores)}")
        return found

    def _look(self, step: int, found: dict[str, Any]) -> None:
        by = self.recipe.evaluation.by
        if by == "retention":
            value = found["retention"]["loss"]
        else:
            value = fmean(found[by].values()) * (-1 if by == "chrf" else 1)
        if value < self.best:
            self.best_step, self.best, self.since = step, value, 0
        else:
            self.since += 1

    def _agree(self, control: Any) -> None:
        """All processes stop together, and know the best step."""
        if not self.decides:
            return
        self.best_step, self.since = share((self.best_step, self.since), self.place)
        patience = self.recipe.evaluation.patience
        if patience is not None and self.since >= patience:
            if self.place.first and not control.should_training_stop:
                name = {"loss": "held-out loss", "chrf": "chrF++", "retention": "retention loss"}
                self.say(
                    f"stage {self.stage} ends early: {name[self.recipe.evaluation.by]} was best at"
                    f" step {self.best_step}, {self.since} evaluations ago"
                )
            control.should_training_stop = True


def points(run: Path, stage: str | None = None) -> list[tuple[str, int, dict[str, Any]]]:
    """(stage, step, what was measured) of every point, in order."""
    found = []
    for file in (run / "evaluation").glob("during-*.json"):
        if (match := _FILE.fullmatch(file.name)) and stage in (None, match[1]):
            found.append((match[1], int(match[2]), json.loads(file.read_text())))
    return sorted(found, key=lambda point: point[:2])


def section(run: Path, stages: Sequence[str]) -> str:
    """What the report says of it: a line for each point, and the last point's translations.

    stages: their names in order.
    """
    every = [point for stage in stages for point in points(run, stage)]
    if not every:
        return ""
    tags = sorted(every[-1][2]["loss"])
    heads = [f"{t} loss, chrF++" for t in tags]
    kept = any(found["retention"] for _, _, found in every)
    heads += ["retention loss"] if kept else []
    lines = [
        "## While it trained", "",
        "A few held-out sentences of each direction: a trend, too few for a verdict. Loss: lower is"
        " better; chrF++: higher is better.", "",
        "| stage, step | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]  # fmt: skip
    for stage, step, found in every:
        cells = []
        for tag in tags:
            loss, score = found["loss"].get(tag), found["chrf"].get(tag)
            cells.append(
                ("-" if loss is None else f"{loss:.3f}")
                + (f", {score:.1f}" if score is not None else "")
            )
        if kept:
            cells.append(f"{found['retention']['loss']:.3f}" if found["retention"] else "-")
        lines.append(f"| {stage}, {step} | " + " | ".join(cells) + " |")
    stage, step, last = every[-1]
    shown = [(tag, samples[0]) for tag, samples in last["samples"].items() if samples]
    lines += ["", f"Translations at {stage}, step {step}:", ""] if shown else []
    lines += [f"- {tag}: {s['source']} -> {s['output']}" for tag, s in shown]
    return "\n".join(lines)
