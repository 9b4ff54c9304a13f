"""What the report's sections are made of: tables, headings, figures as text."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """Of a table. value: what it sorts by. kind: "good", "bad" or nothing."""

    text: str
    value: float | None = None
    kind: str = ""


def section(title: str, *parts: str) -> str:
    text = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{title}</h2>\n{text}\n</section>" if text else ""


def table(
    header: list[str],
    rows: list[list[Cell]],
    foot: Sequence[list[Cell]] = (),
    *,
    sorts: bool = False,
) -> str:
    """sorts: its headings are buttons. On a phone the rows of a wide one are lists."""
    classes = ["wide"] * (len(header) > 3) + ["sorts"] * sorts
    heads = [f"<button>{escape(h)}</button>" if sorts else escape(h) for h in header]

    def line(cells: list[Cell]) -> str:
        made = [f'<th scope="row">{escape(cells[0].text)}</th>']
        for title, cell in zip(header[1:], cells[1:], strict=True):
            value = "" if cell.value is None else f' data-value="{cell.value!r}"'
            kind = f' class="{cell.kind}"' if cell.kind else ""
            made.append(f'<td data-label="{escape(title)}"{value}{kind}>{escape(cell.text)}</td>')
        return f"<tr>{''.join(made)}</tr>"

    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    end = f"\n<tfoot>\n{chr(10).join(map(line, foot))}\n</tfoot>" if foot else ""
    return (
        f'<table class="{" ".join(classes)}">\n'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(map(line, rows))}\n</tbody>{end}\n</table>"
    )


def column(lines: list[dict[str, Any]], key: str) -> list[float | None]:
    """A figure of every step; None where it is no number, which JSON cannot hold."""
    values = [line[key] for line in lines]
    return [x if x is not None and math.isfinite(x) else None for x in values]


def known(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [x for x in column(lines, key) if x is not None]


def storage(size: float) -> str:
    """Bytes, in a piece that no line ends in."""
    return f"{size / 1e9:.2f}\u00a0GB" if size >= 1e9 else f"{size / 1e6:.1f}\u00a0MB"
