"""Our steps and OpusFilter on the same pairs: what noise goes, what clean text stays, CPU seconds.

    python -m benchmarks.preparation.against_opusfilter PYTHON     (a Python that has opusfilter)

Clean pairs of 16 languages and noise planted into them, as in the tests (`tests/data/steps/noise`).
OpusFilter has the filters that go with our steps format, clean and identify, at its own thresholds
but for the ratio of lengths, which is wider for Chinese, Japanese and Korean.
"""

import argparse
import json
import resource
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.data.steps.noise import KINDS, LANGUAGES, everyday_pairs, news_pairs, plant, row
from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.format import FormatOptions, format_pairs
from xplus_fast.data.steps.identify import IdentifyOptions, identify_pairs

EACH = 100  # clean pairs of a language and source
SLICE = 2000  # pairs a batch, as in a run
SCRIPTS = {
    "ar": "Arabic", "bn": "Bengali", "ko": "Hangul", "ru": "Cyrillic", "sr": "Cyrillic",
    "te": "Telugu", "th": "Thai", "zh": "Han",
}  # fmt: skip


def opus_filters(code: str) -> list[dict[str, Any]]:
    """OpusFilter's configuration for English and another language."""
    ratio = 6 if code in ("zh", "ja", "ko") else 3
    # Japanese mixes three scripts
    scripts = {"scripts": ["Latin", SCRIPTS.get(code, "Latin")]}
    scripts["thresholds"] = [0.5, 0 if code == "ja" else 0.5]  # type: ignore[assignment]
    return [
        {"LengthFilter": {"unit": "char", "min_length": 1, "max_length": 1500}},
        {"LengthRatioFilter": {"unit": "char", "threshold": ratio}},
        {"HtmlTagFilter": {}},
        {"CharacterScoreFilter": scripts},
        {"SimilarityFilter": {}},
        {"NonZeroNumeralsFilter": {}},
        {"TerminalPunctuationFilter": {}},
        {"RepetitionFilter": {}},
        {"LanguageIDFilter": {"languages": ["en", code], "id_method": "langid"}},
    ]


def compare(python: str, each: int = EACH) -> dict[str, Any]:
    clean = {
        code: [pair for source in (everyday_pairs, news_pairs) for pair in source(code)[:each]]
        for code in LANGUAGES
    }
    rows: list[tuple[str, str, dict[str, str]]] = [  # kind, the right target, row
        ("clean", t, row(s, t, code)) for code, pairs in clean.items() for s, t in pairs
    ]
    rows += [(kind, right, made) for kind in KINDS for _, right, made in plant(kind, clean)]
    rows.sort(key=lambda one: one[2]["target_language"])
    ours, seconds = _ours([made for _, _, made in rows])
    theirs = _theirs(python, rows)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for i, (kind, right, made) in enumerate(rows):
        counts[kind][0] += 1
        mended = kind != "clean" and i in ours and ours[i] == right != made["target"]
        counts[kind][1] += i not in ours or mended
        counts[kind][2] += not theirs["kept"][i]
    return {
        "pairs": len(rows),
        "characters": sum(len(r["source"]) + len(r["target"]) for _, _, r in rows) / len(rows),
        "gone": dict(counts),  # kind -> pairs, gone by our steps, gone by its filters
        "user_seconds": [seconds, theirs["user_seconds"]],
        "version": theirs["version"],
    }


def _ours(rows: Sequence[dict[str, str]]) -> tuple[dict[int, str], float]:
    """The targets of rows that stay, by their index, and the user seconds that took."""
    batch = make_batch({**made, "where": str(i)} for i, made in enumerate(rows))
    steps: tuple[tuple[Any, Any], ...] = (
        (format_pairs, FormatOptions()), (clean_pairs, CleanOptions()),
        (identify_pairs, IdentifyOptions()),
    )  # fmt: skip
    for step, options in steps:
        step(batch.slice(0, 20), options)  # loads its models
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    kept: dict[int, str] = {}
    for at in range(0, batch.num_rows, SLICE):
        part = batch.slice(at, SLICE)
        for step, options in steps:
            part = step(part, options).kept
        where, targets = (part.column(name).to_pylist() for name in ("where", "target"))
        kept.update(zip(map(int, where), targets, strict=True))
    return kept, resource.getrusage(resource.RUSAGE_SELF).ru_utime - before


def _theirs(python: str, rows: Sequence[tuple[str, str, dict[str, str]]]) -> dict[str, Any]:
    task: dict[str, Any] = {}
    for _, _, made in rows:
        code = made["target_language"]
        told = task.setdefault(code, {"filters": opus_filters(code), "pairs": []})
        told["pairs"].append([made["source"], made["target"]])
    ran = subprocess.run(
        [python, str(Path(__file__).with_name("opus_filters.py"))],
        input=json.dumps(task), capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(f"{python}: OpusFilter did not run: {ran.stderr[-2000:]}")
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    return {**found, "kept": [kept for code in task for kept in found["kept"][code]]}


def table(result: dict[str, Any]) -> str:
    seconds, gone = result["user_seconds"], result["gone"]
    rates = [result["pairs"] / spent for spent in seconds]
    lines = [
        f"| {result['pairs']:,} pairs, {result['characters']:.0f} characters each | ours |"
        f" OpusFilter {result['version']} |",
        "|---|---|---|",
        f"| pairs a CPU second, user time | {rates[0]:,.0f} | {rates[1]:,.0f} |",
    ]
    for kind, (n, ours, theirs) in gone.items():
        what = "clean pairs lost" if kind == "clean" else f"{kind}, gone or mended"
        lines.append(f"| {what} | {ours / n:.1%} | {theirs / n:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", help="an interpreter that has opusfilter")
    parser.add_argument("--each", type=int, default=EACH, help="clean pairs of language and source")
    options = parser.parse_args()
    print(table(compare(options.python, options.each)))
