"""Translation against reasoning: which of several results are worth having, and what more costs.

A point is a model, measured against the base: its label, its run, and the mean changes of both
with their intervals (`verdict.Means`). On the front is a point to which no other is preferable,
being better in one and at least as good in the other.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xplus_fast.evaluation.verdict import judge
from xplus_fast.files import write_picture, write_text

KINDS = ("translation", "reasoning")
UNITS = {"translation": "chrF++", "reasoning": "points of reasoning"}


@dataclass(frozen=True)
class Point:
    """A result: what it is called, of which run, and its mean changes by kind."""

    label: str
    run: str
    means: dict[str, dict[str, Any]]

    def change(self, kind: str) -> float:
        return self.means[kind]["change"]

    def lost(self) -> bool:
        """Whether reasoning is worse than the base's, by its interval, or, without one, at all."""
        mean = self.means["reasoning"]
        said = mean["verdict"] or judge(mean["change"], mean["change"], mean["change"])
        return said == "worse"


def measured_kinds(points: Sequence[Point]) -> list[str]:
    """The kinds that every point has."""
    return [kind for kind in KINDS if all(kind in p.means for p in points)]


def front(points: Sequence[Point]) -> list[Point]:
    """Those to which no other is preferable, by falling translation."""
    kinds = measured_kinds(points)
    if len(kinds) < 2:
        return []

    def beaten(p: Point, by: Point) -> bool:
        pairs = [(p.change(kind), by.change(kind)) for kind in kinds]
        return all(b >= a for a, b in pairs) and any(b > a for a, b in pairs)

    kept = [p for p in points if not any(beaten(p, other) for other in points)]
    return sorted(kept, key=lambda p: -p.change("translation"))


def chosen(points: Sequence[Point]) -> Point | None:
    """The largest gain in translation whose reasoning is the same as the base's, or better."""
    if len(measured_kinds(points)) < 2:
        return None
    kept = [p for p in points if not p.lost() and p.change("translation") > 0]
    return max(kept, key=lambda p: p.change("translation"), default=None)


def in_words(points: Sequence[Point]) -> list[str]:
    """What to choose, and what one more point of translation costs."""
    if len(measured_kinds(points)) < 2:
        return []
    best, kept = chosen(points), front(points)
    if best is None:
        return ["no point gains in translation without losing in reasoning"]
    lines = [
        f"{best.label}: {_of(best, 'translation')}, {_of(best, 'reasoning')}:"
        " the largest gain whose reasoning is the same"
    ]
    more = [p for p in kept if p.change("translation") > best.change("translation")]
    if not more:
        return [*lines, "no point that was measured has more"]
    next_ = more[-1]
    gain = next_.change("translation") - best.change("translation")
    cost = best.change("reasoning") - next_.change("reasoning")
    return [
        *lines,
        f"one more chrF++ costs {cost / gain:.2f} points of reasoning (on the way to {next_.label}:"
        f" {_of(next_, 'translation')}, {_of(next_, 'reasoning')})",
    ]


def _of(point: Point, kind: str) -> str:
    return f"{kind} {interval(point.means[kind])}"


def interval(mean: dict[str, Any]) -> str:
    """ "+1.20 (+0.80 to +1.60)" """
    text = f"{mean['change']:+.2f}"
    return text if mean["low"] is None else f"{text} ({mean['low']:+.2f} to {mean['high']:+.2f})"


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Table of the points: label, run, each kind's change, ends and verdict, and the front."""
    kept, found = front(points), []
    for p in points:
        row: dict[str, Any] = {"run": p.run, "point": p.label}
        for kind in measured_kinds(points):
            row |= {f"{kind} {key}" if key != "change" else kind: value
                    for key, value in p.means[kind].items()}  # fmt: skip
        found.append({**row, "front": p in kept})
    return found


def table(points: Sequence[Point], about: dict[str, dict[str, str]] | None = None) -> str:
    """In Markdown. about: of each run, what else is told of it, by column."""
    kinds, kept = measured_kinds(points), front(points)
    told = list(next(iter((about or {"": {}}).values())))
    heads = [*(["run", *told] if about else []), "point", *kinds, *(["front"] if kept else [])]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for p in points:
        cells = [p.run, *(about[p.run][column] for column in told)] if about else []
        cells.append(p.label)
        for kind in kinds:
            cells.append(f"{interval(p.means[kind])} {p.means[kind]['verdict']}".strip())
        cells += ["yes" if p in kept else ""] if kept else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(points: Sequence[Point], file: Path) -> None:
    found = rows(points)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]))
    writer.writeheader()
    writer.writerows(found)
    write_text(file, text.getvalue())


def draw(points: Sequence[Point], file: Path) -> None:
    """Reasoning to the right, translation upwards, intervals, the base at 0, the front in one line.

    Where one of the two was not measured: the other, point by point.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds, kept, best = measured_kinds(points), front(points), chosen(points)
    runs = list(dict.fromkeys(p.run for p in points))
    colors = dict(zip(runs, (f"C{i}" for i in range(len(runs))), strict=True))
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        for i, p in enumerate(points):
            x: dict[str, Any] = {"change": i, "low": None}
            x = p.means["reasoning"] if len(kinds) == 2 else x
            y = p.means[kinds[0]]
            axes.errorbar(
                [x["change"]], [y["change"]], xerr=_ends(x), yerr=_ends(y), fmt="o",
                color=colors[p.run], elinewidth=0.8, markersize=9 if p is best else 5,
                label=p.run if runs.index(p.run) not in _labelled(axes, runs) else None,
            )  # fmt: skip
            axes.annotate(
                p.label + (" (chosen)" if p is best else ""), (x["change"], y["change"]),
                xytext=(5, 5), textcoords="offset points",
            )  # fmt: skip
        axes.axhline(0, color="#94a3ad", linewidth=0.8)
        if len(kinds) == 2:
            axes.axvline(0, color="#94a3ad", linewidth=0.8)
            axes.annotate("the base", (0, 0), xytext=(5, -12), textcoords="offset points",
                          color="#5c6b7a")  # fmt: skip
            xs, ys = ([p.change(kind) for p in kept] for kind in ("reasoning", "translation"))
            axes.plot(xs, ys, color="#5c6b7a", linewidth=1, linestyle="--", zorder=0,
                      label="front: no other point is preferable")  # fmt: skip
            axes.set_xlabel("reasoning: change from the base, points (right is better)")
        else:
            axes.set_xticks(range(len(points)), [p.label for p in points])
        axes.set_ylabel(f"{kinds[0]}: change from the base, {UNITS[kinds[0]]} (up is better)")
        if any(_ends(p.means[kind]) for p in points for kind in kinds):
            axes.plot([], [], color="#5c6b7a", linewidth=0.8, label="bars: intervals")
        axes.legend(frameon=False, fontsize=8)
        write_picture(file, figure, dpi=130)
        plt.close(figure)


def _labelled(axes: Any, runs: list[str]) -> set[int]:
    """Which runs the legend has already."""
    return {runs.index(name) for name in axes.get_legend_handles_labels()[1] if name in runs}


def _ends(mean: dict[str, Any]) -> list[list[float]] | None:
    """An interval's ends as distances, as matplotlib wants them."""
    if mean["low"] is None:
        return None
    return [[max(0.0, mean["change"] - mean["low"])], [max(0.0, mean["high"] - mean["change"])]]
