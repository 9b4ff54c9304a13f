"""`xplus-fast evaluate`: did it work, and what did it cost?

Every answer and every task's result is kept under the output folder as it is made, by a hash of the
model's bytes: cut off at any moment, the same command goes on, and a base that several runs share
is evaluated once.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xplus_fast.errors import UserError
from xplus_fast.evaluation import verdict
from xplus_fast.evaluation.generate import Generator, Subject, check_model, subject_of
from xplus_fast.evaluation.outputs import Answer, one_line
from xplus_fast.evaluation.ready import check
from xplus_fast.evaluation.reasoning import harness_model, run_tasks, sample_scores
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.sets import Lines
from xplus_fast.evaluation.translation import note, prompts, read_answers, score
from xplus_fast.files import make_folder, remove, resolve, write_text
from xplus_fast.locks import sweep
from xplus_fast.model.pretrained import load_tokenizer
from xplus_fast.training.run_folder import is_run

SAMPLES = 3  # translations shown of each direction
FALLING = ("off_target", "metricx")  # metrics of which less is better


@dataclass(frozen=True)
class Measured:
    """What a model answered, and what that is worth."""

    answers: dict[str, list[Answer]]  # by direction, in order
    scores: dict[str, dict[str, Any]]  # by direction, as `translation.score` has them
    tasks: dict[str, dict[str, Any]]  # as `run_tasks` has them


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
    subjects = {w: subject_of(f, recipe.dtype, recipe.device) for w, f in folders.items()}
    found: dict[str, Measured] = {}  # by digest
    for which, subject in subjects.items():
        if subject.digest not in found:
            found[subject.digest] = measure(subject, which, lines, recipe, out, show=show)
    measured = {which: found[subject.digest] for which, subject in subjects.items()}
    write_answers(lines, measured, out)
    result = {"model": str(model), "base": None if base is None else str(base)}
    result |= judge(lines, measured, recipe)
    verdict.write(out, result)
    return result


def measure(
    subject: Subject, which: str, lines: Sequence[Lines], recipe: EvaluateRecipe, out: Path, *,
    show: bool, silent: bool = False,
) -> Measured:  # fmt: skip
    """A model's answers and figures. which: what it is called while it works.

    silent: whether it may answer nothing at all. Raises `UserError` else.
    """
    answers, tasks = {}, {}
    if lines:
        generator = Generator(
            subject, out / "generations", engine=recipe.engine, batch_size=recipe.batch_size,
            max_new_tokens=recipe.translation.max_new_tokens, dtype=recipe.dtype, show=show,
        )  # fmt: skip
        with closing(generator):
            for each in lines:
                asked = prompts(each, recipe.translation, generator.tokenizer)
                made = generator.answer(asked, f"{which} {each.name}")
                answers[each.name] = read_answers(each, made, recipe.translation)
        every = [answer for of_direction in answers.values() for answer in of_direction]
        if not silent and not any(answer.text for answer in every):
            why = "its end-of-text token, or a chat template that it was not trained with?"
            if all("thoughts" in answer.odd for answer in every):
                why = "a think block each, and nothing after it: translation.max_new_tokens?"
            raise UserError(
                f"{which}: {subject.folder} emits nothing: every answer is empty ({why})"
            )
    scores = {each.name: score(each, answers[each.name], recipe.translation) for each in lines}
    if recipe.reasoning.tasks:
        tasks = run_tasks(subject, recipe, out / "reasoning", show=show, what=which)
    return Measured(answers, scores, tasks)


def write_answers(lines: Sequence[Lines], measured: dict[str, Measured], out: Path) -> None:
    """Each direction's texts, one in a line, for whoever scores them again."""
    for each in lines:
        _write_lines(out, "source", each, each.sources)
        _write_lines(out, "reference", each, each.references)
        for which, found in measured.items():
            _write_lines(out, which, each, [answer.text for answer in found.answers[each.name]])


def judge(
    lines: Sequence[Lines], measured: dict[str, Measured], recipe: EvaluateRecipe
) -> dict[str, Any]:
    """A model ("tuned") and its base, if there is one, side by side: rows, samples, mean changes.

    Raises `UserError` where nothing could be measured.
    """
    result: dict[str, Any] = {
        "rows": [], "signatures": {}, "missing": {}, "counts": {}, "samples": {}, "silent": [],
        "notes": [],
    }  # fmt: skip
    means = verdict.Means(recipe.confidence)
    for each in lines:
        _judge_direction(each, measured, recipe, result, means)
    for task in recipe.reasoning.tasks:
        _judge_task(task, measured, recipe, result, means)
    if not result["rows"]:
        why = "; ".join(f"{k}: {v}" for k, v in result["missing"].items())
        raise UserError(f"nothing could be measured: {why}")
    result["means"] = means.told()
    result["changes"] = verdict.summary(result["rows"], result["means"])
    return result


def _write_lines(out: Path, what: str, lines: Lines, texts: Sequence[str]) -> None:
    """Texts of a direction, as they are scored: a line each."""
    name = lines.name.replace(":", ".")
    write_text(out / f"{what}.{name}.txt", "".join(f"{one_line(text)}\n" for text in texts))


def _judge_direction(
    lines: Lines, measured: dict[str, Measured], recipe: EvaluateRecipe, result: dict[str, Any],
    means: verdict.Means,
) -> None:  # fmt: skip
    config = recipe.translation
    outputs = {which: found.answers[lines.name] for which, found in measured.items()}
    scored = {which: found.scores[lines.name] for which, found in measured.items()}
    for which, found in scored.items():
        result["counts"][f"{which} {lines.name}"] = found["counts"]
        for name, why in found["missing"].items():
            result["missing"][f"{lines.name} {name}"] = why
        for name, figure in found["measured"].items():
            if figure.signature:
                result["signatures"][f"{name} {lines.name}"] = figure.signature
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
        if name == "chrf" and base is not None:
            means.add("translation", tuned.score - base.score, interval)
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
    task: str, measured: dict[str, Measured], recipe: EvaluateRecipe, result: dict[str, Any],
    means: verdict.Means,
) -> None:  # fmt: skip
    found = {which: each.tasks[task] for which, each in measured.items()}
    for each in found.values():
        if "missing" in each:
            result["missing"][task] = each["missing"]
            return
    for i, (name, tuned) in enumerate(found["tuned"]["scores"].items()):
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
            if i == 0:
                falling = name in found["tuned"]["falling"]
                means.add("reasoning", scale * (tuned - base), interval, falling=falling)
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
    if not is_run(path):
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
