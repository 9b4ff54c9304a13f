"""How the tests of `sandbox` run code at a level, and what of it is left afterwards."""

import os
import sys
import time
from pathlib import Path

import pytest

from xplus_fast.evaluation import sandbox

LEVELS = sandbox.LEVELS
SHUT = LEVELS[:2]  # of which the file system is shut
GIB = 1 << 30


def works(level):
    if missing := sandbox._missing(level):
        pytest.skip(f"this kernel does not permit it: {missing}")


def limited(code, level="namespaces", python=sys.executable, **options):
    """Run at just this level: those before it are what the system does not permit."""
    options = {"seconds": 30, "memory": 4 * GIB, "least": level, **options}
    with pytest.MonkeyPatch.context() as patch:
        missing = sandbox._missing
        before = LEVELS[: LEVELS.index(level)]
        patch.setattr(sandbox, "_missing", lambda x: "not here" if x in before else missing(x))
        return sandbox.run_limited([python, "-c", code], **options)


TRY = """
import os, sys, socket
def refused(what, *arguments):
    try:
        what(*arguments)
    except OSError as e:
        return True
    print("NOT REFUSED:", what, arguments)
"""


def all_refused(code, level, **options):
    got, said = limited(TRY + code, level, **options)
    assert got == 0 and "NOT REFUSED" not in said and said.splitlines()[-1] == "tried", said


def seconds(k):
    """A time to sleep that no other process of the machine names."""
    return f"{900 + k}.{os.getpid()}"


def running(what):
    """Command lines that hold a text, of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if what in line and sandbox.CONFINE.name not in line and "pytest" not in line:
            found.append(line)
    return found


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
