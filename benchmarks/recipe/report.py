"""What a run of the experiment says: a table, and translation gained against retention.

python -m benchmarks.recipe.report        (rewrites its sections of docs/recipe.md and README.md)
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.environment import fill

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/recipe.json"
BEGIN, END = "<!-- begin: benchmarks/results/recipe.json -->", "<!-- end: recipe -->"
COLORS = {"layers": "#1f6f8b", "full": "#c8553d", "lora": "#8a6bb0"}
PLAIN = "#5c6b7a"


def table(result: dict[str, Any]) -> str:
    """The figures as they stand in the documents."""
    base = result["base"]
    tags = sorted(base["loss"])
    settings = result["settings"]
    lines = [
        "| trained | parameters | "
        + " | ".join(f"loss {tag}" for tag in tags)
        + " | "
        + " | ".join(f"chrF++ {tag}" for tag in tags)
        + " | retention loss |",
        "|---|---" + "|---" * (2 * len(tags)) + "|---|",
        _row("nothing", base, base, tags, "-"),
    ]
    for name, found in result["variants"].items():
        label = f"{name}: {_layers(settings['variants'][name], settings['rank'])}"
        if found["status"] != "ok":
            cells = " | ".join(["-"] * (2 * len(tags) + 1))
            lines.append(f"| {label} | {found['status']} | {cells} |")
            continue
        count = f"{found['trained_parameters'] / 1e6:.1f} M"
        lines.append(_row(label, found, base, tags, count))
    missing = [name for name in settings["variants"] if name not in result["variants"]]
    rest = " - |" * (2 * len(tags) + 1)
    lines += [f"| {name} | not measured |{rest}" for name in missing]
    held = ", ".join(f"{tag} {n}" for tag, n in sorted(settings["heldout"].items()))
    lines += [
        "",
        f"{settings['steps']} steps each, on the same {settings['rows']} packed rows"
        f" ({settings['tokens']:,} tokens, {settings['supervised']:,} supervised), every row"
        f" seen {settings['steps'] / settings['rows']:.3g} times; learning rate"
        f" {settings['learning_rate']:g} to {settings['min_learning_rate']:g} for all. Held out:"
        f" {held} sentences. Loss in nats per token; chrF++ with its 95 % interval over the"
        " sentences. One run of each, one seed."
        f" {result['device']['name']}, {result['device'].get('threads', 1)} threads, fp32; torch"
        f" {result['versions']['torch']}.",
    ]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """The same, in short, as it stands in README.md."""
    lines = [
        "| trained | held-out translation loss | chrF++ | retention loss |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {-loss:+.1%} | {chrf:+.1f} | {kept:+.2%} |"
        for name, (loss, chrf, kept) in gains(result).items()
    ]
    return "\n".join(lines)


def gains(result: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """name -> translation loss taken off (share), chrF++ points won, retention loss added (share).

    Loss and chrF++ are means over the directions.
    """
    base = result["base"]
    loss, chrf = fmean(base["loss"].values()), fmean(base["chrf"].values())
    return {
        name: (
            1 - fmean(found["loss"].values()) / loss,
            fmean(found["chrf"].values()) - chrf,
            found["retention"]["loss"] / base["retention"]["loss"] - 1,
        )
        for name, found in result["variants"].items()
        if found["status"] == "ok"
    }


def with_figures(file: Path, result: dict[str, Any]) -> str:
    """A document with its part between the markers. Raises ValueError where they are missing."""
    return fill(file.read_text(), BEGIN, DOCUMENTS[file](result), END)


def draw(result: dict[str, Any], file: Path) -> list[str]:
    """Translation gained against retention lost, by loss and by chrF++; returns what to say."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    points = gains(result)
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, column, title in (
        (left, 0, "held-out translation loss taken off, mean of the directions"),
        (right, 1, "chrF++ points won, mean of the directions"),
    ):
        axes.scatter([0], [0], s=40, color=PLAIN)
        axes.annotate("base", (0, 0), xytext=(6, -11), textcoords="offset points", color=PLAIN)
        for name, point in points.items():
            color = COLORS[result["settings"]["variants"][name]["kind"]]
            star = name == "two stages"
            # the leftmost name stands on the left of its point, where none can be
            right_of = point[2] > min(p[2] for p in points.values())
            axes.scatter(
                [point[2]], [point[column]], s=150 if star else 46, color=color,
                marker="*" if star else "o", zorder=3,
            )  # fmt: skip
            axes.annotate(
                name, (point[2], point[column]), xytext=(7 if right_of else -7, 4),
                textcoords="offset points", ha="left" if right_of else "right",
                fontsize=9, color=color,
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("retention loss added (right of the dotted line: forgotten)")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.axvline(0, color=PLAIN, lw=0.8, ls=(0, (2, 3)))
        axes.margins(x=0.18, y=0.12)
        axes.grid(color="#e4e8ec", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(file)
    return [f"picture: {file}"]


DOCUMENTS = {ROOT / "docs/recipe.md": table, ROOT / "README.md": summary}


def _row(
    label: str, found: dict[str, Any], base: dict[str, Any], tags: list[str], count: str
) -> str:
    kept = found["retention"]["loss"]
    change = "" if found is base else f" ({kept / base['retention']['loss'] - 1:+.1%})"
    cells = [f"{found['loss'][tag]:.3f}" for tag in tags]
    for tag in tags:
        low, high = found["chrf_interval"][tag]
        cells.append(f"{found['chrf'][tag]:.1f} ({low:.1f} to {high:.1f})")
    return f"| {label} | {count} | {' | '.join(cells)} | {kept:.3f}{change} |"


def _layers(way: dict[str, Any], rank: int) -> str:
    if way["kind"] == "lora":
        return f"rank {rank}, all linear layers"
    if way["kind"] == "full":
        return "all layers, embedding, norm"
    return ", then ".join(f"`{stage}`" for stage in way["stages"])


def main() -> int:
    result = json.loads(RESULTS.read_text())
    for document in DOCUMENTS:
        document.write_text(with_figures(document, result))
        print(f"written to {document}")
    print("\n".join(draw(result, RESULTS.with_suffix(".png"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
