"""Base and tuned side by side: what became better or worse, and how sure that is.

Confidence intervals are paired bootstraps (Koehn 2004): the same resampled sentences of both, the
difference of the two scores, its percentiles. Corpus metrics are computed anew of each resampling,
from sacrebleu's own statistics of sentences.
"""

import csv
import io
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.evaluation.outputs import describe as describe_oddities
from xplus_fast.files import write_json, write_picture, write_text

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def difference(
    base: Callable[[NDArray[np.intp]], float], tuned: Callable[[NDArray[np.intp]], float],
    count: int, *, samples: int, confidence: float, seed: int,
) -> tuple[float, float, float]:  # fmt: skip
    """tuned - base over all sentences, and the ends of its confidence interval.

    base, tuned: a score of the sentences with these indices, of `count`.
    """
    everything = np.arange(count)
    whole = tuned(everything) - base(everything)
    generator = np.random.default_rng(seed)
    found = np.empty(samples)
    for i in range(samples):
        chosen = generator.integers(0, count, count)
        found[i] = tuned(chosen) - base(chosen)
    rest = (1 - confidence) / 2
    low, high = np.quantile(found, [rest, 1 - rest])
    return whole, float(low), float(high)


def corpus_scorer(metric: Any, outputs: Sequence[str], references: Sequence[str]) -> Callable:
    """A sacrebleu metric as a function of sentences' indices."""
    statistics = np.array(metric._extract_corpus_statistics(list(outputs), [list(references)]))

    def scored(chosen: NDArray[np.intp]) -> float:
        return metric._compute_score_from_stats(statistics[chosen].sum(0).tolist()).score

    return scored


def mean_scorer(values: NDArray[np.float64], scale: float = 1.0) -> Callable:
    return lambda chosen: scale * float(values[chosen].mean())


def judge(change: float, low: float, high: float, *, lower_is_better: bool = False) -> str:
    """ "better", "same" or "worse": the same where the interval holds 0."""
    if low <= 0 <= high:
        return "same"
    return "better" if (change > 0) != lower_is_better else "worse"


def row(
    kind: str, name: str, metric: str, base: float | None, tuned: float, interval: Any,
    *, falling: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A line of the verdict. interval: (change, low, high), or None where there is no base.

    falling: a lower figure is a better one.
    """
    made: dict[str, Any] = {
        "kind": kind, "name": name, "metric": metric, "base": base, "tuned": tuned, "change": None,
        "low": None, "high": None, "verdict": "",
    }  # fmt: skip
    if base is not None:
        made["change"] = tuned - base
    if interval is not None:
        change, low, high = interval
        made |= {"change": change, "low": low, "high": high,
                 "verdict": judge(change, low, high, lower_is_better=falling)}  # fmt: skip
    return made


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean changes by which `--fail-if` may ask: of chrF++ over directions, of tasks over tasks.

    In points of 100. A task's figure is its first.
    """
    found = {}
    translation = [r["change"] for r in rows if r["kind"] == "translation"
                   and r["metric"] == "chrf" and r["change"] is not None]  # fmt: skip
    tasks: dict[str, float] = {}
    for r in rows:
        if r["kind"] == "reasoning" and r["change"] is not None:
            tasks.setdefault(r["name"], r["change"])
    if translation:
        found["translation"] = float(np.mean(translation))
    if tasks:
        found["reasoning"] = float(np.mean(list(tasks.values())))
    for r in rows:
        if r["change"] is not None:
            found[f"{r['name']}:{r['metric']}"] = r["change"]
    return found


def parse_condition(condition: str) -> tuple[str, str, float]:
    """ "reasoning < -2" -> name, operator, number. Raises `UserError`."""
    match = re.fullmatch(
        r"\s*(\S{1,200})\s*(<=|>=|<|>)\s*([-+]?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", condition
    )
    if match is None:
        raise UserError(f"--fail-if: {condition!r} does not read like 'reasoning < -2'")
    return match[1], match[2], float(match[3])


def failed(condition: str, changes: dict[str, float]) -> bool:
    """Whether a condition holds of the changes. Raises `UserError` for what was not measured."""
    name, sign, number = parse_condition(condition)
    if name not in changes:
        known = ", ".join(changes) or "nothing, without --base"
        raise UserError(f"--fail-if: no change of '{name}' was measured; there is {known}")
    return OPERATORS[sign](changes[name], number)


def describe(out: str, result: dict[str, Any]) -> str:
    """For the terminal."""
    rows = [
        (f"{r['name']} {r['metric']}", r["base"], r["tuned"], r["low"], r["high"], r["verdict"])
        for r in result["rows"]
    ]
    width = max(len(name) for name, *_ in rows)
    lines = []
    for name, base, tuned, low, high, said in rows:
        line = f"{name:{width}} {tuned:8.2f}"
        if base is not None:
            line = f"{name:{width}} {base:8.2f} -> {tuned:8.2f} ({tuned - base:+.2f}"
            line += f"; {low:+.2f} to {high:+.2f}) {said}" if low is not None else ")"
        lines.append(line)
    lines += [f"not measured: {where}: {why}" for where, why in result["missing"].items()]
    lines += [f"{where}: every answer is empty" for where in result["silent"]]
    lines += _odd_answers(result)
    lines += [f"note: {said}" for said in result["notes"]]
    return "\n".join([*lines, f"read {Path(out) / 'verdict.md'}"])


def write(out: Path, result: dict[str, Any]) -> None:
    """verdict.json, verdict.csv, verdict.md and, with a base, verdict.png."""
    rows = result["rows"]
    write_json(out / "verdict.json", result)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["kind"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "verdict.csv", text.getvalue())
    picture = draw(rows, out / "verdict.png")
    write_text(out / "verdict.md", markdown(result, picture))


def markdown(result: dict[str, Any], picture: bool) -> str:
    lines = ["# Verdict", ""]
    for name, change in list(result["changes"].items())[:2]:
        if name in ("translation", "reasoning"):
            what = "chrF++" if name == "translation" else "points"
            lines.append(f"{name}: {change:+.2f} {what} on average")
    lines += ["", table(result["rows"]), ""]
    if said := [f"- {text}" for text in (*_odd_answers(result), *result["notes"])]:
        lines += [*said, ""]
    if picture:
        lines += ["![what was gained and what it cost](verdict.png)", ""]
    if result["signatures"]:
        lines += ["Signatures of sacrebleu:", ""]
        lines += [f"- {k}: `{v}`" for k, v in result["signatures"].items()]
        lines.append("")
    for where, why in result["missing"].items():
        lines.append(f"- not measured: {where}: {why}")
    for where, samples in result["samples"].items():
        lines += ["", f"## {where}", ""]
        for sample in samples:
            lines += [f"> {sample['source']}", ""]
            lines += [f"- {k}: {sample[k]}" for k in ("reference", "base", "tuned") if k in sample]
            lines.append("")
    return "\n".join(lines) + "\n"


def _odd_answers(result: dict[str, Any]) -> list[str]:
    """Of each model and direction, the answers that are no plain translations."""
    return [
        f"{where}: of {counts['sentences']} answers {odd}"
        for where, counts in result["counts"].items()
        if (odd := describe_oddities(counts))
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | metric | base | tuned | change | interval | |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        base = "-" if r["base"] is None else f"{r['base']:.2f}"
        change = "-" if r["change"] is None else f"{r['change']:+.2f}"
        interval = "-" if r["low"] is None else f"{r['low']:+.2f} to {r['high']:+.2f}"
        lines.append(
            f"| {r['name']} | {r['metric']} | {base} | {r['tuned']:.2f} | {change} | {interval} |"
            f" {r['verdict']} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> bool:
    """Changes with their intervals: translation on one side, reasoning on the other."""
    known = [r for r in rows if r["low"] is not None]
    if not known:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in ("translation", "reasoning") if any(r["kind"] == k for r in known)]
    colors = {"better": "#3b8f4f", "same": "#94a3ad", "worse": "#c8553d"}
    most = max(sum(r["kind"] == k for r in known) for k in kinds)
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            1, len(kinds), figsize=(6 * len(kinds), 1.2 + 0.3 * most), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, kind in zip(grid[0], kinds, strict=True):
            mine = [r for r in known if r["kind"] == kind][::-1]
            for y, r in enumerate(mine):
                color = colors[r["verdict"]]
                axes.plot([r["low"], r["high"]], [y, y], color=color, linewidth=2)
                axes.plot([r["change"]], [y], "o", color=color)
            axes.axvline(0, color="#5c6b7a", linewidth=1)
            axes.set_yticks(range(len(mine)), [f"{r['name']}, {r['metric']}" for r in mine])
            axes.set_title(f"{kind}: change from the base", loc="left")
        write_picture(file, figure, dpi=130)
        plt.close(figure)
    return True
