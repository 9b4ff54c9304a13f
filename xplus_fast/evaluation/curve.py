"""`xplus-fast evaluate RUN ... --scales`: the whole curve of translation against reasoning.

One run gives it: at each scale the model is the base and that part of what was changed. One model
is loaded; no other is written. Each point's verdict lies in `points/`, the curve in `curve.json`,
`curve.csv`, `curve.md` and `curve.png`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xplus_fast.config import Recipe, Stage, stage_name
from xplus_fast.errors import UserError
from xplus_fast.evaluation import front, verdict
from xplus_fast.evaluation.evaluate import Measured, judge, measure, write_answers
from xplus_fast.evaluation.front import Point
from xplus_fast.evaluation.generate import check_model, model_digest
from xplus_fast.evaluation.in_place import InPlace
from xplus_fast.evaluation.ready import check
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.sets import Lines
from xplus_fast.files import make_folder, resolve, write_json, write_text
from xplus_fast.model.checkpoint_files import read_json
from xplus_fast.planning.selection import Rotation
from xplus_fast.training import report_html
from xplus_fast.training.changes import Changes, grid
from xplus_fast.training.run_folder import is_run, read_recipe

POINTS = "points"  # the folder of their verdicts
CURVE = "curve.json"
WRITTEN = ("run", "about", "checksums", "measured", "points")  # of what `compare` reads
NOTED = Path("evaluation") / CURVE  # in a run's folder


def curve(
    run: Path, base: Path | None, recipe: EvaluateRecipe, scales: Sequence[str], *,
    condition: str = "", show: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a finished run at several scales; returns what curve.json holds.

    run: its folder. base: None, or the run's own. scales: as `grid` reads them.
    condition: of `--fail-if`, to be looked at.
    Raises `UserError` for what is wrong in any of it, before a model is loaded.
    """
    changes = Changes(run)
    points = {text: changes.at(text, "--scales") for text in grid(scales)}
    here = InPlace(changes, recipe)
    recipe = replace(recipe, engine="generate")  # whatever is installed
    own = changes.base
    if base is not None and base != own and model_digest(base) != model_digest(own):
        raise UserError(f"--base: {base} is not what {run} began with: {own}")
    lines = check(recipe, condition, [*points])
    check_model(changes.base, stock=False)
    out = resolve(recipe.output)
    make_folder(out)

    subjects = {text: here.subject(at) for text, at in points.items()}
    before = here.subject(changes.at("0"))
    found: dict[str, Measured] = {}  # by digest
    for which, subject in {"base": before, **subjects}.items():
        if subject.digest not in found:
            # a point that answers nothing is a result, too
            found[subject.digest] = measure(
                subject, which, lines, recipe, out, show=show, silent=which != "base"
            )
    results: dict[str, dict[str, Any]] = {}
    for text, subject in subjects.items():
        both = {"base": found[before.digest], "tuned": found[subject.digest]}
        results[text] = {"model": f"{run} at {text}", "base": str(changes.base)}
        results[text] |= judge(lines, both, recipe)
        folder = out / POINTS / text.replace(",", "_")
        make_folder(folder)
        write_answers(lines, both, folder)
        verdict.write(folder, results[text])
    result: dict[str, Any] = {
        "run": str(run),
        "about": about(read_recipe(run)),
        "checksums": changes.record["checksums"],
        "base": str(changes.base),
        "measured": measured_by(before.digest, lines, recipe),
        "points": {text: each["means"] for text, each in results.items()},
        "missing": {k: v for each in results.values() for k, v in each["missing"].items()},
    }
    known = points_of(result)
    result["words"] = front.in_words(known)
    result["front"] = [p.label for p in front.front(known)]
    best = front.chosen(known)
    result["chosen"] = None if best is None else best.label
    result["changes"] = {
        f"{name}@{text}": change
        for text, each in results.items() for name, change in each["changes"].items()
    } | ({} if best is None else results[best.label]["changes"])  # fmt: skip
    write(out, result)
    note_in_run(run, result)
    return result


def note_in_run(run: Path, result: dict[str, Any]) -> None:
    """Keep a curve in its run's folder, where `compare` looks for it, and in its report."""
    make_folder((run / NOTED).parent)
    write_json(run / NOTED, result)
    if (run / report_html.NAME).exists():  # an earlier version's run may lack what it shows
        report_html.write(run)


def curve_of(folder: Path) -> dict[str, Any]:
    """The curve of a run that was evaluated, or the one in an evaluation's folder.

    Raises `UserError` where there is none, and for one of a run that was trained again since.
    """
    file = folder / (NOTED if is_run(folder) else CURVE)
    if not file.is_file():
        raise UserError(
            f"{folder}: no curve is here: `xplus-fast evaluate {folder} RECIPE --scales 1`"
            " makes one"
        )
    found = read_json(file)
    if missing := [key for key in WRITTEN if key not in found]:
        raise UserError(f"{file}: not a curve: no {missing[0]}; evaluate the run again")
    if is_run(folder) and Changes(folder).record["checksums"] != found.get("checksums"):
        raise UserError(f"{folder}: was trained again since it was evaluated; evaluate it again")
    return found


def points_of(result: dict[str, Any], name: str = "") -> list[Point]:
    """The points of a curve. name: of its run, else its folder's."""
    run = name or Path(result["run"]).name
    return [Point(label, run, means) for label, means in result["points"].items()]


def measured_by(base: str, lines: Sequence[Lines], recipe: EvaluateRecipe) -> str:
    """A hash of the base and of all that was asked: what makes two curves comparable."""
    t, r = recipe.translation, recipe.reasoning
    texts = [(each.name, each.sources, each.references) for each in lines]
    asked = (t.prompt, t.system, t.max_new_tokens, r.tasks, r.limit, r.fewshot, r.chat)
    return hashlib.sha256(repr((base, texts, asked)).encode()).hexdigest()


def about(recipe: Recipe) -> dict[str, str]:
    """What one run differs from another in: layers, learning rates, data."""
    stages = [
        f"{stage_name(recipe, i)}: {_layers(s)}" if len(recipe.stages) > 1 else _layers(s)
        for i, s in enumerate(recipe.stages)
    ]
    sources = [s for stage in recipe.stages for s in stage.sources or []] or recipe.data.sources
    names = [Path(s.path if isinstance(s.path, str) else s.path[0]).name for s in sources]
    rates = [_rates(s) for s in recipe.stages]
    return {
        "layers": "; ".join(stages),
        "learning rate": "; ".join(dict.fromkeys(rates)),
        "data": ", ".join(dict.fromkeys(names)),
    }


def _layers(stage: Stage) -> str:
    turns = stage.layers
    return turns.rotate if isinstance(turns, Rotation) else str(turns)


def _rates(stage: Stage) -> str:
    if isinstance(stage.learning_rate, dict):
        return ", ".join(f"{what}: {rate:g}" for what, rate in stage.learning_rate.items())
    decay = "" if stage.layer_decay == 1 else f" * {stage.layer_decay:g} a layer"
    return f"{stage.learning_rate:g}{decay}"


def write(out: Path, result: dict[str, Any]) -> None:
    """curve.json, curve.csv, curve.md and curve.png."""
    points = points_of(result)
    write_json(out / CURVE, result)
    front.write_csv(points, out / "curve.csv")
    lines = ["# Translation against reasoning", "", *result["words"], "", front.table(points), ""]
    lines += [f"- not measured: {where}: {why}" for where, why in result["missing"].items()]
    if front.measured_kinds(points):
        front.draw(points, out / "curve.png")
        lines += ["![translation against reasoning](curve.png)", ""]
    write_text(out / "curve.md", "\n".join(lines) + "\n")


def describe(out: str, result: dict[str, Any]) -> str:
    """For the terminal."""
    points = points_of(result)
    width = max(len(p.label) for p in points)
    lines = []
    for p in points:
        parts = [f"{k} {front.interval(p.means[k])} {p.means[k]['verdict']}".strip()
                 for k in front.measured_kinds(points)]  # fmt: skip
        mark = ", on the front" if p.label in result["front"] else ""
        lines.append(f"{p.label:{width}}  {', '.join(parts)}{mark}")
    lines += [f"not measured: {where}: {why}" for where, why in result["missing"].items()]
    return "\n".join([*lines, *result["words"], f"read {Path(out) / 'curve.md'}"])
