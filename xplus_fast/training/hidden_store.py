"""Where hidden states lie from one epoch to the next: on the host, or in two files of a folder.

`states.bin` holds W bytes a token, each at its place, and `checks.bin` a CRC-32 of them, 0 where
there are none. A state is written before its checksum and read only with it: killed at any moment,
cut short or with a bit flipped, what is not whole is computed again. So nothing has to be written
at once, no list of what is there has to be kept, and several processes write into the same files,
each at its own places.

The files are read and written with the system's calls, not through a memory map: with one, a disk
that is full or fails and a file that was cut short are signals, which end the process. The disk is
told what will be read a step before.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from xplus_fast.errors import UserError
from xplus_fast.files import PlacedFile

Runs = list[tuple[int, int]]  # place of the first, number, of tokens that follow one another
STATES, CHECKS = "states.bin", "checks.bin"


class Store(Protocol):
    """Where states lie: W bytes a token."""

    say: Callable[[str], None]

    def has(self, runs: Runs) -> bool:
        """Whether all are there, as far as is known without reading them."""

    def read(self, runs: Runs, out: np.ndarray) -> bool:
        """Fill out, uint8 [T, W]; whether all were there and whole."""

    def write(self, runs: Runs, states: np.ndarray) -> None:
        """states: uint8 [T, W]."""

    def expect(self, runs: Runs) -> None:
        """They will be read soon."""


class InMemory:
    """States in the host's memory, which is taken as they come."""

    def __init__(self, places: int, width: int) -> None:
        self.say: Callable[[str], None] = print
        try:
            self.states = np.zeros((places, width), np.uint8)
        except MemoryError:
            raise UserError(
                f"data.cache_hidden: {places * width:,} bytes of host memory cannot be had; a"
                " folder may hold them"
            ) from None
        self.there = np.zeros(places, np.bool_)

    def has(self, runs: Runs) -> bool:
        return all(self.there[at : at + n].all() for at, n in runs)

    def read(self, runs: Runs, out: np.ndarray) -> bool:
        row = 0
        for at, n in runs:
            out[row : row + n] = self.states[at : at + n]
            row += n
        return True

    def write(self, runs: Runs, states: np.ndarray) -> None:
        row = 0
        for at, n in runs:
            self.states[at : at + n] = states[row : row + n]
            self.there[at : at + n] = True
            row += n

    def expect(self, runs: Runs) -> None:
        """They are there."""


class InFolder:
    """States in two files of a folder, whatever happens to these.

    A disk that fails or is full is said once, and costs no more than the states.
    """

    def __init__(self, folder: Path, places: int, width: int) -> None:
        self.folder, self.width = folder, width
        self.say: Callable[[str], None] = print
        self.checks = np.zeros(places, np.uint32)
        try:
            self._states, self._checks = (PlacedFile(folder / n) for n in (STATES, CHECKS))
            self._checks.read(0, self.checks.data.cast("B"))
        except OSError as e:
            raise UserError(f"{folder}: cannot be used ({e.strerror or e})") from None
        self._full = False
        self._said: set[str] = set()

    def has(self, runs: Runs) -> bool:
        return all(self.checks[at : at + n].all() for at, n in runs)

    def read(self, runs: Runs, out: np.ndarray) -> bool:
        row, damaged = 0, 0
        for at, n in runs:
            part = out[row : row + n]
            try:
                size = self._states.read(at * self.width, part.data.cast("B"))
            except OSError as e:
                size = 0
                self._tell(f"cannot be read ({e.strerror or e})")
            whole = _checksums(part) == self.checks[at : at + n]
            whole[size // self.width :] = False
            self.checks[at : at + n][~whole] = 0
            damaged += int((~whole).sum())
            row += n
        if damaged:
            self._tell("damaged, does not match its checksums")
        return not damaged

    def write(self, runs: Runs, states: np.ndarray) -> None:
        if self._full:
            return
        row = 0
        for at, n in runs:
            part, checks = states[row : row + n], self.checks[at : at + n]
            checks[:] = 0
            try:
                self._states.write(at * self.width, part.data.cast("B"))
                new = _checksums(part)
                self._checks.write(at * new.itemsize, new.data.cast("B"))
            except OSError as e:
                self._full = True
                self._tell(f"cannot be written ({e.strerror or e}), no more is kept")
                return
            checks[:] = new
            row += n

    def expect(self, runs: Runs) -> None:
        for at, n in runs:
            self._states.expect(at * self.width, n * self.width)

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(f"hidden states: {self.folder}: {what}: what is not there is computed")

    def __del__(self) -> None:
        for file in ("_states", "_checks"):
            if hasattr(self, file):
                getattr(self, file).close()


def _checksums(states: np.ndarray) -> np.ndarray:
    """CRC-32 of each row of uint8 [n, W], none of them 0."""
    return np.fromiter((zlib.crc32(row) or 1 for row in states), np.uint32, len(states))
