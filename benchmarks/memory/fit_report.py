"""What runs of `benchmarks.memory.fit` say: whether a plan was right, in a line, in a table.

python -m benchmarks.memory.fit_report        (rewrites the section of docs/memory.md)
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import fill

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/fit.json", ROOT / "docs/memory.md"
BEGIN, END = "<!-- begin: benchmarks/results/fit.json -->", "<!-- end: fit -->"
NOT_MEASURED = "not measured on a GPU"
TOLERANCE = 0.05  # of a prediction
OVERLAP = 0.10  # of a resident step: what streaming may cost


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Adds how far the plan is off, and whether that and the budget are kept."""
    if found["status"] != "ok":
        return found
    planned, measured = found["plan"], found["measured"]
    parts = planned["device_bytes"]
    own = planned["device_total"] - parts.get("margin", 0) - parts.get("CUDA context", 0)
    found["off"] = {  # positive: more was planned than it took
        "allocated": own / measured["allocated"] - 1,
        "process": planned["device_total"] / measured["process"] - 1,
    }
    right = all(abs(x) <= TOLERANCE for x in found["off"].values())
    finite = all(map(math.isfinite, found["losses"]))
    found["ok"] = right and finite and measured["process"] <= found["budget"]
    return found


def describe_case(name: str, found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return f"{name}: {found['status']}: {found['error']}"
    m, off = found["measured"], found["off"]
    return (
        f"{name}: {'ok' if found['ok'] else 'WRONG'}: planned"
        f" {found['plan']['device_total'] / 1e9:.2f} GB, took {m['process'] / 1e9:.2f}"
        f" ({off['process']:+.1%}; allocated {m['allocated'] / 1e9:.2f}, {off['allocated']:+.1%};"
        f" reserved {m['reserved'] / 1e9:.2f}; outside {m['outside'] / 1e9:.2f});"
        f" {found['tokens_per_second']:,.0f} tokens/s; {found['layout']}"
    )


def describe_overlap(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"streaming: failed: {found['error']}"
    return (
        f"streaming, {found['micro_batch_tokens']:,} tokens a micro-batch:"
        f" {found['streamed_seconds']:.2f} s a step,"
        f" resident {found['resident_seconds']:.2f} s: {found['share']:+.1%}; of"
        f" {found['copy_seconds']:.2f} s of copying {found['hidden']:.0%} are hidden"
    )


def table(result: dict[str, Any] | None) -> str:
    """The figures as they stand in docs/memory.md; without a result, that there are none."""
    if result is None:
        return f"Planned against measured peaks, and what streaming costs: {NOT_MEASURED}."
    lines = [
        "| model, stage, budget | planned | process | allocated: planned, measured | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["cases"].items():
        if found["status"] != "ok":
            lines.append(f"| {name} | {found['status']} | - | - | - |")
            continue
        m, total = found["measured"], found["plan"]["device_total"]
        own = (1 + found["off"]["allocated"]) * m["allocated"]
        lines.append(
            f"| {name} | {total / 1e9:.2f} GB | {m['process'] / 1e9:.2f} GB"
            f" ({found['off']['process']:+.1%}) | {own / 1e9:.2f}, {m['allocated'] / 1e9:.2f} GB"
            f" ({found['off']['allocated']:+.1%}) | {found['tokens_per_second']:,.0f} |"
        )
    if "overlap" in result:
        lines += ["", f"{describe_overlap(result['overlap'])}."]
    lines += ["", f"{result['device']['name']}; torch {result['versions']['torch']}."]
    return "\n".join(lines)


def with_table(document: str, result: dict[str, Any] | None) -> str:
    """The document with the table between its markers. Raises ValueError where they are missing."""
    return fill(document, BEGIN, table(result), END)


def main() -> int:
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
