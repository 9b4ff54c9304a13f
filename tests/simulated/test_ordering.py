"""Each call that orders streams is needed: the simulation notices when it is left out.

Which calls there are is found in the source; which scenarios come by is found by running them.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.simulated.covering import SCENARIOS, Scenario
from tests.simulated.mutations import Site, find_sites, left_out
from tests.simulated.scenarios import Result, same, simulated

SITES = find_sites()


@dataclass(frozen=True)
class Played:
    """What comes of a scenario with everything in its place."""

    result: Result
    peak: int
    reached: set[tuple[str, int]]  # lines that order streams

    def comes_by(self, site: Site) -> bool:
        first, last = site.lines
        return any(file == str(site.file) and first <= line <= last for file, line in self.reached)


@cache
def played(scenario: Scenario, model: Path, folder: Path) -> Played:
    with simulated() as sim:
        result = scenario(sim, model, folder)
    assert sim.alive == 0 and not sim.pinned
    return Played(result, sim.peak, sim.reached)


def noticed(site: Site, scenario: Scenario, model: Path, folder: Path) -> str:
    """What the simulation says when it is left out; empty if nothing."""
    as_it_is, wrong = played(scenario, model, folder), ""
    with left_out(site), simulated() as sim:
        try:
            result = scenario(sim, model, folder / "again")
        except Exception as e:  # whatever it leads to
            wrong = f"{type(e).__name__}: {e}"
    wrong = wrong or next(iter(sim.found), "")
    if not wrong and not same(result, as_it_is.result):
        wrong = "another result"
    if sim.alive or sim.pinned or sim.peak > as_it_is.peak:
        wrong = wrong or "more memory"
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ordering")


def test_they_are_found():
    """A few of each kind, whatever else there is."""
    found = {(site.file.name, site.function) for site in SITES}
    assert found >= {
        ("frozen.py", "Stream.fetch"), ("offload.py", "Offload.put"), ("host_memory.py",
        "_Pages.__del__"), ("host_state.py", "Shuttle.run"), ("optimizer.py", "AdamW.step"),
        ("hidden_cache.py", "Part.keep"), ("saving.py", "SavingTrainer._settled"),
        ("throughput.py", "gemm_rate"), ("planned.py", "PlannedTrainer._step_down"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_leaving_it_out_is_noticed(site, model_folder, folder):
    covering = [s for s in SCENARIOS if played(s, model_folder, folder).comes_by(site)]
    assert covering, "no scenario comes by"
    said = (noticed(site, scenario, model_folder, folder) for scenario in covering)
    found = next((text for text in said if text), "")
    print(f"{site.name}\n  -> {found}")
    assert found, f"nothing is noticed in {', '.join(s.__name__ for s in covering)}"
