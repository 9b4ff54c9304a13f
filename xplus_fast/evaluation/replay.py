"""lm-evaluation-harness without a model: its tasks' code judges answers that are there already.

    python -I replay.py look TASK... [--include_path DIR]     # JSON: which tasks execute code
    python -I replay.py run ANSWERS [options of `lm_eval run`]

Run by its path in the Python that has the harness, which need not have this project: it imports
nothing of it. In `run`, the answers are those that the harness logged in the folder ANSWERS, so
that code which a model wrote is executed where no model, no GPU and no network is.
"""

import json
import sys
from pathlib import Path
from typing import Any


def look(names: list[str], include_path: str | None) -> dict[str, Any]:
    """name -> {"known", "executes", "judges"}.

    known: whether the harness has it. executes: those of its tasks that execute code; judges: those
    of them that would do so where only answers are asked for.
    """
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=include_path).task_index

    def inside(name: str, seen: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
        """The configurations of a task, or of all tasks of a group or tag."""
        entry = index.get(name)
        if entry is None or name in seen:
            return []
        config = entry.cfg
        if config and "group" not in config:
            return [config]
        children = config["task"] if config else sorted(entry.tags)
        names = [c if isinstance(c, str) else c.get("task", "") for c in children]
        return [found for c in names for found in inside(c, seen | {name})]

    found = {}
    for name in names:
        unsafe = [c for c in inside(name) if c.get("unsafe_code")]
        found[name] = {
            "known": name in index,
            "executes": [c["task"] for c in unsafe],
            "judges": [c["task"] for c in unsafe if "process_results" in c],
        }
    return found


def run(answers: Path, options: list[str]) -> None:
    """`lm_eval run` with a model that repeats what is logged."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    logged: dict[tuple[str, int], list[list[str]]] = {}
    for file in answers.glob("**/samples_*.jsonl"):
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_bytes().splitlines():  # of bytes: only line ends of ASCII
            sample = json.loads(line)
            logged[task, sample["doc_id"]] = sample["resps"]

    @register_model("replay")
    class Replay(LM):
        def __init__(self, **_: Any) -> None:  # of batches and devices, which it has none of
            super().__init__()

        def generate_until(self, requests: list[Any]) -> list[str]:
            given: dict[tuple[str, int, int], int] = {}
            texts = []
            for request in requests:  # a repeated one takes the next of its answers
                key = (request.task_name, request.doc_id, request.idx)
                given[key] = given.get(key, -1) + 1
                texts.append(logged[key[:2]][request.idx][given[key]])
            return texts

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise NotImplementedError("a task that executes code asks for text")

        loglikelihood_rolling = loglikelihood

    sys.argv = ["lm_eval", "run", "--model", "replay", *options]
    cli_evaluate()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "look":
        folder = rest[rest.index("--include_path") + 1] if "--include_path" in rest else None
        names = rest[: rest.index("--include_path")] if folder else rest
        print(json.dumps(look(names, folder)))
    else:
        run(Path(rest[0]), rest[1:])
