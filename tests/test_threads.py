"""Threads sleep while they wait where the machine is busy, and only there."""

import os

import pytest

from xplus_fast import threads


@pytest.fixture
def free(monkeypatch, tmp_path):
    """Nobody has decided; four cores."""
    for name in threads.ASKED:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return tmp_path / "loadavg"


@pytest.mark.parametrize(("running", "sleep"), [(1, False), (2, True), (5, True)])
def test_only_where_others_run(free, running, sleep):
    free.write_text(f"0.50 0.40 0.30 {running}/321 4711\n")
    threads.sleep_where_busy(str(free))
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if sleep else None)
    assert os.environ.get("KMP_BLOCKTIME") == ("0" if sleep else None)


def test_many_cores_with_one_at_work_are_not_busy(free, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    free.write_text("0.50 0.40 0.30 9/321 4711\n")
    threads.sleep_where_busy(str(free))
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_user_has_decided_or_there_is_no_such_file(free, monkeypatch):
    threads.sleep_where_busy(str(free))
    assert "OMP_WAIT_POLICY" not in os.environ
    free.write_text("0.50 0.40 0.30 9/321 4711\n")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    threads.sleep_where_busy(str(free))
    assert "OMP_WAIT_POLICY" not in os.environ
