"""report.html: a run's report as one page that opens anywhere, without a network.

Tables, samples and text are made here; page.js draws the pictures from the figures beside them and
sorts. All text is escaped, and the page's own policy lets no other script run and loads nothing.
"""

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from xplus_fast.data.corpus_text import describe
from xplus_fast.files import write_text
from xplus_fast.progress import duration, si
from xplus_fast.training.report_data import (
    RETENTION,
    Finished,
    Row,
    number,
    percent,
    points,
    read_run,
    smooth,
)
from xplus_fast.training.report_html.elements import Cell, column, known, section, storage, table
from xplus_fast.training.report_html.samples import translations
from xplus_fast.training.report_html.stages import stage_section

NAME = "report.html"
_COLUMNS = 4  # measurements that a screen has room for


def write(run: Path) -> None:
    """Write a finished run's report.html again. Raises `UserError` as `read_run` does."""
    write_text(run / NAME, page(read_run(run)))


def page(found: Finished) -> str:
    """The whole page."""
    here = files(__name__)
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    about = found.about
    where = f"{about['device']}, {about['dtype']}; {duration(about['seconds'])} in all"
    parts = [
        f'<h1>{escape(found.name)}</h1>\n<p class="soft">{escape(where)}</p>',
        _tiles(found),
        section("Before and after", _before_after(found)),
        section("Training loss", _loss(found)),
        section("While it trained", _during(found)),
        section("Translation against reasoning", _curve(found.curve)),
        section("Planned and used", *(stage_section(found, stage) for stage in about["stages"])),
        section("Translations", *translations(found)),
        section("Data", *_data(about["stages"])),
        section("How to run it again", _again(found)),
    ]
    filled = {
        "policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "title": escape(f"{found.name}: what this run did"),
        "style": here.joinpath("page.css").read_text(encoding="utf-8"),
        "body": "\n".join(part for part in parts if part),
        "data": _embedded(_figures(found)),
        "script": script,
    }
    frame = here.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: filled[hole[1]], frame)


def _embedded(value: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda c: f"\\u{ord(c[0]):04x}", text)


def _figures(found: Finished) -> dict[str, Any]:
    """What page.js draws."""
    stages = []
    for name, lines in found.steps.items():
        loss = column(lines, "loss")
        finite = [x for x in loss if x is not None]
        even = iter(smooth(np.array(finite)) if finite else ())
        stages.append(
            {
                "name": name,
                "steps": lines[-1]["steps"],
                "step": [line["step"] for line in lines],
                "loss": loss,
                "smooth": [None if x is None else round(float(next(even)), 6) for x in loss],
                "rate": column(lines, "learning_rate"),
                "speed": column(lines, "tokens_per_second"),
            }
        )
    return {"stages": stages, "curve": _points(found.curve)}


def _points(curve: dict[str, Any] | None) -> dict[str, Any] | None:
    if curve is None:
        return None
    means = curve["points"].values()
    kinds = [k for k in ("translation", "reasoning") if means and all(k in m for m in means)]
    told = [
        {"label": label, "front": label in curve["front"], "chosen": label == curve["chosen"]}
        | {kind: mean[kind] for kind in kinds}
        for label, mean in curve["points"].items()
    ]
    return {"kinds": kinds, "points": told} if kinds else None


def _tiles(found: Finished) -> str:
    """The figures that are looked for first."""
    tiles = []
    directions = [row for row in found.rows if row[0] != RETENTION]
    for name, loss, chrf in [*directions[-1:], *(r for r in found.rows if r[0] == RETENTION)]:
        what = "loss" if name == RETENTION else "held-out loss"
        tiles.append((f"{what}, {name}", _arrow(loss, 3), _change(loss, name)))
        if any(x is not None for x in chrf):
            tiles.append((f"chrF++, {name}", _arrow(chrf, 1), _gain(chrf)))
    lines = [line for lines in found.steps.values() for line in lines]
    speed, memory = known(lines, "tokens_per_second"), known(lines, "memory_bytes")
    tiles.append(("time in steps", duration(sum(known(lines, "seconds"))), Cell("")))
    tiles.append(("tokens", si(sum(known(lines, "tokens"))), Cell("")))
    tiles += [("tokens/s, median", si(median(speed)), Cell(""))] if speed else []
    tiles += [("peak memory", storage(max(memory)), Cell(""))] if memory else []
    made = [
        f'<div class="tile"><b>{escape(text)}</b>'
        + (f'<span class="{change.kind}">{escape(change.text)}</span> ' if change.text else "")
        + f"<span>{escape(name)}</span></div>"
        for name, text, change in tiles
    ]
    return f'<div class="tiles">\n{chr(10).join(made)}\n</div>'


def _arrow(values: list[float | None], decimals: int) -> str:
    known = [number(x, decimals) for x in values if x is not None]
    return " \u2192 ".join(dict.fromkeys((known[0], known[-1]))) if known else "unknown"


def _change(loss: list[float | None], name: str) -> Cell:
    """Retention is neither good nor bad: its loss should not move."""
    a, b = loss[0], loss[-1]
    if not percent(loss) or a is None or b is None:
        return Cell("")
    kind = "" if name == RETENTION or a == b else "good" if b < a else "bad"
    return Cell(percent(loss), (b - a) / a, kind)


def _gain(chrf: list[float | None]) -> Cell:
    a, b = chrf[0], chrf[-1]
    if not points(chrf) or a is None or b is None:
        return Cell("")
    return Cell(points(chrf), b - a, "" if a == b else "good" if b > a else "bad")


def _before_after(found: Finished) -> str:
    if not found.rows:
        return "<p>Nothing was held out: data.heldout and data.retention were not set.</p>"
    labels = list(found.measured)
    shown = range(len(labels)) if len(labels) <= _COLUMNS else (0, len(labels) - 1)
    with_chrf = any(x is not None for _, _, chrf in found.rows for x in chrf)
    header = ["direction", *(f"loss {labels[i]}" for i in shown), "change of loss"]
    header += [*(f"chrF++ {labels[i]}" for i in shown), "change of chrF++"] if with_chrf else []

    def cells(row: Row) -> list[Cell]:
        name, loss, chrf = row
        made = [Cell(name), *(Cell(number(loss[i], 3), loss[i]) for i in shown)]
        made.append(_change(loss, name))
        if with_chrf:
            made += [*(Cell(number(chrf[i], 1), chrf[i]) for i in shown), _gain(chrf)]
        return made

    single = [row for row in found.rows if row[0] != RETENTION]
    mean = single[-1:] if len(single) > 1 else []
    single = single[:-1] if mean else single
    foot = mean + [row for row in found.rows if row[0] == RETENTION]
    note = "Loss: nats per supervised token of held-out examples, lower is better."
    note += " chrF++: 0 to 100, higher is better." if with_chrf else ""
    if found.rows[-1][0] == RETENTION:
        note += f" {RETENTION.capitalize()}: its loss should not move."
    body = table(header, [cells(r) for r in single], [cells(r) for r in foot], sorts=True)
    return f'{body}\n<p class="note">{note}</p>'


def _loss(found: Finished) -> str:
    names = [
        f'<span><i style="background:var(--c{i % 4})"></i>{escape(name)}</span>'
        for i, name in enumerate(found.steps)
    ]
    each = "dots" if sum(map(len, found.steps.values())) <= 400 else "thin line"
    return (
        f'<div class="legend">{"".join(names)}<span>{each}: every step</span>'
        "<span>thick line: their moving average</span></div>\n"
        '<div class="chart" id="loss"><noscript>See loss.png.</noscript></div>\n'
        '<p class="note">Nats per supervised token, by optimizer step. Point at a step for its'
        " figures.</p>"
    )


def _during(found: Finished) -> str:
    rows = []
    for stage, step, at in found.during:
        means = [fmean(at[key].values()) if at[key] else None for key in ("loss", "chrf")]
        kept = (at["retention"] or {}).get("loss")
        rows.append(
            [
                Cell(stage), Cell(str(step)), Cell(number(means[0], 3)), Cell(number(means[1], 1)),
                Cell(number(kept, 3)),
            ]
        )  # fmt: skip
    header = ["stage", "step", "held-out loss, mean", "chrF++, mean", "retention loss"]
    note = "A few held-out sentences of each direction: a trend, too few for a verdict."
    return f'{table(header, rows)}\n<p class="note">{note}</p>' if rows else ""


def _curve(curve: dict[str, Any] | None) -> str:
    told = _points(curve)
    if curve is None or told is None:
        return ""
    rows, both = [], len(told["kinds"]) > 1
    for point in told["points"]:
        cells = [Cell(point["label"])]
        for kind in told["kinds"]:
            m = point[kind]
            ends = "" if m["low"] is None else f" ({m['low']:+.2f} to {m['high']:+.2f})"
            cells.append(Cell(f"{m['change']:+.2f}{ends} {m['verdict']}".strip()))
        marks = ["yes"] * point["front"] + ["chosen"] * point["chosen"]
        rows.append([*cells, *([Cell(", ".join(marks))] if both else [])])
    words = "".join(f"<p>{escape(text)}</p>" for text in curve["words"])
    legend = ["bars: intervals", "orange: the chosen scale", "dashed: no other is preferable"]
    legend = legend if both else legend[:1]
    return (
        f'{words}<div class="legend">{"".join(f"<span>{text}</span>" for text in legend)}</div>\n'
        '<div class="chart" id="curve"></div>\n'
        + table(["scale", *told["kinds"], *(["front"] if both else [])], rows)
        + '\n<p class="note">Changes from the base, in points of 100.</p>'
    )


def _data(stages: list[dict[str, Any]]) -> list[str]:
    told: dict[str, list[str]] = {}
    for stage in stages:
        told.setdefault(describe(stage["data"]), []).append(stage["name"])
    return [
        (f"<h3>{escape(', '.join(names))}</h3>" if len(told) > 1 else "")
        + f"<pre>{escape(text)}</pre>"
        for text, names in told.items()
    ]


def _again(found: Finished) -> str:
    rows = [[Cell(name), Cell(version)] for name, version in found.about["versions"].items()]
    return (
        "<p>xplus-fast train recipe.yaml, with this recipe:</p>\n"
        f"<details><summary>recipe.yaml</summary><pre>{escape(found.recipe)}</pre></details>\n"
        + table(["software", "version"], rows)
    )
