"""Two results of a benchmark, before and after: what became slower by more than 5 %.

    python -m benchmarks.compare OLD.json NEW.json           (--same-losses: and all else as it was)

Compares the rows that both have: of `benchmarks.training.race` by tokens/s and peak memory, of
`benchmarks.kernels.measure` by time. Of training it also says whether losses and gradient norms are
equal to the last bit, as they are after a change that claims to compute the same. Exit code 1:
something became worse, or differs under --same-losses; 2: nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.losses_equal import first_difference

WORSE = 0.05


def figures(result: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Name -> (value, whether more is better)."""
    found: dict[str, tuple[float, bool]] = {}
    for row in result["rows"]:
        if "contestant" in row and row.get("status") == "ok":
            name = f"{row['stage']} {row['mix']}: {row['contestant']}"
            found[f"{name}, tokens/s"] = (row["tokens_per_s"], True)
            if row.get("peak"):
                found[f"{name}, peak bytes"] = (row["peak"]["allocated"], False)
        elif "op" in row and row.get("ms"):
            parts = (row[k] for k in ("op", "way", "size", "tokens", "provider"))
            found[" ".join(map(str, parts)) + ", ms"] = (row["ms"], False)
    return found


def curves(result: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Name -> losses and gradient norms of every step."""
    return {
        f"{row['stage']} {row['mix']}: {row['contestant']}": [row["losses"], row["grad_norms"]]
        for row in result["rows"]
        if row.get("status") == "ok" and "losses" in row
    }


def compare_curves(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Say of each contestant that both have whether its numbers are equal; how many differ."""
    before, after = curves(old), curves(new)
    both = [name for name in before if name in after]
    differing = 0
    for name in both:
        pairs = zip(("loss", "gradient norm"), before[name], after[name], strict=True)
        for what, *two in pairs:
            a, b = ([(f"step {i}", x) for i, x in enumerate(curve, 1)] for curve in two)
            if found := first_difference(a, b):
                differing += 1
                print(f"differs  {name}: {what} of {found}")
                break
    if both:
        print(f"{len(both) - differing} of {len(both)} loss curves are equal to the last bit")
    return differing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--same-losses", action="store_true", help="fail where one differs")
    options = parser.parse_args(arguments)
    read = []
    for path in (options.old, options.new):
        try:
            read.append(json.loads(path.read_text()))
            assert "rows" in read[-1]
        except (OSError, ValueError, AssertionError):
            print(f"compare: {path}: not a result of train or kernels", file=sys.stderr)
            return 2
    if (a := read[0].get("device")) != (b := read[1].get("device")):
        print(f"compare: not on one card: {a} and {b}", file=sys.stderr)
        return 2
    old, new = map(figures, read)
    both = [name for name in old if name in new]
    if not both:
        print("compare: no figure that both have", file=sys.stderr)
        return 2
    worse = 0
    for name in both:
        (before, more), (after, _) = old[name], new[name]
        change = after / before - 1
        bad = (-change if more else change) > WORSE
        worse += bad
        if bad or abs(change) > WORSE:
            word = "WORSE " if bad else "better"
            print(f"{word} {change:+7.1%}  {name}: {before:g} -> {after:g}")
    print(f"{worse} of {len(both)} figures are worse by more than {WORSE:.0%}")
    differing = compare_curves(*read)
    return int(worse > 0 or (options.same_losses and differing > 0))


if __name__ == "__main__":
    sys.exit(main())
