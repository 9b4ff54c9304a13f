"""Whether two runs lost the same, to the last digit, as after a change that computes the same.

    python -m benchmarks.losses_equal runs/before runs/after

Both are run folders, or their metrics.jsonl. Every step is compared, by stage and number: its loss
and, where both have it, its gradient norm. Exit code 0: equal; 1: they differ, the first difference
is told; 2: nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

Curve = list[tuple[str, float]]  # (which step, its figure)


def first_difference(old: Curve, new: Curve) -> str | None:
    """Where two curves part: a step's figure, or a step that only one has; None: they are equal."""
    for a, b in zip_longest(old, new):
        if repr(a) == repr(b):  # exact, and a nan is itself
            continue
        step = (a or b)[0]
        if a and b and a[0] != b[0]:
            return f"{a[0]} is {b[0]}"
        x, y = (repr(point[1]) if point else "none" for point in (a, b))
        return f"{step}: {x} -> {y}"
    return None


def read(path: Path) -> dict[str, Curve]:
    """Figure -> its curve over all steps of a run. Raises `ValueError` for what is no run's log."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        steps = [(f"{x['stage']} step {x['step']}", x) for x in lines]
        losses = [(step, float(x["loss"])) for step, x in steps]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{file}: not the metrics.jsonl of a run") from None
    if not losses:
        raise ValueError(f"{file}: no step in it")
    norms = [(step, x["grad_norm"]) for step, x in steps if x.get("grad_norm") is not None]
    return {"loss": losses, "gradient norm": norms}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.a), read(options.b)
    except ValueError as e:
        print(f"losses_equal: {e}", file=sys.stderr)
        return 2
    both = [what for what in old if old[what] and new[what]]
    found = {what: first_difference(old[what], new[what]) for what in both}
    for what, difference in found.items():
        if difference:
            print(f"differs  {what} of {difference}")
    if any(found.values()):
        return 1
    print(f"{len(old['loss'])} steps, equal to the last digit: {' and '.join(both)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
