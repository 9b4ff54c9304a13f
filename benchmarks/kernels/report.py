"""What a run of `benchmarks.kernels.measure` found: a table, pictures, the section of a README.

    python -m benchmarks.kernels.report [RESULTS] [--readme FILE]

rewrites what stands between the markers in kernels/README.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import fill

ROOT = Path(__file__).parents[2]
RESULTS, README = Path("benchmarks/results/kernels.json"), Path("kernels/README.md")
BEGIN, END = "<!-- begin: benchmarks/results/kernels.json -->", "<!-- end -->"
NOT_MEASURED = "not measured on a GPU"
PEERS = ("eager", "torch.compile", "Liger", "F.linear_cross_entropy", "bitsandbytes", "bf16 cuBLAS")
COLORS = {
    "eager": "#9aa5b1", "torch.compile": "#e0a458", "Liger": "#c8553d",
    "F.linear_cross_entropy": "#7b5ea7", "bitsandbytes": "#5b8e7d", "bf16 cuBLAS": "#3d5a80",
}  # fmt: skip
BARS = ("#1f6f8b", "#99c1b9", "#d98e73", "#8f6593")
LIMITS = {
    "copy_bytes": "device copy", "bf16_flops": "bf16 GEMM", "fp8_flops": "FP8 GEMM",
    "bare GEMMs": "its GEMMs alone",
}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Every row, in columns."""
    head = (
        "op",
        "way",
        "size",
        "T",
        "provider",
        "ms",
        "p20-p80",
        "GB/s",
        "TFLOP/s",
        "limit",
        "MiB",
    )
    lines = [head]
    for r in result["rows"]:
        tokens = "-" if r["tokens"] is None else str(r["tokens"])
        start = (r["op"], r["way"], r["size"], tokens, r["provider"])
        if r["status"] != "ok" or "ms" not in r:
            lines.append((*start, r["status"]))
            continue
        spread = f"{r['ms_p20']:.3f}-{r['ms_p80']:.3f}"
        rates = (_number(r.get("gbps"), ".0f"), _number(r.get("tflops"), ".1f"))
        peak = None if r["peak_bytes"] is None else r["peak_bytes"] / 2**20
        share = _number(r.get("share"), ".0%")
        lines.append((*start, f"{r['ms']:.3f}", spread, *rates, share, _number(peak, ".0f")))
    whole = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(head))]
    for i in range(5):
        widths[i] = max(len(line[i]) for line in lines)
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)) for line in lines]
    return "\n".join([*(line.rstrip() for line in text), "", limits_line(result)])


def limits_line(result: dict[str, Any]) -> str:
    """The card and what it reached in this run."""
    limits = result["limits"]
    said = [
        f"copy {limits['copy_bytes'] / 1e9:.0f} GB/s",
        f"bf16 {limits['bf16_flops'] / 1e12:.1f} TFLOP/s",
    ]
    if "fp8_flops" in limits:
        said.append(f"FP8 {limits['fp8_flops'] / 1e12:.0f} TFLOP/s")
    names = ("torch", "triton", "liger-kernel")
    versions = ", ".join(f"{n} {result['versions'][n]}" for n in names if n in result["versions"])
    return f"{result['device']['name']}: {', '.join(said)}; {versions}; {result['commit']}."


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _by_case(result: dict[str, Any], tokens: int | None) -> dict[tuple, dict[str, dict]]:
    """(op, way) -> size -> provider -> row, of `tokens` and of what has none; timed rows alone."""
    cases: dict[tuple, dict[str, dict]] = {}
    for r in result["rows"]:
        if r["tokens"] in (tokens, None) and r["status"] == "ok" and "ms" in r:
            cases.setdefault((r["op"], r["way"]), {}).setdefault(r["size"], {})[r["provider"]] = r
    return {key: sizes for key, sizes in cases.items() if any("ours" in p for p in sizes.values())}


def _main_tokens(result: dict[str, Any]) -> int | None:
    return next((r["tokens"] for r in result["rows"] if r["tokens"] is not None), None)


def readme_section(result: dict[str, Any] | None) -> str:
    """Markdown: ours at the run's main T, and how many times faster than each peer."""
    if result is None:
        return f"Shares of the limit and speed-ups: {NOT_MEASURED}."
    tokens = _main_tokens(result)
    sizes = list(dict.fromkeys(r["size"] for r in result["rows"]))
    cases = _by_case(result, tokens)
    peers = [
        p for p in PEERS if any(p in by for found in cases.values() for by in found.values())
    ]  # fmt: skip
    head = ["op", "way", *(f"{s}: ms, share of the limit" for s in sizes), "limit"]
    head += [f"x {p}" for p in peers]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (op, way), found in cases.items():
        cells, limit = [f"`{op}`", way], "-"
        for s in sizes:
            ours = found.get(s, {}).get("ours")
            if ours:
                limit = LIMITS.get(ours["limit"], ours["limit"])
            cells.append(
                f"{ours['ms']:.3f}, {_number(ours['share'], '.0%')}" if ours else NOT_MEASURED
            )
        cells.append(limit)
        for p in peers:
            ratios = [_number(_speedup(found.get(s, {}), p), ".2f") for s in sizes]
            cells.append("-" if set(ratios) == {"-"} else " / ".join(ratios))
        lines.append(f"| {' | '.join(cells)} |")
    said = f"T = {tokens}, frozen weights; x: times ours is faster, {' / '.join(sizes)}."
    return "\n".join([*lines, "", f"{said} {limits_line(result)}"])


def _speedup(by: dict[str, dict], peer: str) -> float | None:
    return by[peer]["ms"] / by["ours"]["ms"] if "ours" in by and peer in by else None


def fill_readme(text: str, result: dict[str, Any] | None) -> str:
    """`text` with the section between the markers; ValueError where they are missing."""
    return fill(text, BEGIN, readme_section(result), END)


def draw(result: dict[str, Any], stem: Path) -> list[str]:
    """PNGs beginning with `stem`: shares, and speed-ups by size; -> what to say of them."""
    try:
        import matplotlib
    except ImportError:
        return ["no pictures: matplotlib is not installed"]
    matplotlib.use("Agg")
    cases = _by_case(result, _main_tokens(result))
    if not cases:
        return ["no pictures: nothing of ours was timed"]
    # both ways together say nothing new where each is drawn; the loss head has no backward apart
    cases = {
        (op, way): found
        for (op, way), found in cases.items()
        if way != "full" or (op, "backward") not in cases
    }
    lines = []
    sizes = list(dict.fromkeys(r["size"] for r in result["rows"]))
    kinds = ["share", *(f"speedup_{size}" for size in sizes)]
    for kind in kinds:
        path = stem.with_name(f"{stem.name}_{kind}.png")
        _, _, size = kind.partition("_")
        figure = _draw_speedup(result, cases, size) if size else _draw_share(result, cases)
        if figure is None:
            lines.append(f"no picture of the {kind}: no peer was timed")
            continue
        figure.savefig(path, dpi=150, facecolor="white")
        lines.append(f"drawn: {path}")
    return lines


def _figure(bars: int, title: str, note: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    height = 1.6 + 0.19 * bars
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(note, loc="left", fontsize=8.5, color="#555555", pad=6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8, colors="#555555")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _grouped(axes: Any, groups: list[tuple[str, list[tuple[str, str, float, str]]]]) -> None:
    """groups: label, bars of (legend, color, value, text); one under another."""
    y, ticks, seen = 0.0, [], set()
    for label, bars in groups:
        middle = y + (len(bars) - 1) / 2
        for legend, color, value, text in bars:
            axes.barh(y, value, 0.82, color=color, label=None if legend in seen else legend)
            seen.add(legend)
            axes.annotate(
                text, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7.5
            )
            y += 1
        ticks.append((middle, label))
        y += 0.7
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(y - 0.4, -0.8)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)


def _note(result: dict[str, Any]) -> str:
    tokens = _main_tokens(result)
    return (
        f"{result['device']['name']}, {'' if tokens is None else f'T = {tokens}, '}frozen weights"
    )


def _draw_share(result: dict[str, Any], cases: dict) -> Any:
    sizes = list(dict.fromkeys(r["size"] for r in result["rows"]))
    groups = []
    for (op, way), found in cases.items():
        bars = [
            (s, BARS[i % len(BARS)], share, f"{share:.0%}")
            for i, s in enumerate(sizes)
            if (share := found.get(s, {}).get("ours", {}).get("share")) is not None
        ]
        if bars:
            groups.append((f"{op}, {way}", bars))
    if not groups:
        return None
    count = sum(len(bars) + 0.7 for _, bars in groups)
    title = "Ours: share of the limit measured in the same run"
    figure, axes = _figure(count, title, _note(result))
    _grouped(axes, groups)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlim(0, max(1.08, 1.08 * max(b[2] for _, bars in groups for b in bars)))
    return figure


def _draw_speedup(result: dict[str, Any], cases: dict, size: str) -> Any:
    groups = []
    for (op, way), found in cases.items():
        bars = [
            (f"against {p}", COLORS[p], ratio, f"{ratio:.2f}x")
            for p in PEERS
            if (ratio := _speedup(found.get(size, {}), p)) is not None
        ]
        if bars:
            groups.append((f"{op}, {way}", bars))
    if not groups:
        return None
    count = sum(len(bars) + 0.7 for _, bars in groups)
    figure, axes = _figure(count, f"Ours: times faster, {size}", _note(result))
    _grouped(axes, groups)
    axes.set_xscale("log")
    values = [b[2] for _, bars in groups for b in bars]
    axes.set_xlim(min(0.5, 0.8 * min(values)), 1.4 * max(2.0, *values))
    axes.axvline(1, color="#333333", linewidth=1)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if min(values) / 2 <= t]
    axes.set_xticks([t for t in ticks if t <= 1.4 * max(2.0, *values)])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.xaxis.set_minor_locator(axes.xaxis.get_minor_locator().__class__(subs=[]))
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / README)
    options = parser.parse_args(arguments)
    try:
        result = json.loads(options.results.read_text()) if options.results.exists() else None
        options.readme.write_text(fill_readme(options.readme.read_text(), result))
    except (OSError, ValueError) as e:
        print(f"benchmarks.kernels.report: {e}", file=sys.stderr)
        return 2
    print(f"{options.readme}: {'filled' if result else NOT_MEASURED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
