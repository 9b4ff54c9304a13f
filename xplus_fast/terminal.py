"""Standard output and error that end no command: full, closed, or of another alphabet.

Hours of training are worth more than what is said of them: what cannot be written is dropped, the
command goes on, and in the end one line and the exit code tell.
"""

import io
import os
import re
import sys
from typing import Any

LONGEST = 800  # characters of an error
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Stream(io.TextIOBase):
    """A standard stream; its first fault is kept, not raised."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.fault = "" if stream is not None else "it is closed"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except (OSError, ValueError, AttributeError) as e:  # full; closed; never there
            self._note(e)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError, AttributeError) as e:
            self._note(e)

    def isatty(self) -> bool:
        return self.stream is not None and not self.fault and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    def _note(self, e: Exception) -> None:
        self.fault = self.fault or getattr(e, "strerror", None) or str(e)

    def settle(self) -> None:
        """Write what is left; of a stream that cannot be written, leave nothing to Python's end."""
        self.flush()
        if self.fault and self.stream is not None:
            try:
                number = self.stream.fileno()
            except (OSError, ValueError):
                return
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class StandardStreams:
    """In a `with` block, `sys.stdout` and `sys.stderr` never raise; `lost` says what failed."""

    lost = ""

    def __enter__(self) -> "StandardStreams":
        for number in range(3):  # or the next file that is opened takes the number, and the prints
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
        self.before = sys.stdout, sys.stderr
        self.out, self.err = _Stream(sys.stdout), _Stream(sys.stderr)
        sys.stdout, sys.stderr = self.out, self.err
        return self

    def __exit__(self, *_: Any) -> None:
        self.out.settle()
        if self.out.fault and self.out.stream is not None:
            self.lost = f"standard output cannot be written ({self.out.fault})"
            print(f"xplus-fast: {self.lost}; the command went on without it", file=self.err)
        self.err.settle()
        if self.err.fault and self.err.stream is not None:
            self.lost = self.lost or f"standard error cannot be written ({self.err.fault})"
        sys.stdout, sys.stderr = self.before


def one_line(text: str) -> str:
    """A text without line ends and what else a terminal would obey, these as escapes, and without
    the middle of one that is very long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return _CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode(), text)
