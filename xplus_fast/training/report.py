"""A finished run's report: report.md, report.html, loss.png and quality.png, from its files."""

import re
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from xplus_fast.data.corpus_text import describe
from xplus_fast.files import write_picture, write_text
from xplus_fast.progress import duration, si
from xplus_fast.training import report_html, watch
from xplus_fast.training.report_data import (
    RETENTION,
    Measured,
    Row,
    Steps,
    number,
    percent,
    points,
    read_run,
    smooth,
    span,
)

_SUMMARY_ROWS = 8  # directions that the terminal shows one by one
LOSS_SPAN, CHRF_SPAN = 0.2, 10.0  # of the axes at least: a share of the highest loss; points
_BEFORE, _AFTER = "#9a9a9a", "#0072b2"
_STAGES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # told apart by colour-blind readers too


def write_report(run: Path) -> str:
    """Write report.md, report.html, loss.png and, where there is something to compare, quality.png.

    Returns the few lines that the command line prints in the end. Raises `UserError` for a folder
    that is no finished run, or a file in it that cannot be read.
    """
    found = read_run(run)
    steps, about, measured, rows = found.steps, found.about, found.measured, found.rows
    _draw_loss(steps, run / "loss.png")
    pictures = ["loss.png"]
    if compared := bool(rows) and len(measured) > 1:
        _draw_quality(rows, list(measured), run / "quality.png")
        pictures.append("quality.png")
    parts = [
        "# What this run did",
        _before_after(rows, measured),
        "![held-out loss and chrF++ before and after](quality.png)" if compared else "",
        "## What changed",
        _changed(about),
        "## Training",
        "![training loss and learning rate](loss.png)",
        _training(steps, about),
        watch.section(run, [*steps]),
        "## Data",
        *_data(about["stages"]),
        _samples(measured),
        "## How to run it again",
        "`xplus-fast train recipe.yaml`, with this recipe:",
        _fenced(found.recipe, "yaml"),
        _table(["software", "version"], [list(pair) for pair in about["versions"].items()]),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(run / "report.md", text)
    write_text(run / report_html.NAME, report_html.page(found))
    where = ", ".join(str(run / name) for name in pictures)
    reports = ", ".join(str(run / name) for name in ("report.md", report_html.NAME))
    return "\n".join([*_summary(rows), f"report    {reports}", f"pictures  {where}"])


def _before_after(rows: list[Row], measured: Measured) -> str:
    if not rows:
        return "Nothing was held out: `data.heldout` and `data.retention` were not set."
    with_chrf = any(x is not None for _, _, chrf in rows for x in chrf)
    header = ["", *(f"loss {label}" for label in measured), "change"]
    header += [*(f"chrF++ {label}" for label in measured), "change"] if with_chrf else []
    table = []
    for name, loss, chrf in rows:
        cells = [name, *(number(x, 3) for x in loss), percent(loss)]
        cells += [*(number(x, 1) for x in chrf), points(chrf)] if with_chrf else []
        table.append(cells)
    notes = ["Loss: nats per supervised token of held-out examples, lower is better."]
    if with_chrf:
        notes[0] += " chrF++: 0 to 100, higher is better."
    if rows[-1][0] == RETENTION:
        notes[0] += f" {RETENTION.capitalize()}: its loss should not move."
    if len(measured) == 1:
        notes.append(f"Measured {', '.join(map(_escape, measured))} only: nothing to compare with.")
    for label, value in measured.items():
        off = [
            f"{tag} {n['empty']} empty, {n['truncated']} cut at the token limit"
            + (f", {n['thoughts']} with a think block, not scored" if "thoughts" in n else "")
            for tag, n in value["off_length"].items()
            if any(n.values())
        ]
        notes += [_escape(f"Translations {label}: {'; '.join(off)}.")] if off else []
    for signature in sorted({v["signature"] for v in measured.values() if v["signature"]}):
        notes.append(f"sacrebleu: {_escape(signature)}")
    return "\n\n".join([_table(header, table), *notes])


def _changed(about: dict[str, Any]) -> str:
    table, names = [], []
    for stage in about["stages"]:
        trained, total = stage["trained_parameters"], stage["total_parameters"]
        table.append(
            [
                stage["name"],
                _ranges(stage["layers"]) or "none",
                ", ".join(stage["also"]) or "nothing",
                f"{si(trained)} of {si(total)}",
                f"{100 * trained / total:.1f} %",
                str(len(stage["tensors"])),
            ]
        )
        counts: dict[str, int] = {}  # tensors of one kind, over the layers
        for name in stage["tensors"]:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            counts[kind] = counts.get(kind, 0) + 1
        names.append(stage["name"] + ":")
        names += [f"  {kind}" + (f"  x {n}" if n > 1 else "") for kind, n in counts.items()]
    header = ["stage", "layers", "beside them", "parameters trained", "share", "tensors"]
    return (
        f"{_table(header, table)}\n\nEvery other tensor was frozen.\n\n"
        "<details><summary>Names of the trained tensors</summary>\n\n"
        f"{_fenced(chr(10).join(names), 'text')}\n\n</details>"
    )


def _training(steps: Steps, about: dict[str, Any]) -> str:
    header, columns = [""], []
    for stage, lines in steps.items():

        def of(key: str, lines: list[dict[str, Any]] = lines) -> list[float]:
            return [line[key] for line in lines if line[key] is not None]

        loss, mfu, memory = of("loss"), of("mfu"), of("memory_bytes")
        tokens, computed = of("tokens"), of("tokens_computed")
        once = f"{si(sum(computed))} computed, " if computed != tokens else ""
        end = max(1, len(lines) // 20)  # the loss of one step says little
        header.append(stage)
        columns.append(
            [
                str(len(lines)),
                f"{fmean(loss[:end]):.3f} -> {fmean(loss[-end:]):.3f}",
                f"{si(sum(tokens))}, {once}{si(sum(of('supervised')))} of them supervised",
                si(median(of("tokens_per_second"))),
                f"{100 * median(mfu):.1f} %" if mfu else "unknown",
                f"{max(memory) / 1e9:.2f} GB" if memory else "unknown",
                duration(sum(of("seconds"))),
            ]
        )
    names = [
        "steps",
        "training loss, first -> last 5 % of the steps",
        "tokens",
        "tokens/s, median",
        "MFU, median",
        "peak memory",
        "time in steps",
    ]
    table = [list(row) for row in zip(names, *columns, strict=True)]
    sources = dict.fromkeys(
        k for lines in steps.values() for k in lines[-1] if k.startswith("loss/")
    )
    rows = []
    for key in sources:
        cells = []
        for lines in steps.values():
            of_source = [line[key] for line in lines if key in line]
            end = max(1, len(of_source) // 20)
            first, last = of_source[:end], of_source[-end:]
            cells.append(f"{fmean(first):.3f} -> {fmean(last):.3f}" if of_source else "-")
        rows.append([f"the same of {_escape(key.removeprefix('loss/'))}", *cells])
    table[2:2] = rows
    where = f"{_escape(about['device'])}, {_escape(about['dtype'])}"
    return f"{_table(header, table)}\n\n{where}; {duration(about['seconds'])} in all."


def _samples(measured: Measured) -> str:
    """Every sample once, with what each measurement's model made of it."""
    outputs: dict[tuple[str, str, str], dict[str, str]] = {}
    for label, value in measured.items():
        for tag, samples in value["samples"].items():
            for s in samples:
                outputs.setdefault((tag, s["source"], s["reference"]), {})[label] = s["output"]
    parts, last = [], ""
    for (tag, source, reference), by_label in outputs.items():
        parts += [f"### {_escape(tag)}"] if tag != last else []
        last = tag
        rows = [["reference", reference], *([k, v or "(empty)"] for k, v in by_label.items())]
        parts.append(_table(["source", source], rows))
    return "\n\n".join(["## Translations", *parts]) if parts else ""


def _summary(rows: list[Row]) -> list[str]:
    """Before -> after for the terminal; of many directions the mean only."""
    if not rows:
        return ["nothing was held out: data.heldout and data.retention were not set"]
    if len(rows) > _SUMMARY_ROWS + 2:  # the mean and retention come last
        rows = rows[-2:] if rows[-1][0] == RETENTION else rows[-1:]
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for name, loss, chrf in rows:
        line = f"{name:{width}}  loss {_arrow(loss, 3, percent(loss))}"
        if any(x is not None for x in chrf):
            line += f"  chrF++ {_arrow(chrf, 1, points(chrf))}"
        lines.append(line)
    return lines


def _arrow(values: list[float | None], decimals: int, change: str) -> str:
    """Such as 2.75 -> 1.80 (-34.5 %); where there is nothing to compare, the last figure."""
    known = [number(x, decimals) for x in values if x is not None]
    return f"{known[0]} -> {known[-1]} ({change})" if change else known[-1]


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 3, 30] -> "0-3, 30"."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _data(stages: list[dict[str, Any]]) -> list[str]:
    """What each corpus came to, in the words of the terminal, and which stages trained on it."""
    told: dict[str, list[str]] = {}
    for stage in stages:
        told.setdefault(describe(stage["data"]), []).append(stage["name"])
    return [
        (f"{', '.join(names)}:\n\n" if len(told) > 1 else "") + _fenced(text, "text")
        for text, names in told.items()
    ]


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, inside a table cell too."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;")
    return "<br>".join(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text).splitlines())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, *rows]
    text = ["| " + " | ".join(map(_escape, cells)) + " |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _draw_loss(steps: Steps, path: Path) -> None:
    """All stages' training loss one after the other, the learning rate below."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    start, known = 0, list[float]()
    for i, (stage, lines) in enumerate(steps.items()):
        colour, n = _STAGES[i % len(_STAGES)], len(lines)
        x = np.arange(start + 1, start + n + 1)
        loss = np.array([line["loss"] for line in lines], dtype=float)
        size = 4 if n <= 400 else 2
        top.plot(x, loss, "o", ms=size, mew=0, color=colour, alpha=0.35 if n <= 400 else 0.15)
        finite = np.isfinite(loss)
        if finite.any():
            top.plot(x[finite], smooth(loss[finite]), color=colour, lw=2, label=stage)
            known += loss[finite].tolist()
        low.plot(x, [line["learning_rate"] for line in lines], color=colour, lw=1.2)
        if start:
            for axes in (top, low):
                axes.axvline(start + 0.5, color="#444444", lw=1, ls="--")
        start += n
    top.set_ylabel("training loss (nats per token)")
    low.set_ylabel("learning rate")
    low.set_xlabel("optimizer step")
    low.xaxis.get_major_locator().set_params(integer=True)
    low.set_ylim(bottom=0)
    low.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if known:
        top.set_ylim(span(known, LOSS_SPAN * max(known)))
    top.plot([], [], "o", ms=4, mew=0, color=_BEFORE, label="dot: a step")
    top.plot([], [], color=_BEFORE, lw=2, label="line: moving average")
    # Above the axes: inside, it would cover points
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
    for axes in (top, low):
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(path, figure)


def _draw_quality(rows: list[Row], labels: list[str], path: Path) -> None:
    """A dumbbell a row: loss on the left, chrF++ on the right, the change beside it."""
    from matplotlib.figure import Figure

    with_chrf = [row for row in rows if None not in (row[2][0], row[2][-1])]
    panels = [("held-out loss, lower is better", 1, 3, percent)]
    if with_chrf:
        panels.append(("chrF++, higher is better", 2, 1, points))
    height = 1.4 + 0.36 * len(rows)
    figure = Figure(figsize=(5.2 * len(panels), height), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, column, decimals, change) in zip(grid, panels, strict=True):
        for y, row in enumerate(rows):
            values: Any = row[column]
            a, b = values[0], values[-1]
            if a is None or b is None:
                continue
            axes.plot([a, b], [y, y], color=_BEFORE, lw=2, zorder=1)
            axes.scatter([a], [y], s=42, color=_BEFORE, zorder=2)
            axes.scatter([b], [y], s=42, color=_AFTER, zorder=3)
            # The smaller value's number stands left of it, the larger one's right: no overlap
            for x, colour, right in ((a, "#666666", a > b), (b, _AFTER, b >= a)):
                axes.annotate(
                    number(x, decimals),
                    (x, y),
                    xytext=(7 if right else -7, 0),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    va="center",
                    color=colour,
                    fontsize=9,
                )
            axes.annotate(
                change(values),
                (1.01, y),
                xycoords=axes.get_yaxis_transform(),
                va="center",
                fontsize=9,
            )
        axes.set_title(title, fontsize=11)
        ends: Any = [(row[column][0], row[column][-1]) for row in rows]  # type: ignore[index]
        if drawn := [x for pair in ends for x in pair if x is not None]:
            least = LOSS_SPAN * max(drawn) if column == 1 else CHRF_SPAN
            axes.set_xlim(span(drawn, least, room=0.28))
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if rows[-1][0] == RETENTION and len(rows) > 1:
            axes.axhline(len(rows) - 1.5, color="#444444", lw=0.8, ls="--")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.tick_params(left=axes is grid[0])
    for label, colour in ((labels[0], _BEFORE), (labels[-1], _AFTER)):
        grid[0].scatter([], [], s=42, color=colour, label=label)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    write_picture(path, figure)
