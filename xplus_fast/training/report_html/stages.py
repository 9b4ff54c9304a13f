"""What each stage trained, what was planned for it and what it used."""

from html import escape
from statistics import median
from typing import Any

from xplus_fast.progress import si
from xplus_fast.training.report_data import Finished
from xplus_fast.training.report_html.elements import Cell, known, storage, table

# What is planned by purpose, in the words of what is measured; the rest is activations
_WEIGHTS = {"trained layers", "frozen layers", "stream buffers", "embedding and head", "scratch"}
_ACTIVATIONS = "activations, head and workspace"


def stage_section(found: Finished, stage: dict[str, Any]) -> str:
    """What a stage trained, and what memory and time it was to take and took."""
    trained, total = stage["trained_parameters"], stage["total_parameters"]
    beside = f" and {', '.join(stage['also'])}" if stage["also"] else ""
    lines = found.steps.get(stage["name"], [])
    plan, used = stage.get("plan"), stage.get("memory") or {}
    parts = [
        f"<h3>{escape(stage['name'])}</h3>",
        f"<p>{len(stage['layers'])} layers{escape(beside)}: {si(trained)} of {si(total)}"
        f" parameters ({100 * trained / total:.1f} %), {len(stage['tensors'])} tensors.</p>",
    ]
    planned: dict[str, int] = {}
    if plan:
        for purpose, size in plan["device_bytes"].items():
            of = "weights" if purpose in _WEIGHTS else purpose
            of = of if of in ("weights", "gradients", "optimizer") else _ACTIVATIONS
            planned[of] = planned.get(of, 0) + size
        parts.append(_strip(plan["layout"]["layers"]))
        parts.append(_bars(planned, used))
    purposes = list(planned | used)
    rows = [[Cell(p), *(_size(where.get(p)) for where in (planned, used))] for p in purposes]
    sums = [_size(sum(where.values()) if where else None) for where in (planned, used)]
    rows += [[Cell("on the device, in all"), *sums]] if plan else []
    host = plan["host_total"] if plan else 0
    rows += [[Cell("on the host"), _size(host), Cell("")]] if host else []
    memory, speed = known(lines, "memory_bytes"), known(lines, "tokens_per_second")
    rows += [[Cell("peak of the steps"), Cell(""), _size(max(memory))]] if memory else []
    guess = plan["predicted_tokens_per_s"] if plan else None
    if speed:
        told = si(guess) if guess else ""
        rows.append([Cell("tokens/s, median"), Cell(told), Cell(si(median(speed)))])
    parts.append(table(["", "planned", "used"], rows))
    parts += [f'<p class="note">{escape(note)}</p>' for note in (plan or {}).get("notes", [])]
    return "\n".join(parts)


def _size(size: float | None) -> Cell:
    return Cell("" if size is None else storage(size))


def _strip(layers: list[dict[str, Any]]) -> str:
    cells = []
    for i, layer in enumerate(layers):
        how = "trains" if layer["trains"] else f"frozen, {layer['format']}"
        said = f"layer {i}: {how}, on the {layer['placement']}, activations: {layer['activations']}"
        on = ' class="on"' if layer["trains"] else ""
        cells.append(f'<i{on} title="{escape(said)}"></i>')
    return (
        f"<h4>layers 0 to {len(layers) - 1}; those that trained are filled</h4>\n"
        f'<div class="strip">{"".join(cells)}</div>'
    )


def _bars(planned: dict[str, int], used: dict[str, int]) -> str:
    """Memory planned and used, at one scale."""
    most = max(sum(planned.values()), sum(used.values()), 1)
    names, parts = list(planned | used), []
    for title, of in (("memory planned", planned), ("memory used", used)):
        pieces = [
            f'<i style="width:{100 * of[name] / most:.2f}%;background:var(--c{i % 6})"'
            f' title="{escape(f"{name}: {storage(of[name])}")}"></i>'
            for i, name in enumerate(names)
            if of.get(name, 0) > 0
        ]
        if pieces:
            parts.append(f'<h4>{title}</h4><div class="bar">{"".join(pieces)}</div>')
    legend = [
        f'<span><i style="background:var(--c{i % 6})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    ]
    return f'{"".join(parts)}<div class="legend">{"".join(legend)}</div>'
