"""What tests of whole runs of `xplus-fast prepare` share."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from xplus_fast import cli


def recipe(corpus, folder, **options):
    tree = {
        "output": str(folder / "out"),
        "corpora": [
            {"path": [str(corpus / f"django.{c}.gz") for c in ("en", "fr")], "name": "lines"},
            {"path": str(corpus / "sw.jsonl"), "name": "records"},
        ],
        "evaluation": {"files": [str(corpus / "flores.devtest")], "flores": []},
        "balance": {"tokens": 20000},
        "quality": {"method": "none"},
        "part_pairs": 40,
        "shard_conversations": 300,
        "workers": 1,
        **options,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(capsys, *arguments):
    code = cli.main(["prepare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def rows(out):
    """A hash of the sorted rows, and the rows."""
    found = []
    for file in sorted(Path(out).glob("data-*.parquet")):
        found += pq.read_table(file).to_pylist()
    lines = sorted(json.dumps(row, sort_keys=True) for row in found)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), found


def results(out):
    """What must be the same, however a run went."""
    manifest = json.loads((out / "manifest.json").read_text())
    return manifest["counts"], manifest["quarantined"], manifest["shards"]
