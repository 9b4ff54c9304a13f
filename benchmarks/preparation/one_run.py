"""One run of `xplus-fast prepare`, timed and watched in a process of its own.

    python -m benchmarks.preparation.one_run RECIPE [--made-up] [key=value ...]

Prints JSON: seconds, seconds of CPU time and of them those in user mode, the most bytes that its
processes held together and that one worker did, and a hash of the sorted rows that came out.
`--made-up` spares the steps: parts get fingerprints and counts at random, a third of them
duplicates, so that what sees all rows can be watched at any size.
"""

import argparse
import hashlib
import json
import resource
import time
import zlib
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from xplus_fast.data.preparation import run
from xplus_fast.data.preparation.parts import EDGES, STEPS, Part, per_pair, write_table
from xplus_fast.data.preparation.recipe import PrepareRecipe, load_prepare_recipe
from xplus_fast.data.steps.dedup import COLUMNS
from xplus_fast.files import write_json

DISTINCT = 9_000_000  # of 10 M draws from these, 3 fall upon another
EVERY = 0.1  # seconds between two looks at memory


class Watch(Thread):
    """The most that this process and its children hold, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.worker_bytes, self._end = 0, 0, Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self._end.wait(EVERY):
            held = []
            for process in [own, *own.children(recursive=True)]:
                try:
                    held.append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, sum(held))
            # without others, this process is the worker
            self.worker_bytes = max(self.worker_bytes, *(held[1:] or held), 0)

    def stop(self) -> dict[str, int]:
        self._end.set()
        self.join()
        return {"bytes": self.bytes, "worker_bytes": self.worker_bytes}


def made_up_part(part: Part, batch: pa.RecordBatch, recipe: PrepareRecipe) -> str:
    """In the place of `filter_part`: columns and counts like its own."""
    n, generator = batch.num_rows, np.random.default_rng(zlib.crc32(part.name.encode()))
    who = generator.integers(0, DISTINCT, n).astype(np.uint64)
    flip = np.uint64(1) << generator.integers(0, 64, n).astype(np.uint64)
    for i, name in enumerate(COLUMNS, 1):
        hashes = (who + np.uint64(i * DISTINCT)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(31)
        if "simhash" in name:
            hashes ^= flip
        batch = batch.append_column(name, pa.array(hashes))
    for side in ("source", "target"):
        batch = batch.append_column(f"{side}_tokens", pa.array(np.full(n, 30, np.int32)))
    write_table(pa.Table.from_batches([batch]), part.file(".parquet"))
    pairs = per_pair(batch)
    steps = dict.fromkeys(STEPS, pairs)
    lengths = {"en": [n] + [0] * len(EDGES)}
    write_json(
        part.file(".json"), {"read": pairs, "steps": steps, "rejects": {}, "lengths": lengths}
    )
    return part.name


def hash_rows(out: Path) -> str:
    """Of the sorted rows."""
    rows: list[str] = []
    for file in out.glob("data-*.parquet"):
        rows += [json.dumps(row, sort_keys=True) for row in pq.read_table(file).to_pylist()]
    digest = hashlib.sha256()
    for row in sorted(rows):
        digest.update(row.encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--made-up", action="store_true", help="spare the steps")
    options = parser.parse_args()
    if options.made_up:
        run.filter_part = made_up_part  # type: ignore[assignment]
    recipe = load_prepare_recipe(options.recipe, options.overrides)
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    run.prepare(recipe, restart=True, show=False)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, **watch.stop()}
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["user_seconds"] = sum(u.ru_utime for u in used)
    found["cpu_seconds"] = sum(u.ru_utime + u.ru_stime for u in used)
    found["digest"] = hash_rows(Path(recipe.output))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
