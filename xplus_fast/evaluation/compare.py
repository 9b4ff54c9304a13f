"""`xplus-fast compare RUN RUN ...`: several runs in one table and one picture.

Each has been evaluated with the same questions against the same base; nothing is computed anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.evaluation import front
from xplus_fast.evaluation.curve import curve_of, points_of
from xplus_fast.evaluation.front import Point
from xplus_fast.files import make_folder, write_json, write_text


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put the curves of runs side by side; returns what comparison.json holds.

    folders: of runs that were evaluated with --scales, or of those evaluations. out: for
    comparison.json, .csv, .md and .png.
    Raises `UserError` for runs that are not comparable.
    """
    if len(folders) < 2:
        raise UserError("compare: at least two runs are wanted")
    curves = dict(zip(_names(folders), map(curve_of, folders), strict=True))
    first = next(iter(curves))
    for name, curve in curves.items():
        if curve["measured"] != curves[first]["measured"]:
            raise UserError(
                f"compare: {name} and {first} were not asked the same, or have another base:"
                " evaluate both with one recipe"
            )
    points = [point for name, curve in curves.items() for point in points_of(curve, name)]
    bases = [p for p in points if is_base(p)]  # one and the same: once is enough
    points = [p for p in points if not is_base(p) or p is bases[0]]
    labelled = [Point(f"{p.run} at {p.label}", p.run, p.means) for p in points]
    best = front.chosen(labelled)
    result = {
        "runs": {name: {"run": c["run"], **c["about"]} for name, c in curves.items()},
        "points": front.rows(points),
        "words": front.in_words(labelled),
        "front": [p.label for p in front.front(labelled)],
        "chosen": None if best is None else best.label,
    }
    make_folder(out)
    write_json(out / "comparison.json", result)
    front.write_csv(points, out / "comparison.csv")
    lines = ["# Runs side by side", "", *front.in_words(labelled), ""]
    lines += [front.table(points, {name: c["about"] for name, c in curves.items()}), ""]
    if front.measured_kinds(points):
        front.draw(points, out / "comparison.png")
        lines += ["![translation against reasoning](comparison.png)", ""]
    write_text(out / "comparison.md", "\n".join(lines) + "\n")
    return result


def is_base(point: Point) -> bool:
    """Whether nothing of the change is in it."""
    return all(float(part.rpartition("=")[2]) == 0 for part in point.label.split(",")) and (
        "=" not in point.label
    )


def describe(out: Path, result: dict[str, Any]) -> str:
    """For the terminal."""
    rows = [{k: _shown(v) for k, v in row.items()} for row in result["points"]]
    heads = [k for k in rows[0] if not k.endswith((" low", " high"))]
    widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in heads}
    lines = ["  ".join(k.ljust(widths[k]) for k in heads)]
    lines += ["  ".join(row[k].ljust(widths[k]) for k in heads) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), *result["words"],
                      f"read {out / 'comparison.md'}"])  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:+.2f}" if isinstance(value, float) else str(value or "")


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as tells them apart; `UserError` for one given twice."""
    if len(set(folders)) != len(folders):
        raise UserError("compare: a run is named twice")
    most = max(len(folder.parts) for folder in folders)
    for n in range(1, most + 1):
        names = ["/".join(folder.parts[-n:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
