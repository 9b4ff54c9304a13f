"""Data preparation: pairs a second, what a second core brings, and memory.

    python -m benchmarks.preparation.measure            (some minutes on 2 cores, after `make demo`)
    python -m benchmarks.preparation.measure --opusfilter PYTHON    (with OpusFilter, py3langid<0.4)
    python -m benchmarks.preparation.measure --smoke    (seconds)

The corpus is made of real pairs (Django's messages in all languages it has of the recipe's),
two joined to one at random, so that pairs differ as sentences do and any number can be had. Every
run is a process of its own, from reading to shards; those of one and two workers take turns. What
the steps hold does not grow with the corpus; what the phases hold that see all rows does. So memory
at 10 M pairs is that of a whole run in which the steps are spared (`one_run`).
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment, fill
from benchmarks.preparation import against_opusfilter

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/prepare.json", ROOT / "docs/preparation.md"
BEGIN, END = "<!-- begin: benchmarks/results/prepare.json -->", "<!-- end -->"
LANGUAGES = "ar bn cs de es fr hu ja ko ru sr sw te th vi zh_Hans".split()
BARS = {"pairs_per_s": 2500, "pairs_per_user_s": 5000, "two_cores": 1.7, "bytes": 2e9,
        "worker_bytes": 4e8}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200_000, help="of a run, up to 10 M")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the run with made-up rows")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a small corpus, one round")
    parser.add_argument("--opusfilter", metavar="PYTHON", help="that has it, to compare with it")
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
        if importlib.util.find_spec("ray") and not options.smoke:
            recipe = Path(folder) / "recipe.yaml"
            result["ray"] = [_run(recipe, how, module="ray_data") for how in ("tasks", "data")]
    if options.opusfilter:
        result["opusfilter"] = against_opusfilter.compare(options.opusfilter)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def measure(folder: Path, pairs: int, rows: int, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {**describe_environment(), "pairs": pairs, "runs": []}
    recipe = write_corpus(folder, pairs)
    lines = [file.read_text("utf-8") for file in folder.glob("django.*")]
    count = sum(text.count("\n") for text in lines) / 2
    result["characters"] = sum(map(len, lines)) / count - 2  # of both texts, without the breaks
    kinds = [["workers=1"], ["workers=2"]] * rounds
    if importlib.util.find_spec("ray"):
        kinds.append(["workers=2", "engine=ray"])
    for overrides in kinds:
        made = {"overrides": overrides, "load": os.getloadavg()[0], **_run(recipe, *overrides)}
        result["runs"].append(made)
        print(f"{made['seconds']:.1f} s: {overrides}", file=sys.stderr, flush=True)
    recipe = write_lines(folder, rows)
    result["all_rows"] = {"rows": rows, **_run(recipe, "--made-up")}
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
    tree = {"output": str(folder / "out"), "corpora": corpora, "evaluation": {"flores": []},
            "quality": {"method": "none"}}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder / "recipe.yaml"


def write_lines(folder: Path, count: int) -> Path:
    """`count` short lines in as many languages, for the run whose steps are spared."""
    corpora = []
    for code in LANGUAGES:
        paths = [folder / f"lines.{code}.{side}" for side in ("en", code)]
        for path in paths:
            with open(path, "w") as file:
                file.writelines(f"{i} in {path.name}\n" for i in range(count // len(LANGUAGES)))
        corpora.append({"path": [str(p) for p in paths], "languages": ["en", code]})
    tree = {"output": str(folder / "lines"), "corpora": corpora, "evaluation": {"flores": []},
            "balance": {"tokens": 10 * count}, "quality": {"method": "none"},
            "workers": 1}  # fmt: skip
    (folder / "lines.yaml").write_text(json.dumps(tree))
    return folder / "lines.yaml"


def _run(recipe: Path, *arguments: str, module: str = "one_run") -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.preparation.{module}", str(recipe), *arguments],
        stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    return json.loads(ran.stdout.strip().splitlines()[-1])


def verdict(kept: bool) -> str:
    return "kept" if kept else "missed"


def _ray_rows(runs: list[dict[str, Any]] | None) -> list[str]:
    if runs is None:
        return []
    tasks, data = runs
    held = [run["bytes"] / 1e9 for run in runs]
    no_worse = all(tasks[key] <= data[key] for key in ("user_seconds", "bytes"))
    return [
        "| the steps of all parts on Ray, two cores: as tasks, by Ray Data |"
        f" {tasks['seconds']:.0f} and {data['seconds']:.0f} s | |",
        "| CPU seconds of their processes, user time |"
        f" {tasks['user_seconds']:.0f} and {data['user_seconds']:.0f} s | |",
        f"| memory of their processes | {held[0]:.2f} and {held[1]:.2f} GB |"
        f" tasks no more of either: {verdict(no_worse)} |",
        "| the same rows of both |"
        f" {'yes' if tasks['digest'] == data['digest'] else 'no'} |"
        f" yes: {verdict(tasks['digest'] == data['digest'])} |",
    ]


def table(result: dict[str, Any]) -> str:
    one, two = ([r for r in result["runs"] if r["overrides"] == [f"workers={n}"]] for n in (1, 2))
    # what else a machine does can only lengthen a run: the best one tells most
    wall, both, user = (
        result["pairs"] / min(r[key] for r in runs)
        for runs, key in ((one, "seconds"), (two, "seconds"), (one, "user_seconds"))
    )
    worker = max(r["worker_bytes"] for r in two) / 1e6
    spread = [
        f"{min(s):.0f} to {max(s):.0f}" for s in ([r["seconds"] for r in k] for k in (one, two))
    ]
    ray = any("engine=ray" in r["overrides"] for r in result["runs"])
    same = len({r["digest"] for r in result["runs"]}) == 1
    most = [max(r["bytes"] for r in runs) / 1e9 for runs in (one, two)]
    more = min(r["user_seconds"] for r in two) / min(r["user_seconds"] for r in one)
    everything, other = result["all_rows"], result.get("opusfilter")
    load = max(r["load"] for r in result["runs"])

    return "\n".join(
        [
            "| | measured | bar |",
            "|---|---|---|",
            f"| pairs a second, one worker, all steps but embeddings | {wall:,.0f} |"
            f" {BARS['pairs_per_s']:,}: {verdict(wall >= BARS['pairs_per_s'])} |",
            f"| the same, a CPU second (user time; {result['characters']:.0f} characters a pair) |"
            f" {user:,.0f} | {BARS['pairs_per_user_s']:,}:"
            f" {verdict(user >= BARS['pairs_per_user_s'])} |",
            f"| two workers over one | {both / wall:.2f}x |"
            f" {BARS['two_cores']}x: {verdict(both / wall >= BARS['two_cores'])} |",
            f"| CPU seconds of two workers over one's, user time | {more:.2f}x | |",
            f"| memory of all processes, {result['pairs']:,} pairs, one and two workers |"
            f" {most[0]:.2f} and {most[1]:.2f} GB | |",
            f"| the most that one of two workers held | {worker:.0f} MB |"
            f" 400 MB: {verdict(worker * 1e6 <= BARS['worker_bytes'])} |",
            f"| memory of a run of {everything['rows']:,} pairs, the steps spared"
            f" ({everything['seconds']:.0f} s) | {everything['bytes'] / 1e9:.2f} GB |"
            f" 2 GB: {verdict(everything['bytes'] < BARS['bytes'])} |",
            *_ray_rows(result.get("ray")),
            f"| one worker, two{', Ray' if ray else ''}: the same rows | {'yes' if same else 'no'}"
            f" | yes: {verdict(same)} |",
            "",
            f"Best of {len(one)} interleaved runs, {result['device']['name']}, {spread[0]} s with"
            f" one worker and {spread[1]} s with two: the machine had other work (a load of up to"
            f" {load:.1f} before a run).",
            *(("", against_opusfilter.table(other)) if other else ()),
        ]
    )


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
