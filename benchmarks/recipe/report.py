"""What the experiment says, of as many runs as there are: tables, sentences, a picture.

python -m benchmarks.recipe.report        (rewrites its sections of docs/recipe.md and README.md)
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import fill
from benchmarks.recipe.figures import (
    ABILITY,
    CHRF,
    PROSE,
    TRANSLATION,
    Key,
    Results,
    read,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/recipe.json"
BEGIN, END = "<!-- begin: benchmarks/results/recipe.json -->", "<!-- end: recipe -->"
COLORS = {
    "full": "#c8553d", "LoRA": "#8a6bb0", "two stages": "#1f6f8b", "top": "#3a9d6e",
    "bottom": "#c99a2e", "joint": "#5c6b7a",
}  # fmt: skip
VERDICTS = {
    "worse": "Forget, the interval excludes 0",
    "same": "Do not differ from the base by their interval",
    "better": "Answer more than the base",
}
SHARES = (0.5, 0.75)  # of the largest gain, at which all are compared


def table(result: dict[str, Any]) -> str:
    """Everything, as it stands in docs/recipe.md."""
    found, settings = read(result), result["settings"]
    if not found.curves:
        return "Not measured yet."
    parts = [
        _changes(found), _about(result, found), "", *_in_words(found), "",
        "Answers right, in points from the base, by task, with all of the change, of the hotter"
        " rate without replay:", "", _tasks(result, found), "", _asked(result), "",
        "Layers: " + "; ".join(f"{way}: {_layers(way, settings)}" for way in settings["layers"])
        + ".",
    ]  # fmt: skip
    return "\n".join(parts)


def summary(result: dict[str, Any]) -> str:
    """In short, as it stands in README.md: the hotter rate without replay."""
    found = read(result)
    if not found.curves:
        return "Not measured yet."
    lines = [
        "| trained | seeds | translation loss | chrF++ | right answers |",
        "|---|---|---|---|---|",
    ]
    for key in _hot(found):
        c = _full_change(found, key)
        lines.append(
            f"| {key[0]} | {found.seeds[key]} | {-c[TRANSLATION]['change']:+.2f} |"
            f" {c[CHRF]['change']:+.1f} | {_points(c[ABILITY])} |"
        )
    return "\n".join(lines)


def with_figures(file: Path, result: dict[str, Any]) -> str:
    """A document with its part between the markers. Raises ValueError where they are missing."""
    return fill(file.read_text(), BEGIN, DOCUMENTS[file](result), END)


def draw(result: dict[str, Any], file: Path) -> list[str]:
    """Curves over the scale of the change, translation against answers; returns what to say."""
    from matplotlib.figure import Figure

    found = read(result)
    panels = list(dict.fromkeys((rate, replay) for _, rate, replay in found.curves))
    figure = Figure(figsize=(5.4 * len(panels), 5), dpi=110, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (rate, replay) in zip(all_axes, panels, strict=True):
        for key in found.curves:
            if key[1:] == (rate, replay):
                _curve(axes, found, key)
        axes.annotate("the base", (0, 0), xytext=(6, -12), textcoords="offset points")
        axes.set_title(f"learning rate {rate:g}{', with replay' if replay else ''}", loc="left")
        axes.set_xlabel("right answers: change from the base, points")
        axes.axvline(0, color="#94a3ad", lw=0.8)
        axes.axhline(0, color="#94a3ad", lw=0.8)
        axes.grid(color="#e4e8ec", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    all_axes[0].set_ylabel("held-out translation: nats a token taken off the loss")
    figure.savefig(file)
    return [f"picture: {file}"]


def _curve(axes: Any, found: Results, key: Key) -> None:
    """From the base through the scales; the star has all of the change."""
    points = [c for _, p in sorted(found.curves[key].items()) if (c := found.changes(p))]
    x = [0.0, *(c[ABILITY]["change"] for c in points)]
    y = [0.0, *(c[TRANSLATION]["change"] for c in points)]
    color = COLORS[key[0]]
    ends = [[a - c[ABILITY]["low"] for a, c in zip(x[1:], points, strict=True)],
            [c[ABILITY]["high"] - a for a, c in zip(x[1:], points, strict=True)]]  # fmt: skip
    axes.plot(x, y, color=color, lw=1.2, label=f"{key[0]} ({_seeds(found.seeds[key])})")
    axes.errorbar(x[1:], y[1:], xerr=ends, fmt="o", ms=4, color=color, elinewidth=0.7)
    axes.plot(x[-1:], y[-1:], "*", ms=13, color=color)


def _changes(found: Results) -> str:
    most = found.most()
    heads = [f"answers at {share:.0%} of the largest gain" for share in SHARES]
    lines = [
        "| trained | rate | replay | seeds | translation loss | chrF++ | right answers |"
        f" prose loss | {' | '.join(heads)} |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(heads),
    ]
    for key in found.curves:
        c = _full_change(found, key)
        cells = [
            key[0], f"{key[1]:g}", "20 %" if key[2] else "-", str(found.seeds[key]),
            _rise(c[TRANSLATION]), _points(c[CHRF]), _bold(c[ABILITY]), _rise(c[PROSE]),
        ]  # fmt: skip
        for share in SHARES:
            point = found.at_gain(key, share * most)
            cells.append("not reached" if point is None else _points(found.changes(point)[ABILITY]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _about(result: dict[str, Any], found: Results) -> str:
    settings, base = result["settings"], found.base
    size, done = settings["size"], len(result["runs"]) - 1
    loss = ", ".join(f"{t} {base.loss[t].sum() / n.sum():.2f}" for t, n in found.tokens.items())
    asked = sum(map(len, base.hits.values()))
    right = sum(h.mean() for h in base.hits.values()) / len(base.hits)
    return (
        f"\n{done} of {result['planned']} runs. Changes from the base, with 95 % intervals (paired"
        " bootstrap over sentences and questions, means of the seeds; other seeds may differ by"
        f" more than they say). The base: loss {loss}; {right:.0%} of {asked} answers right, the"
        f" mean of {len(base.hits)} tasks. {settings['steps']} steps of at most"
        f" {settings['tokens']} tokens each; the rate's cosine ends at a tenth of it. Held out:"
        f" {size['heldout']} sentences a direction. The largest gain in loss is"
        f" {found.most():.2f}; answers at a share of it are read off a run's curve over the scale"
        f" of its change, between two points in proportion. {result['device']['name']},"
        f" {result['device'].get('threads', 1)} thread, bf16 with fp32 masters; torch"
        f" {result['versions']['torch']}."
    )


def _in_words(found: Results) -> list[str]:
    """What the intervals say, and who is ahead at equal gain."""
    changes = {key: _full_change(found, key)[ABILITY] for key in found.curves}
    lines = []
    for verdict, words in VERDICTS.items():
        names = [
            f"{_name(k)} {c['change']:+.1f}" for k, c in changes.items() if c["verdict"] == verdict
        ]
        if names:
            lines.append(f"- {words}: {'; '.join(names)}.")
    for share in SHARES:
        at = {k: p for k in found.curves if (p := found.at_gain(k, share * found.most()))}
        kept = {k: found.changes(p)[ABILITY]["change"] for k, p in at.items()}
        if len(kept) > 1:
            order = sorted(kept, key=lambda k: -kept[k])
            lines.append(
                f"- At {share:.0%} of the largest gain, from most to least kept:"
                f" {'; '.join(f'{_name(k)} {kept[k]:+.1f}' for k in order)}."
            )
    for key, seeds in found.single.items():
        if len(seeds) > 1:
            each = ", ".join(f"{found.changes(p)[ABILITY]['change']:+.1f}" for p in seeds)
            lines.append(f"- Seeds of {_name(key)} apart: {each}.")
    return lines


def _tasks(result: dict[str, Any], found: Results) -> str:
    keys, asked = _hot(found), result["tasks"]
    lines = [
        f"| task | base | {' | '.join(k[0] for k in keys)} |",
        "|---|---|" + "---|" * len(keys),
    ]
    for task in asked:
        base = 100 * found.base.hits[task].mean()
        cells = [f"{100 * found.curves[k][1.0].hits[task].mean() - base:+.0f}" for k in keys]
        lines.append(f"| {task} | {base:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def _asked(result: dict[str, Any]) -> str:
    hits = result["runs"]["base"]["hits"]
    left = [f"{task} {h.count('1') / len(h):.0%}" for task, h in hits.items()
            if task not in result["tasks"]]  # fmt: skip
    if not left:
        return "The base solves at least half of every task."
    return f"Not asked, as the base solves less than half: {', '.join(left)}."


def _hot(found: Results) -> list[Key]:
    rate = max(key[1] for key in found.curves)
    return [key for key in found.curves if key[1:] == (rate, False)]


def _name(key: Key) -> str:
    return f"{key[0]} at {key[1]:g}{' with replay' if key[2] else ''}"


def _full_change(found: Results, key: Key) -> dict[str, dict[str, Any]]:
    return found.changes(found.curves[key][1.0])


def _points(mean: dict[str, Any]) -> str:
    return f"{mean['change']:+.1f} ({mean['low']:+.1f} to {mean['high']:+.1f})"


def _bold(mean: dict[str, Any]) -> str:
    return f"**{_points(mean)}**" if mean["verdict"] == "worse" else _points(mean)


def _rise(mean: dict[str, Any]) -> str:
    """Of a loss: what was taken off is a fall."""
    return f"{-mean['change']:+.2f} ({-mean['high']:+.2f} to {-mean['low']:+.2f})"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n > 1)}"


def _layers(way: str, settings: dict[str, Any]) -> str:
    if way == "full":
        return "all, embedding, norm"
    if way == "LoRA":
        return "rank 64 on all linear layers"
    return ", then ".join(f"`{stage}`" for stage in settings["layers"][way])


DOCUMENTS = {ROOT / "docs/recipe.md": table, ROOT / "README.md": summary}


def main() -> int:
    result = json.loads(RESULTS.read_text())
    for document in DOCUMENTS:
        document.write_text(with_figures(document, result))
        print(f"written to {document}")
    print("\n".join(draw(result, RESULTS.with_suffix(".png"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
