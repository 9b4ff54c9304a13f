"""Every table in the documents that comes from a results file, made again from it.

python -m benchmarks.report            (rewrites them, and draws the pictures of training)
python -m benchmarks.report --check    (exit code 1 where a document says something else)
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import fill
from benchmarks.kernels import report as kernel_report
from benchmarks.memory import fit_report, frozen_formats
from benchmarks.preparation import measure as prepare
from benchmarks.recipe import report as recipe_report
from benchmarks.training import profile
from benchmarks.training import report as train_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
TRAIN_BEGIN, TRAIN_END = "<!-- begin: benchmarks/results/train.json -->", "<!-- end: train -->"


@dataclass(frozen=True)
class Section:
    """A part of a document between two markers, and what it says of a result (or of none)."""

    document: str
    result: str
    begin: str
    end: str
    text: Callable[[dict[str, Any] | None], str]


SECTIONS = (
    Section("README.md", "train.json", TRAIN_BEGIN, TRAIN_END, train_report.readme_section),
    Section("docs/performance.md", "train.json", TRAIN_BEGIN, TRAIN_END,
            train_report.section),
    Section("docs/performance.md", "profile.json", profile.BEGIN, profile.END, profile.section),
    Section("kernels/README.md", "kernels.json", kernel_report.BEGIN, kernel_report.END,
            kernel_report.readme_section),
    Section("docs/memory.md", "fit.json", fit_report.BEGIN, fit_report.END,
            fit_report.table),
    Section("docs/memory.md", "frozen_formats.json", frozen_formats.BEGIN, frozen_formats.END,
            lambda r: frozen_formats.table(r) if r else "Not measured yet."),
    Section("README.md", "recipe.json", recipe_report.BEGIN, recipe_report.END,
            lambda r: recipe_report.summary(r) if r else "Not measured yet."),
    Section("docs/recipe.md", "recipe.json", recipe_report.BEGIN, recipe_report.END,
            lambda r: recipe_report.table(r) if r else "Not measured yet."),
    Section("docs/preparation.md", "prepare.json", prepare.BEGIN, prepare.END,
            lambda r: prepare.table(r) if r else "Not measured yet."),
)  # fmt: skip


def rewritten() -> dict[Path, str]:
    """Every document as it should be."""
    documents: dict[Path, str] = {}
    for section in SECTIONS:
        path, file = ROOT / section.document, RESULTS / section.result
        result = json.loads(file.read_text()) if file.exists() else None
        text = documents.get(path) or path.read_text(encoding="utf-8")
        documents[path] = fill(text, section.begin, section.text(result), section.end)
    return documents


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what differs")
    options = parser.parse_args(arguments)
    bad = [p for p, text in rewritten().items() if p.read_text(encoding="utf-8") != text]
    for path in bad:
        print(f"{path.relative_to(ROOT)}: not what the results files say")
    if options.check:
        return int(bool(bad))
    for path, text in rewritten().items():
        path.write_text(text, encoding="utf-8")
    train = RESULTS / "train.json"
    if train.exists():
        said = train_report.draw(json.loads(train.read_text()), train.with_suffix(""))
        said += train_report.draw_history(RESULTS, RESULTS / "train_history.png")
        print("\n".join(said))
    print(f"{len(SECTIONS)} sections written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
