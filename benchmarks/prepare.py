"""Data preparation: pairs a second, what a second core brings, and memory.

    python -m benchmarks.prepare                (some minutes on 2 cores, after `make demo`)
    python -m benchmarks.prepare --smoke        (seconds)

The corpus is made of real pairs (Django's messages in all languages it has of the recipe's),
two joined to one at random, so that pairs differ as sentences do and any number can be had. Every
run is a process of its own, from reading to shards; those of one and two workers take turns. Memory
at 10 M pairs is that of the step that sees all rows at once, deduplication, on as many rows.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment, fill

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/prepare.json", ROOT / "docs/preparation.md"
BEGIN, END = "<!-- begin: benchmarks/results/prepare.json -->", "<!-- end -->"
LANGUAGES = "ar bn cs de es fr hu ja ko ru sr sw te th vi zh_Hans".split()
BARS = {"pairs_per_s": 2500, "two_cores": 1.7, "bytes": 2e9}

RUN = """
import json, resource, sys, time
from xplus_fast.data.preparation.recipe import load_prepare_recipe
from xplus_fast.data.preparation.run import prepare
if __name__ == "__main__":
    start = time.perf_counter()
    prepare(load_prepare_recipe(sys.argv[1], sys.argv[2:]), restart=True, show=False)
    own, child = (resource.getrusage(w).ru_maxrss * 1024
                  for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": time.perf_counter() - start, "own": own, "worker": child}))
"""
DEDUP = """
import json, resource, sys, time
import numpy as np
from xplus_fast.data.steps.dedup import COLUMNS, DedupOptions, survivors
n, g = int(sys.argv[1]), np.random.default_rng(0)
hashes = {c: g.integers(0, 2**64, n, np.uint64) for c in COLUMNS}
half = n // 2  # as many duplicates and near duplicates as mined corpora have
for c in COLUMNS:
    hashes[c][half:] = hashes[c][:n - half] ^ (g.random(n - half) < 0.5)
start = time.perf_counter()
found = survivors(hashes, g.integers(0, 16, n).astype(np.int16), np.zeros(n, np.int16),
                  np.full(n, np.nan, np.float32), DedupOptions())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak,
                  "found": int((found > 0).sum())}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200_000, help="of a run")
    parser.add_argument("--rows", type=int, default=10_000_000, help="to deduplicate at once")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a small corpus, one round")
    parser.add_argument("--report", action="store_true", help="only the table, from --out")
    options = parser.parse_args(arguments)
    if options.report:
        result = json.loads(options.out.read_text())
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), BEGIN, table(result), END))
        print(table(result))
        return 0
    if options.smoke:
        options.pairs, options.rows, options.rounds = 600, 20_000, 1
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.pairs, options.rows, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def measure(folder: Path, pairs: int, rows: int, rounds: int) -> dict[str, Any]:
    recipe = write_corpus(folder, pairs)
    result: dict[str, Any] = {**describe_environment(), "pairs": pairs, "runs": []}
    for _ in range(rounds):
        for workers in (1, 2):
            made = _run(RUN, str(recipe), f"workers={workers}")
            result["runs"].append({"workers": workers, **made})
            print(f"{workers} workers: {made['seconds']:.1f} s", file=sys.stderr, flush=True)
    result["dedup"] = {"rows": rows, **_run(DEDUP, str(rows))}
    return result


def write_corpus(folder: Path, count: int) -> Path:
    """`count` pairs of all languages, line-aligned; returns the recipe."""
    import django
    import polib

    generator, corpora = random.Random(0), []
    for code in LANGUAGES:
        files = sorted(Path(django.__file__).parent.glob(f"**/locale/{code}/LC_MESSAGES/*.po"))
        entries = [e for f in files for e in polib.pofile(str(f)).translated_entries()]
        known = [
            (e.msgid, e.msgstr) for e in entries
            if len(e.msgid.split()) > 3 and "\n" not in e.msgid + e.msgstr and e.msgstr
        ]  # fmt: skip
        paths = [folder / f"django.{code}.{side}" for side in ("en", code)]
        with open(paths[0], "w") as english, open(paths[1], "w") as other:
            for _ in range(count // len(LANGUAGES)):
                (a, b), (c, d) = generator.choices(known, k=2)
                english.write(f"{a} {c}\n")
                other.write(f"{b} {d}\n")
        corpora.append({"path": [str(p) for p in paths], "languages": ["en", code]})
    tree = {"output": str(folder / "out"), "corpora": corpora, "evaluation": {"flores": []}}
    (folder / "recipe.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder / "recipe.yaml"


def _run(script: str, *arguments: str) -> dict[str, Any]:
    # in a file: spawned workers import the main module
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.py"
        file.write_text(script)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }
        ran = subprocess.run(
            [sys.executable, str(file), *arguments],
            stdout=subprocess.PIPE, text=True, check=True, env=environment,
        )  # fmt: skip
    return json.loads(ran.stdout.strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    speed, most = {}, {}
    for workers in (1, 2):
        runs = [r for r in result["runs"] if r["workers"] == workers]
        speed[workers] = result["pairs"] / statistics.median(r["seconds"] for r in runs)
        children = workers if workers > 1 else 0
        most[workers] = max(r["own"] + children * r["worker"] for r in runs)
    dedup = result["dedup"]

    def verdict(kept: bool) -> str:
        return "kept" if kept else "missed"

    return "\n".join(
        [
            "| | measured | bar |",
            "|---|---|---|",
            f"| pairs a second, one core, all steps but embeddings | {speed[1]:,.0f} |"
            f" {BARS['pairs_per_s']:,}: {verdict(speed[1] >= BARS['pairs_per_s'])} |",
            f"| two cores over one | {speed[2] / speed[1]:.2f}x |"
            f" {BARS['two_cores']}x: {verdict(speed[2] / speed[1] >= BARS['two_cores'])} |",
            f"| memory of a run of {result['pairs']:,} pairs, one and two workers, all processes |"
            f" {most[1] / 1e9:.2f} and {most[2] / 1e9:.2f} GB | |",
            f"| memory of deduplicating {dedup['rows']:,} rows ({dedup['seconds']:.0f} s) |"
            f" {dedup['bytes'] / 1e9:.2f} GB | 2 GB: {verdict(dedup['bytes'] < BARS['bytes'])} |",
            "",
            f"Medians of {len(result['runs']) // 2} interleaved runs, {result['device']['name']}.",
        ]
    )


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
