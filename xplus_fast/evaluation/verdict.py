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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.evaluation.outputs import describe as describe_oddities
from xplus_fast.files import write_json, write_picture, write_text

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Interval:
    """A change and the ends of its confidence interval; its value in each resampling, [samples]."""

    change: float
    low: float
    high: float
    resampled: NDArray[np.float64]


def difference(
    base: Callable[[NDArray[np.intp]], float], tuned: Callable[[NDArray[np.intp]], float],
    count: int, *, samples: int, confidence: float, seed: int,
) -> Interval:  # fmt: skip
    """tuned - base over all sentences, with its confidence interval.

    base, tuned: a score of the sentences with these indices, of `count`.
    """
    everything = np.arange(count)
    generator = np.random.default_rng(seed)
    found = np.empty(samples)
    for i in range(samples):
        chosen = generator.integers(0, count, count)
        found[i] = tuned(chosen) - base(chosen)
    return _interval(tuned(everything) - base(everything), found, confidence)


def _interval(change: float, resampled: NDArray[np.float64], confidence: float) -> Interval:
    rest = (1 - confidence) / 2
    low, high = np.quantile(resampled, [rest, 1 - rest])
    return Interval(change, float(low), float(high), resampled)


class Means:
    """Mean gains in translation (chrF++ of directions) and reasoning (a task's first figure).

    In points of 100. Where a lower figure is a better one, a fall is a gain. Directions of as many
    sentences are resampled alike: a sentence is in all of them, or in none.
    """

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._found: dict[str, list[tuple[float, NDArray[np.float64] | None]]] = {}

    def add(
        self, kind: str, change: float, interval: Interval | None, *, falling: bool = False
    ) -> None:
        """A part's change. falling: a lower figure is a better one."""
        sign = -1 if falling else 1
        found = None if interval is None else sign * interval.resampled
        self._found.setdefault(kind, []).append((sign * change, found))

    def told(self) -> dict[str, dict[str, Any]]:
        """kind -> change, low, high, verdict: an interval where all its parts have one."""
        made: dict[str, dict[str, Any]] = {}
        for kind, parts in self._found.items():
            change = float(np.mean([c for c, _ in parts]))
            known = [found for _, found in parts if found is not None]
            made[kind] = {"change": change, "low": None, "high": None, "verdict": ""}
            if len(known) == len(parts):
                mean = _interval(change, np.mean(known, axis=0), self._confidence)
                said = judge(change, mean.low, mean.high)
                made[kind] |= {"low": mean.low, "high": mean.high, "verdict": said}
        return made


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
    kind: str, name: str, metric: str, base: float | None, tuned: float,
    interval: Interval | None,
    *, falling: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A line of the verdict. interval: of the change, or None where it has none.

    falling: a lower figure is a better one.
    """
    made: dict[str, Any] = {
        "kind": kind, "name": name, "metric": metric, "base": base, "tuned": tuned, "change": None,
        "low": None, "high": None, "verdict": "",
    }  # fmt: skip
    if base is not None:
        made["change"] = tuned - base
    if interval is not None:
        said = judge(interval.change, interval.low, interval.high, lower_is_better=falling)
        made |= {"change": interval.change, "low": interval.low, "high": interval.high}
        made["verdict"] = said
    return made


def summary(rows: Sequence[dict[str, Any]], means: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Changes by which `--fail-if` may ask: the means, and each row's own, in points of 100."""
    found = {kind: mean["change"] for kind, mean in means.items()}
    named = {f"{r['name']}:{r['metric']}": r["change"] for r in rows if r["change"] is not None}
    return found | named


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
    lines += [mean_line(kind, mean) for kind, mean in result["means"].items()]
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
    lines += [mean_line(kind, mean) for kind, mean in result["means"].items()]
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


def mean_line(kind: str, mean: dict[str, Any]) -> str:
    """A mean change in words."""
    what = "chrF++" if kind == "translation" else "points"
    line = f"{kind}: {mean['change']:+.2f} {what} on average"
    if mean["low"] is None:
        return line
    return f"{line} ({mean['low']:+.2f} to {mean['high']:+.2f}): {mean['verdict']}"


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
            axes.set_ylim(-0.6, len(mine) - 0.4)
            axes.set_yticks(range(len(mine)), [f"{r['name']}, {r['metric']}" for r in mine])
            axes.set_title(f"{kind}: change from the base", loc="left")
        axes = grid[0][0]
        for verdict in (v for v in colors if any(r["verdict"] == v for r in known)):
            axes.plot([], [], "o", color=colors[verdict], label=f"dot: the change, {verdict}")
        axes.plot([], [], color="#5c6b7a", linewidth=2, label="line: its interval")
        figure.legend(loc="outside lower left", ncols=4, frameon=False)
        write_picture(file, figure, dpi=130)
        plt.close(figure)
    return True
