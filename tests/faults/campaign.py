"""Every operation on files of every scenario kills the command once, and fails it twice.

    python -m tests.faults.campaign FOLDER [--processes 2] [--sample N --seed S] [--only SCENARIO]

After each fault the same command is started again: it has to end well and to give, byte for byte,
what an undisturbed one gives. Cut off, the campaign goes on where it was, as long as neither the
package nor these files have changed. It ends with its figures, and with 1 where a case is bad.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.injected import KILLED, Fault
from tests.faults.scenarios import SCENARIOS, Scenario, Stage, make_shared, warm

ROOT = Path(__file__).parents[2]
# Always in a sample: before and after each rename by which a mark, a record, a checkpoint or a
# `final` comes or goes; of a restart, those of what is thrown away and begun
DECISIVE = {
    "train": r"run/(\.xplus-run|recipe\.yaml|run\.json)|run/\w+/\.?(checkpoint-\d|final)(\.tmp)?",
    "restart": r"run/\.?(xplus-run|recipe\.yaml|low|high|evaluation)(\.tmp)?",
    "export": r"exported",
    "evaluate": r"verdict/(model|verdict\.\w+)",
    "prepare": r"prepared/(manifest\.json|data-\d+\.parquet|\.xplus-prepare|\..work.tmp)",
}
GOOD = ("went on", "not needed")


@dataclass(frozen=True)
class Case:
    """A fault in a scenario; operation: what is hit, for the reader."""

    scenario: str
    k: int
    kind: str
    operation: str

    @property
    def name(self) -> str:
        return f"{self.scenario} {self.kind} {self.k} {self.operation}"


class Reference:
    """What an undisturbed command does and gives."""

    def __init__(self, scenario: Scenario, stage: Stage) -> None:
        stage.set(scenario)
        ran = stage.play(scenario.arguments)
        assert ran.code == 0, ran.said
        self.operations, self.results = ran.operations, stage.results()

    def cases(self, scenario: str) -> list[Case]:
        return [
            Case(scenario, k, kind, " ".join(operation))
            for k, operation in enumerate(self.operations)
            for kind in SCENARIOS[scenario].kinds
            if kind != "torn" or operation[0] == "write"
        ]


def judge(case: Case, reference: Reference, stage: Stage) -> tuple[str, str]:
    """Play a case: the verdict, one of `GOOD` or what is wrong, and particulars."""
    scenario = SCENARIOS[case.scenario]
    stage.set(scenario)
    hit = stage.play(scenario.arguments, Fault(case.k, case.kind))
    if case.kind in ("kill", "torn"):
        if hit.code != KILLED:
            return "not reached", f"ended with {hit.code}"
    elif hit.code == 0:  # the operation failed, and nothing came of it
        wrong = difference(reference.results, stage.results())
        return ("differing", wrong) if wrong else ("not needed", "")
    elif hit.code != 2 or not one_line(hit.said):
        return "not one line", hit.said[-2000:]
    again = stage.play(scenario.then or scenario.arguments)
    if again.code != 0:
        return "stuck", f"{again.code}: {again.said[-2000:]}"
    wrong = difference(reference.results, stage.results())
    return ("differing", wrong) if wrong else ("went on", "")


def one_line(said: str) -> bool:
    """Whether the last line is ours, and the only one of its kind."""
    lines = said.rstrip("\n").split("\n")
    ours = [line for line in lines if line.startswith("xplus-fast: ")]
    return ours == lines[-1:] and "Traceback" not in said


def difference(there: dict[str, bytes], here: dict[str, bytes]) -> str:
    """The names of the files that are not alike; empty if all are."""
    return ", ".join(sorted(n for n in {*there, *here} if there.get(n) != here.get(n))[:10])


def choose(references: dict[str, Reference], count: int, seed: int) -> list[Case]:
    """A sample: a kill at each decisive moment, and `count` of all other cases."""
    decisive, others = [], []
    for name, found in references.items():
        moments = {
            k + after
            for k, (kind, path) in enumerate(found.operations)
            if kind == "rename" and re.fullmatch(DECISIVE.get(name, ""), path)
            for after in (0, 1)
        }
        for case in found.cases(name):
            (decisive if case.kind == "kill" and case.k in moments else others).append(case)
    return decisive + random.Random(seed).sample(others, min(count, len(others)))


def digest() -> str:
    """Of all that a result depends on."""
    found = hashlib.sha256()
    folders = (ROOT / "xplus_fast", ROOT / "kernels", ROOT / "tests/faults")
    for file in sorted(f for folder in folders for f in folder.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="kill every operation on files once")
    parser.add_argument("folder", type=Path, help="for the states and what was found so far")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sample", type=int, help="besides the decisive moments, so many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    done = folder / f"{digest()[:16]}.jsonl"
    sys.dont_write_bytecode = True
    started = time.monotonic()
    warm()
    shutil.rmtree(folder / "shared", ignore_errors=True)
    make_shared(folder / "shared")
    stage = Stage(folder / "shared", folder / "stage")
    references = {name: Reference(SCENARIOS[name], stage) for name in options.only}
    if options.sample is None:
        cases = [case for name, found in references.items() for case in found.cases(name)]
    else:
        cases = choose(references, options.sample, options.seed)
    known = {tuple(line["case"].values()): line for line in read(done)}
    todo = [case for case in cases if tuple(asdict(case).values()) not in known]
    print(f"{len(cases)} cases, {len(cases) - len(todo)} of them done before", flush=True)
    workers = []
    for i in range(options.processes):
        if not (child := os.fork()):
            work(todo[i :: options.processes], references, folder, i, done)
            os._exit(0)
        workers.append(child)
    failed = follow(workers, done, cases, started)
    return report(cases, done, references, time.monotonic() - started) or failed


def work(
    cases: list[Case], references: dict[str, Reference], folder: Path, number: int, done: Path
) -> None:
    stage = Stage(folder / "shared", folder / f"stage-{number}")
    for case in cases:
        verdict, detail = judge(case, references[case.scenario], stage)
        line = {"case": asdict(case), "verdict": verdict, "detail": detail}
        with done.open("a") as out:
            out.write(json.dumps(line) + "\n")
        if verdict not in GOOD:
            print(f"BAD  {case.name}: {verdict}: {detail}", flush=True)


def follow(workers: list[int], done: Path, cases: list[Case], started: float) -> int:
    """Wait for the workers, telling how far they are; whether one of them failed."""
    failed, told = 0, started
    while workers:
        child, status = os.waitpid(workers[0], os.WNOHANG)
        if child:
            workers.pop(0)
            failed |= status != 0
        elif time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"{len(read(done))} of {len(cases)}, {told - started:.0f} s", flush=True)
        else:
            time.sleep(0.1)
    return failed


def read(done: Path) -> list[dict]:
    if not done.exists():
        return []
    return [json.loads(line) for line in done.read_text().split("\n")[:-1]]


def report(cases: list[Case], done: Path, references: dict[str, Reference], seconds: float) -> int:
    """Print the figures, as docs/faults.md has them."""
    found = {tuple(line["case"].values()): line["verdict"] for line in read(done)}
    table: dict[str, Counter[str]] = {name: Counter() for name in references}
    for case in cases:
        verdict = found.get(tuple(asdict(case).values()), "not played")
        table[case.scenario][f"{case.kind}: {verdict}"] += 1
    for name, counts in table.items():
        print(f"{name}: {len(references[name].operations)} operations")
        for what, n in sorted(counts.items()):
            print(f"  {n:5} {what}")
    bad = sum(n for c in table.values() for what, n in c.items() if not what.endswith(GOOD))
    print(f"{len(cases)} cases in {seconds:.0f} s, {bad} of them bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
