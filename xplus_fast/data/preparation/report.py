"""report.md and its pictures: what went where, and twenty examples of every reason."""

from pathlib import Path
from typing import Any

from xplus_fast.data.languages import language_name
from xplus_fast.data.preparation.parts import EDGES
from xplus_fast.data.splits import some
from xplus_fast.files import write_picture, write_text

COLORS = ("#2b6f86", "#c8553d", "#e0a458", "#e9d8a6", "#b4d3da", "#7bb4c2", "#94a3ad")


def write_report(out: Path, manifest: dict[str, Any]) -> None:
    """`manifest` is what manifest.json will hold."""
    pictures = _draw(out, manifest)
    write_text(out / "report.md", _text(manifest, pictures))


def funnel(counts: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """Language pair -> (step, pairs left), widest first."""
    stages = [("read", counts["input"]), *counts["steps"].items()]
    pairs = sorted(counts["input"], key=lambda p: -counts["input"][p])
    return {pair: [(step, left.get(pair, 0)) for step, left in stages] for pair in pairs}


def _text(manifest: dict[str, Any], pictures: list[str]) -> str:
    counts = manifest["counts"]
    total = sum(d["conversations"] for d in counts["balance"].values())
    tokens = sum(d["tokens"] for d in counts["balance"].values())
    lines = [
        "# Data preparation", "",
        f"{total:,} conversations, about {tokens / 1e6:,.1f} M tokens, in"
        f" {len(manifest['shards'])} files.", "",
        *(f"![{p}]({p})" for p in pictures), "",
        "## Pairs left after each step", "",
    ]  # fmt: skip
    stages = funnel(counts)
    steps = [step for step, _ in next(iter(stages.values()))]
    lines += ["| pair | " + " | ".join(steps) + " |", "|---|" + "---|" * len(steps)]
    for pair, left in stages.items():
        lines.append(f"| {_name(pair)} | " + " | ".join(f"{n:,}" for _, n in left) + " |")
    lines += [
        "", "## Balance", "", "| direction | there are tokens | taken | conversations |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for direction, d in sorted(counts["balance"].items(), key=lambda x: -x[1]["tokens"]):
        taken = d["tokens"] / d["available"] if d["available"] else 0
        lines.append(
            f"| {_name(direction)} | {d['available']:,} | {d['tokens']:,} ({taken:.0%}) |"
            f" {d['conversations']:,} |"
        )
    lines += ["", "## Sources", "", "| corpus | pairs | files |", "|---|---|---|"]
    for source in manifest["sources"]:
        files = ", ".join(Path(f["path"]).name for f in source["files"][:3]) or "from the hub"
        lines.append(f"| {source['name']} | {counts['read'].get(source['name'], 0):,} | {files} |")
    for source in manifest["sources"]:
        if unread := [Path(path).name for path in source.get("left", [])]:
            lines.append(f"\n{source['name']}: its folder has more, not read: {some(unread)}.")
    for what, n in manifest["quarantined"].items():
        lines.append(f"\n{n:,} not read: {what}. They are in quarantine.jsonl.")
    sets = manifest["evaluation"]
    lines += ["", "## Evaluation sets held out", ""]
    lines.append(f"{len(sets)} files." if sets else "None were found: `evaluation.flores`.")
    lines += ["", "## What was rejected", ""]
    for reason, note in sorted(
        counts["rejects"].items(), key=lambda item: -sum(item[1]["pairs"].values())
    ):
        most = sorted(note["pairs"].items(), key=lambda x: -x[1])[:5]
        where = ", ".join(f"{pair} {n:,}" for pair, n in most)
        lines += [f"### {reason}: {sum(note['pairs'].values()):,}", "", f"{where}", "",
                  "| source | target | |", "|---|---|---|"]  # fmt: skip
        lines += [
            f"| {_cell(source)} | {_cell(target)} | {_cell(detail or '')} |"
            for _, _, source, target, detail in note["samples"]
        ]
        lines.append("")
    return "\n".join(lines) + "\n"


def _name(direction: str) -> str:
    a, b = direction.split("-")
    return f"{language_name(a)} - {language_name(b)}"


def _cell(text: str) -> str:
    """Shown as it is, whatever it is: most samples are markup or worse."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    for character in "|[*_`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _draw(out: Path, manifest: dict[str, Any]) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = manifest["counts"]
    stages = funnel(counts)
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 1.4 + 0.34 * len(stages)), layout="constrained")
        names = list(stages)[::-1]
        steps = [step for step, _ in next(iter(stages.values()))]
        labels = [*(f"lost in {step}" for step in steps[1:]), "stay"]
        for i, label in enumerate(labels):
            # of each bar the next one hides all but what the next step took
            shares = [stages[n][i][1] / max(1, stages[n][0][1]) for n in names]
            color = COLORS[0] if label == "stay" else COLORS[1:][i % (len(COLORS) - 1)]
            axes.barh(names, shares, color=color, label=label)
        for y, name in enumerate(names):
            axes.text(1.01, y, f"{stages[name][-1][1]:,} of {stages[name][0][1]:,}", va="center")
        axes.set_xlim(0, 1.0)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set_title("pairs left after each step", loc="left")
        axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=9)
        write_picture(out / "funnel.png", figure, dpi=130)
        plt.close(figure)

        lengths = counts["lengths"]
        columns = 4
        rows = -(-len(lengths) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(10, 1.7 * rows), squeeze=False, layout="constrained",
            sharex=True,
        )  # fmt: skip
        labels = [f"<{EDGES[0]}", *(f"{edge}" for edge in EDGES)]
        for axes, (code, bins) in zip(grid.flat, sorted(lengths.items()), strict=False):
            axes.bar(range(len(bins)), bins, color=COLORS[0])
            axes.set_title(language_name(code), loc="left", fontsize=10)
            axes.set_xticks(range(len(bins)), labels, rotation=60, fontsize=7)
            axes.set_yticks([])
        for axes in list(grid.flat)[len(lengths) :]:
            axes.set_visible(False)
        figure.supxlabel("characters of a text, from the figure on", fontsize=9)
        write_picture(out / "lengths.png", figure, dpi=130)
        plt.close(figure)
    return ["funnel.png", "lengths.png"]
