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
from xplus_fast.evaluation.outputs import Answer, one_line
from xplus_fast.evaluation.ready import check
from xplus_fast.evaluation.reasoning import harness_model, run_tasks, sample_scores
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.sets import Lines
from xplus_fast.evaluation.translation import note, prompts, read_answers, score
from xplus_fast.files import make_folder, remove, resolve, sweep, write_text
from xplus_fast.model.pretrained import load_tokenizer

SAMPLES = 3  # translations shown of each direction
FALLING = ("off_target", "metricx")  # metrics of which less is better


def evaluate(
    model: Path, base: Path | None, recipe: EvaluateRecipe, *,
    lines: Sequence[Lines] | None = None, show: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a model folder, and another one beside it; returns what verdict.json holds.

    lines: the recipe's test sets, where `ready.check` has been asked for them. Raises `UserError`
    for what is wrong in the recipe, its files and the models, before anything is generated.
    """
    out = resolve(recipe.output)
    if lines is None:
        lines = check(recipe)
    folders = {"tuned": model} if base is None else {"base": base, "tuned": model}
    stock = bool(recipe.reasoning.tasks) and harness_model(recipe) == "hf"
    for folder in folders.values():
        check_model(folder, stock=stock)
    for folder in folders.values() if lines else ():
        tokenizer = load_tokenizer(folder)
        for each in lines:  # a template that refuses is found before any is answered
            prompts(each.first(1), recipe.translation, tokenizer)
    make_folder(out)
    for each in lines:
        _write_lines(out, "source", each, each.sources)
        _write_lines(out, "reference", each, each.references)
    answered: dict[str, dict[str, list[Answer]]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    done: dict[str, dict[str, Any]] = {}  # by the model's digest
    for which, folder in folders.items():
        answered[which] = _translate(which, folder, lines, recipe, out, show)
        made = [answer for answers in answered[which].values() for answer in answers]
        if made and not any(answer.text for answer in made):
            why = "its end-of-text token, or a chat template that it was not trained with?"
            if all("thoughts" in answer.odd for answer in made):
                why = "a think block each, and nothing after it: translation.max_new_tokens?"
            raise UserError(f"{which}: {folder} emits nothing: every answer is empty ({why})")
        if recipe.reasoning.tasks:
            digest = model_digest(folder)
            if digest not in done:
                done[digest] = run_tasks(
                    folder, digest, recipe, out / "reasoning", show=show, what=which
                )
            tasks[which] = done[digest]
    result: dict[str, Any] = {
        "model": str(model), "base": None if base is None else str(base), "rows": [],
        "signatures": {}, "missing": {}, "counts": {}, "samples": {}, "silent": [], "notes": [],
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
) -> dict[str, list[Answer]]:
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
        made = generator.answer(asked, f"{which} {each.name}")
        found[each.name] = read_answers(each, made, recipe.translation)
        _write_lines(out, which, each, [answer.text for answer in found[each.name]])
    return found


def _write_lines(out: Path, what: str, lines: Lines, texts: Sequence[str]) -> None:
    """Texts of a direction, as they are scored: a line each."""
    name = lines.name.replace(":", ".")
    write_text(out / f"{what}.{name}.txt", "".join(f"{one_line(text)}\n" for text in texts))


def _judge_direction(
    lines: Lines, answered: dict[str, Any], recipe: EvaluateRecipe, result: dict[str, Any]
) -> None:
    config = recipe.translation
    outputs = {which: found[lines.name] for which, found in answered.items()}
    scored = {which: score(lines, found, config) for which, found in outputs.items()}
    for which, found in scored.items():
        result["counts"][f"{which} {lines.name}"] = found["counts"]
        for name, why in found["missing"].items():
            result["missing"][f"{lines.name} {name}"] = why
        for name, measured in found["measured"].items():
            if measured.signature:
                result["signatures"][f"{name} {lines.name}"] = measured.signature
        if found["counts"]["empty"] == len(lines.sources):
            result["silent"].append(f"{which} {lines.name}")
    if lines.left_out:
        said = f"{lines.name}: {lines.left_out} rows that the set calls bad are left out"
        result["notes"].append(said)
    for name in config.metrics:
        if any(name not in found["measured"] for found in scored.values()):
            continue
        if (said := note(name, lines.languages[1])) and said not in result["notes"]:
            result["notes"].append(said)
        tuned = scored["tuned"]["measured"][name]
        base = scored["base"]["measured"][name] if "base" in scored else None
        interval = None
        if base is not None and len(lines.sources) > 1:
            interval = verdict.difference(
                base.of, tuned.of, len(lines.sources), samples=recipe.bootstrap,
                confidence=recipe.confidence, seed=recipe.seed,
            )  # fmt: skip
        result["rows"].append(
            verdict.row(
                "translation", lines.name, name, None if base is None else base.score, tuned.score,
                interval, falling=name in FALLING,
            )
        )  # fmt: skip
    texts = {which: [answer.text for answer in found] for which, found in outputs.items()}
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
    from xplus_fast.training.export import export
    from xplus_fast.training.run import changed_tensors

    base, tensors, record = changed_tensors(path)
    folder = out / "model"
    sweep(out, folder.name)
    if (folder / RECORD).is_file():
        known = read_json(folder / RECORD)
        if all(known.get(key) == value for key, value in record.items()):
            return folder
        remove(folder)
    export(base, tensors, folder, record)
    return folder
