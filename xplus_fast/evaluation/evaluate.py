"""`xplus-fast evaluate`: did it work, and what did it cost?

Every answer and every task's result is kept under the output folder as it is made, by a hash of the
model's bytes: cut off at any moment, the same command goes on, and a base that several runs share
is evaluated once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xplus_fast.errors import UserError
from xplus_fast.evaluation import verdict
from xplus_fast.evaluation.generate import Generator, check_model, model_digest
from xplus_fast.evaluation.reasoning import harness_model, run_tasks, sample_scores
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.translation import (
    Lines,
    make_metric,
    off_target,
    prompts,
    read_sets,
    score,
)
from xplus_fast.files import make_folder, remove, resolve, sweep, write_text

SAMPLES = 3  # translations shown of each direction


def evaluate(
    model: Path, base: Path | None, recipe: EvaluateRecipe, *, show: bool = True
) -> dict[str, Any]:
    """Evaluate a model folder, and another one beside it; returns what verdict.json holds.

    Raises `UserError` for what is wrong in the recipe, its files and the models.
    """
    out = resolve(recipe.output)
    lines = read_sets(recipe.translation.sets)  # before anything is generated
    folders = {"tuned": model} if base is None else {"base": base, "tuned": model}
    stock = bool(recipe.reasoning.tasks) and harness_model(recipe) == "hf"
    for folder in folders.values():
        check_model(folder, stock=stock)
    make_folder(out)
    answered: dict[str, dict[str, list[tuple[str, bool]]]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    done: dict[str, dict[str, Any]] = {}  # by the model's digest
    for which, folder in folders.items():
        answered[which] = _translate(which, folder, lines, recipe, out, show)
        if lines and not any(text for made in answered[which].values() for text, _ in made):
            raise UserError(
                f"{which}: {folder} emits nothing: every answer is empty (its end-of-text token,"
                " or a chat template that it was not trained with?)"
            )
        if recipe.reasoning.tasks:
            digest = model_digest(folder)
            if digest not in done:
                done[digest] = run_tasks(
                    folder, digest, recipe, out / "reasoning", show=show, what=which
                )
            tasks[which] = done[digest]
    result: dict[str, Any] = {
        "model": str(model), "base": None if base is None else str(base), "rows": [],
        "signatures": {}, "missing": {}, "counts": {}, "samples": {}, "silent": [],
    }  # fmt: skip
    for each in lines:
        _judge_direction(each, answered, recipe, result)
    for task in recipe.reasoning.tasks:
        _judge_task(task, tasks, recipe, result)
    if not result["rows"]:
        why = "; ".join(f"{k}: {v}" for k, v in result["missing"].items())
        raise UserError(f"nothing could be measured: {why}")
    result["changes"] = verdict.summary(result["rows"])
    verdict.write(out, result)
    return result


def _translate(
    which: str, folder: Path, lines: Sequence[Lines], recipe: EvaluateRecipe, out: Path, show: bool
) -> dict[str, list[tuple[str, bool]]]:
    if not lines:
        return {}
    generator = Generator(
        folder, out / "generations", engine=recipe.engine, batch_size=recipe.batch_size,
        max_new_tokens=recipe.translation.max_new_tokens, dtype=recipe.dtype,
        device=recipe.device, show=show,
    )  # fmt: skip
    found = {}
    for each in lines:
        asked = prompts(each, recipe.translation, generator.tokenizer)
        found[each.name] = generator.answer(asked, f"{which} {each.name}")
        texts = "\n".join(" ".join(text.split()) for text, _ in found[each.name])
        name = each.name.replace(":", ".")
        write_text(out / f"{which}.{name}.txt", texts + "\n")
    return found


def _judge_direction(
    lines: Lines, answered: dict[str, Any], recipe: EvaluateRecipe, result: dict[str, Any]
) -> None:
    config = recipe.translation
    outputs = {which: found[lines.name] for which, found in answered.items()}
    scored = {which: score(lines, found, config) for which, found in outputs.items()}
    for which, found in scored.items():
        kept = {k: found[k] for k in ("empty", "truncated", "sentences")}
        result["counts"][f"{which} {lines.name}"] = kept
        for name, why in found["missing"].items():
            result["missing"][f"{lines.name} {name}"] = why
        for name, signature in found["signatures"].items():
            result["signatures"][f"{name} {lines.name}"] = signature
        if found["empty"] == len(lines.sources):
            result["silent"].append(f"{which} {lines.name}")
    texts = {which: [text for text, _ in found] for which, found in outputs.items()}
    for name in config.metrics:
        if any(name not in found["scores"] for found in scored.values()):
            continue
        tuned = scored["tuned"]["scores"][name]
        base = scored["base"]["scores"][name] if "base" in scored else None
        interval = None
        if base is not None and name != "xcomet" and len(lines.sources) > 1:
            before, after = (
                verdict.mean_scorer(off_target(lines, texts[which]), 100)
                if name == "off_target"
                else verdict.corpus_scorer(
                    make_metric(name, lines.languages[1], config), texts[which], lines.references
                )
                for which in ("base", "tuned")
            )
            interval = verdict.difference(
                before, after, len(lines.sources), samples=recipe.bootstrap,
                confidence=recipe.confidence, seed=recipe.seed,
            )  # fmt: skip
        falling = name == "off_target"
        result["rows"].append(
            verdict.row("translation", lines.name, name, base, tuned, interval, falling=falling)
        )
    shown = []
    for i in range(min(SAMPLES, len(lines.sources))):
        sample = {"source": lines.sources[i], "reference": lines.references[i]}
        shown.append(sample | {which: found[i] for which, found in texts.items()})
    result["samples"][lines.name] = shown


def _judge_task(
    task: str, tasks: dict[str, Any], recipe: EvaluateRecipe, result: dict[str, Any]
) -> None:
    found = {which: each[task] for which, each in tasks.items()}
    for each in found.values():
        if "missing" in each:
            result["missing"][task] = each["missing"]
            return
    for name, tuned in found["tuned"]["scores"].items():
        percent = 0 <= tuned <= 1
        scale = 100 if percent else 1
        base = found["base"]["scores"].get(name) if "base" in found else None
        interval = None
        if base is not None:
            values = [sample_scores(found[w]["samples"], name) for w in ("base", "tuned")]
            a, b = values
            # a group's figure, or one that is no mean over documents, has no interval of ours
            if a is not None and b is not None and len(a) == len(b) > 1:
                close = np.isclose(a.mean(), base) and np.isclose(b.mean(), tuned)
                if close:
                    interval = verdict.difference(
                        verdict.mean_scorer(a, scale), verdict.mean_scorer(b, scale), len(a),
                        samples=recipe.bootstrap, confidence=recipe.confidence, seed=recipe.seed,
                    )  # fmt: skip
        result["rows"].append(
            verdict.row(
                "reasoning",
                task,
                name,
                None if base is None else scale * base,
                scale * tuned,
                interval,
                falling=name in found["tuned"]["falling"],
            )  # fmt: skip
        )


def model_folder(given: str, out: Path) -> Path:
    """A model's folder: as given, or exported from a finished run.

    Exported anew where the run is another than it was then: the record has its checksums.
    """
    from xplus_fast.model.checkpoint_files import RECORD, read_json, resolve_model

    path = resolve(given)
    if not (path / "run.json").is_file() and not (path / ".xplus-run").is_file():
        return resolve_model(given)
    from xplus_fast.training.changes import Changes
    from xplus_fast.training.export import export

    changes = Changes(path)
    record = changes.record
    folder = out / "model"
    sweep(out, folder.name)
    if (folder / RECORD).is_file():
        known = read_json(folder / RECORD)
        if all(known.get(key) == value for key, value in record.items()):
            return folder
        remove(folder)
    export(changes.base, changes, folder, record)
    return folder
