"""Tables and pictures of a training benchmark, and its history over commits."""

import json
import statistics
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured on a GPU"
OURS, THEIRS, BUDGET = "#1f6f8b", "#b8c4cc", "#c8553d"
PART_COLORS = ("#e6e0d4", "#b4d3da", "#4a93a8", "#e0a458", "#1f4e5f", "#c8553d", "#8a8a8a")


def table(result: dict[str, Any]) -> str:
    """A row for each contestant, stage and mix."""
    lines = [
        "| stage | sequences | contestant | tokens/s | against tuned + Liger | step, s | peak GB"
        " (reserved) | share of the limit | computed / real tokens | J a 1000 tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    late = dict.fromkeys(r["contestant"] for r in result["rows"] if r["status"] == "not begun")
    for row in result["rows"]:
        if row["status"] == "not begun":
            continue
        head = f"| {row['stage']} ({row['layers']}) | {row['mix']} | {row['contestant']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']}: {row['why']} | | | | | | |")
            continue
        rival = best(result, row["stage"], row["mix"], "tuned + Liger")
        ratio = f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}x" if rival else "-"
        peak = row["peak"]
        memory = f"{peak['allocated'] / 1e9:.1f} ({peak['reserved'] / 1e9:.1f})" if peak else "-"
        if peak and row.get("planned"):
            memory += f"; planned {row['planned'] / 1e9:.1f}"
        share = f"{row['share']:.0%}" if "share" in row and not result["smoke"] else "-"
        seconds = statistics.median(row["seconds"])
        joules = row["joules"]
        padding = sum(row["computed"]) / sum(row["tokens"])
        energy = "-" if joules is None else f"{1e3 * joules / sum(row['tokens']):.0f}"
        lines.append(
            f"{head} {row['tokens_per_s']:,.0f} | {ratio} | {seconds:.2f} | {memory} | {share} |"
            f" {padding:.2f} | {energy} |"
        )
    lines += ["", note(result), ""]
    lines += [f"- {name}: {settings}." for name, settings in result["settings"].items()]
    if late:
        lines.append(f"- not measured, as the time was over: {'; '.join(late)}.")
    return "\n".join(lines)


def note(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    toy = (
        "A toy model, to prove the benchmark: its figures mean nothing. " if result["smoke"] else ""
    )
    limits = result["limits"]
    rates = f"The limit is {limits['bf16_flops'] / 1e12:.0f} TFLOP/s in bf16"
    if sustained := limits.get("bf16_flops_sustained"):
        rates += f" ({sustained / 1e12:.0f} when it goes on for seconds)"
    return (
        f"{toy}Qwen3-{result['model']} of random weights, {result['tokens_per_step']:,} tokens a"
        f" step, medians of {result['timed']} steps; real tokens, padding not counted."
        f" {rates}. {result['device']['name']}; {versions}; commit {result['commit']}."
    )


def best(result: dict[str, Any], stage: str, mix: str, name: str) -> dict[str, Any] | None:
    found = [
        r for r in result["rows"]
        if (r["stage"], r["mix"], r["contestant"], r["status"]) == (stage, mix, name, "ok")
    ]  # fmt: skip
    return found[0] if found else None


def section(result: dict[str, Any] | None) -> str:
    """What docs/performance.md says: the table, or that there is none."""
    if result is None or result["smoke"]:
        return f"Training steps against peers (`xplus-fast bench train`): {NOT_MEASURED}."
    return table(result)


def readme_section(result: dict[str, Any] | None) -> str:
    """What README.md says: the few columns that a user decides by."""
    if result is None or result["smoke"]:
        return section(result)
    lines = [
        "| trained | with | tokens/s | against tuned + Liger | peak GB | J a 1000 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["status"] != "ok" or row["mix"] != "pairs":
            continue
        rival = best(result, row["stage"], row["mix"], "tuned + Liger")
        ratio = f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}x" if rival else "-"
        energy = f"{1e3 * row['joules'] / sum(row['tokens']):.0f}" if row["joules"] else "-"
        lines.append(
            f"| {row['layers']} | {row['contestant']} | {row['tokens_per_s']:,.0f} | {ratio} |"
            f" {row['peak']['allocated'] / 1e9:.0f} | {energy} |"
        )
    return "\n".join([*lines, "", note(result)])


def draw(result: dict[str, Any], stem: Path) -> list[str]:
    """Bars of tokens/s and memory, and of where a step's time goes."""
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed"]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ran = [r for r in result["rows"] if r["status"] == "ok"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in ran:
        groups.setdefault((row["stage"], row["mix"]), []).append(row)
    if not groups:
        return ["no picture: nothing ran"]
    made = []
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    height = 0.9 + 0.27 * max(map(len, groups.values()))
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            len(groups), 3, figsize=(13, height * len(groups)), squeeze=False, layout="constrained"
        )
        for axes, ((stage, mix), rows) in zip(grid, groups.items(), strict=True):
            names = [r["contestant"] for r in rows][::-1]
            colors = [OURS if n.startswith("ours") else THEIRS for n in names]
            speed = [r["tokens_per_s"] for r in rows][::-1]
            axes[0].barh(names, speed, color=colors)
            axes[0].set_title(f"{stage}, {mix}: tokens/s", loc="left")
            memory = [(r["peak"] or {"allocated": 0})["allocated"] / 1e9 for r in rows][::-1]
            axes[1].barh(names, memory, color=colors)
            for i, row in enumerate(rows[::-1]):
                if row["budget"]:
                    axes[1].plot([row["budget"] / 1e9] * 2, [i - 0.45, i + 0.45], color=BUDGET)
            axes[1].set_title("peak memory, GB (red: its budget)", loc="left")
            left = [0.0] * len(rows)
            for part, color in zip(rows[0]["split"], PART_COLORS, strict=True):
                widths = [r["split"][part] for r in rows][::-1]
                axes[2].barh(names, widths, left=left, color=color, label=part)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axes[2].set_title("seconds of a step", loc="left")
            for i, (value, x, row) in enumerate(zip(speed, memory, rows[::-1], strict=True)):
                axes[0].text(value, i, f" {value:,.0f}", va="center", fontsize=8)
                right = max(x, (row["budget"] or 0) / 1e9)  # of the budget's line, too
                axes[1].text(right, i, f" {x:.1f}" if x else " no GPU", va="center", fontsize=8)
            for one in axes[:2]:  # room for the figures
                one.set_xlim(0, 1.15 * one.get_xlim()[1])
            for other in axes[1:]:
                other.set_yticks([])
        figure.legend(
            *grid[0][2].get_legend_handles_labels(), loc="outside lower right", frameon=False,
            fontsize=8, ncols=len(PART_COLORS),
        )  # fmt: skip
        path = stem.with_name(stem.name + ".png")
        figure.savefig(path, dpi=130)
        plt.close(figure)
        made.append(f"picture: {path}")
    return made


def history(folder: Path) -> list[dict[str, Any]]:
    """What compares with train.json, oldest first: itself and train-*.json, on the same card."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("train*.json"))]
    runs = sorted((r for r in found if not r["smoke"]), key=lambda r: r["time"])
    last = next((r for r in runs[::-1] if r["model"] == "8B"), None)
    return [r for r in runs if last and all(r[k] == last[k] for k in ("model", "device"))]


def draw_history(folder: Path, out: Path) -> list[str]:
    """Tokens/s of ours and of the best peer over commits, a line for each stage and mix."""
    runs = history(folder)
    if len(runs) < 2:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    kinds = sorted({(r["stage"], r["mix"]) for run in runs for r in run["rows"]})
    for i, (stage, mix) in enumerate(kinds):
        for name, line in (("ours, bf16", "-"), ("tuned + Liger", ":")):
            points = [
                (at, row["tokens_per_s"])
                for at, run in enumerate(runs)
                if (row := best(run, stage, mix, name)) is not None
            ]
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], line, marker="o",
                color=f"C{i}", label=f"{name}: {stage}, {mix}",
            )  # fmt: skip
    axes.set_title(f"tokens/s over commits, {runs[-1]['device']['name']}", loc="left")
    axes.set_xticks(range(len(runs)), [run["commit"] for run in runs])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return [f"picture: {out}"]
