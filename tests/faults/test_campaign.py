"""A seeded sample of the fault campaign, with every moment around marks, checkpoints and `final`.

All of it is `make test-faults`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.assets import qwen_tokenizer_folder

ROOT = Path(__file__).parents[2]
# An export that is made in its place: a kill leaves half of it there
PLANTED = """
import contextlib, sys
from tests.faults import campaign
from xplus_fast.training import export

@contextlib.contextmanager
def new_folder(final, needed):
    final.mkdir(exist_ok=True)
    yield final

export.new_folder = new_folder
sys.exit(campaign.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def needs():
    qwen_tokenizer_folder()
    pytest.importorskip("py3langid", reason="`prepare` identifies languages")


def played(*command):
    ran = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = re.search(r"(\d+) cases in \d+ s, (\d+) of them bad", ran.stdout)
    assert found, ran.stdout + ran.stderr
    return ran, int(found[1]), int(found[2])


def test_a_sample(tmp_path):
    ran, cases, bad = played(
        "-m", "tests.faults.campaign", tmp_path, "--processes", 1, "--sample", 48
    )
    assert ran.returncode == 0 and bad == 0, ran.stdout
    assert cases >= 100


def test_the_campaign_finds_a_writer_that_is_not_safe(tmp_path):
    ran, cases, bad = played(
        "-c", PLANTED, tmp_path, "--processes", 1, "--sample", 16, "--only", "export"
    )
    assert ran.returncode == 1 and 0 < bad <= cases
    assert re.search(r"BAD  export kill \d+ .*: stuck: .*exists already", ran.stdout)
