"""The steps of a part on Ray: tasks over parts, as `engine: ray` has them, or Ray Data.

    python -m benchmarks.preparation.ray_data RECIPE tasks|data

Both read the same Parquet file, on two cores, through the same function, and write what stays.
Prints JSON: seconds from the first read to the last write, those of CPU time in user mode, the most
bytes that Ray's processes held together, and a hash of the sorted rows.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.preparation.one_run import Watch, hash_rows
from xplus_fast.data.preparation.corpora import read_corpus
from xplus_fast.data.preparation.engines import run_calls
from xplus_fast.data.preparation.parts import Part, filter_batch, filter_part
from xplus_fast.data.preparation.recipe import PrepareRecipe, load_prepare_recipe
from xplus_fast.data.steps.batch import SCHEMA

CORES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("how", choices=("tasks", "data"))
    options = parser.parse_args()
    import ray

    recipe = load_prepare_recipe(options.recipe)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "corpora.parquet", Path(folder) / "out"
        out.mkdir()
        rows = (row for corpus in recipe.corpora for row in read_corpus(corpus))
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
        pq.write_table(table, source, row_group_size=recipe.part_pairs)
        del table
        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
        # started, and with all that they import
        ray.get([ray.remote(_warm).remote() for _ in range(CORES)])
        watch = Watch()
        watch.start()
        start, spent = time.perf_counter(), _user_seconds()
        (_tasks if options.how == "tasks" else _data)(source, out, recipe)
        found = {"seconds": time.perf_counter() - start, "bytes": watch.stop()["bytes"]}
        found["user_seconds"] = _user_seconds() - spent
        ray.shutdown()
        for i, file in enumerate(sorted(out.glob("*.parquet"))):
            file.rename(out / f"data-{i}.parquet")
        print(json.dumps({"how": options.how, **found, "digest": hash_rows(out)}))


def _user_seconds() -> float:
    """Of this process and all that are alive below it: Ray keeps its workers."""
    own = psutil.Process()
    return sum(p.cpu_times().user for p in [own, *own.children(recursive=True)])


def _warm() -> None:
    time.sleep(1)  # so that each of the workers has one


def _tasks(source: Path, out: Path, recipe: PrepareRecipe) -> None:
    def calls() -> Any:
        with pq.ParquetFile(source) as file:
            for at, batch in enumerate(file.iter_batches(recipe.part_pairs)):
                yield Part(f"00000-{at:06}", str(out)), batch, recipe

    for _ in run_calls("ray", filter_part, calls(), CORES):
        pass


def _data(source: Path, out: Path, recipe: PrepareRecipe) -> None:
    import ray.data

    def filtered(table: pa.Table) -> pa.Table:
        return filter_batch(table.combine_chunks().to_batches()[0], recipe)[0]

    ray.data.DataContext.get_current().enable_progress_bars = False
    read = ray.data.read_parquet(str(source))
    read.map_batches(filtered, batch_format="pyarrow", batch_size=recipe.part_pairs).write_parquet(
        str(out)
    )


if __name__ == "__main__":
    sys.exit(main())
