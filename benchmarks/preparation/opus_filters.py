"""OpusFilter's side of `against_opusfilter`, for the Python that has it; imports nothing of ours.

    python benchmarks/preparation/opus_filters.py < TASK.json

The task: {language: {"filters": OpusFilter's configuration, "pairs": [[source, target], ...]}}.
Prints JSON: {"kept": {language: [0 or 1 for each pair]}, "user_seconds", "version"}; the seconds
are those after its models were loaded.
"""

import json
import logging
import resource
import sys
from importlib.metadata import version

from opusfilter.pipeline import FilterPipeline


def main() -> None:
    logging.disable()
    task = json.load(sys.stdin)
    pipelines = {code: FilterPipeline.from_config(told["filters"]) for code, told in task.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    kept = {}
    for code, pipeline in pipelines.items():
        pairs = task[code]["pairs"]
        left = list(range(len(pairs)))
        for one in pipeline.filters:  # each sees what those before it left, as in a `filter` step
            scores = one.score([pairs[i] for i in left])
            left = [i for i, score in zip(left, scores, strict=True) if one.accept(score)]
        alive = set(left)
        kept[code] = [int(i in alive) for i in range(len(pairs))]
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    print(json.dumps({"kept": kept, "user_seconds": spent, "version": version("opusfilter")}))


if __name__ == "__main__":
    main()
