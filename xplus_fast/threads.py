"""How OpenMP's threads wait: they spin, which is fastest alone, and takes the cores from each other
where other work runs, too."""

import os
import time

ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of a user who has decided
LOOKS, APART = 5, 0.01  # how often it is counted what runs, seconds between
BUSY = 0.25  # others that run, a core


def sleep_where_busy(file: str = "/proc/loadavg") -> None:
    """Let threads sleep while they wait, where the machine is busy now.

    Before torch is loaded, as its OpenMP reads the environment then. Measured: docs/log.md.
    """
    if any(name in os.environ for name in ASKED):
        return
    others = []
    for look in range(LOOKS):
        if look:
            time.sleep(APART)
        try:
            with open(file) as f:
                others.append(int(f.read().split()[3].partition("/")[0]) - 1)  # less ourselves
        except OSError:  # no Linux
            return
    if min(others) >= max(1, BUSY * (os.cpu_count() or 1)):
        os.environ |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
