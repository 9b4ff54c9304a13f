"""The live line: where a stage stands, rewritten in place on a terminal, a plain line elsewhere."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

_PLAIN_EVERY = 10.0  # seconds between lines where nothing can be rewritten: a file, a pipe
_RECENT = 20  # steps that speed and ETA are averaged over


class _Line:
    """A line that is rewritten in place on a terminal; elsewhere a plain one, now and then.

    stream: written to, flushed at once. clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO | None, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.stream = stream if stream is not None else sys.stderr  # the one of now, not of import
        self.tty = self.stream.isatty()
        self.written_at = float("-inf")  # when the last plain line was written
        self.drawn = 0  # characters standing on the terminal's line
        self.unwritten = ""  # a plain line held back, for it came too soon

    def show(self, fields: list[str], *, at_once: bool = False) -> None:
        """Show fields, the most wanted first. at_once: also where a plain line would wait."""
        if self.tty:
            # One column stays free: writing the last one wraps on some terminals
            text = _fit(fields, shutil.get_terminal_size().columns - 1)
            self.stream.write("\r" + text.ljust(self.drawn))
            self.stream.flush()
            self.drawn = len(text)
            return
        self.unwritten = "  ".join(fields)
        now = self.clock()
        if at_once or now - self.written_at >= _PLAIN_EVERY:
            self._write_plain(now)

    def _write_plain(self, now: float) -> None:
        self.stream.write(self.unwritten + "\n")
        self.stream.flush()
        self.written_at, self.unwritten = now, ""


class WorkLine(_Line):
    """How far some work of several kinds is, and how long the rest will take.

    total: of each kind, how much there is. show: False shows nothing.
    """

    def __init__(
        self, total: dict[str, int], *, show: bool = True, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(stream, clock)
        self.total, self.shown = total, show
        self.done = dict.fromkeys(total, 0)
        self.seconds = dict.fromkeys(total, 0.0)
        self.written_at = self.since = clock()  # what is soon done needs no plain line
        self.what = self.kind = ""

    def __enter__(self) -> "WorkLine":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of the line stays."""
        if self.drawn:
            self.stream.write("\r" + " " * self.drawn + "\r")
            self.stream.flush()

    def begin(self, what: str, kind: str) -> None:
        """Go on with work of a kind, under another name."""
        self.what, self.kind = what, kind
        self._tell()

    def update(self, count: int = 1) -> None:
        """Some of it is done."""
        now = self.clock()
        self.seconds[self.kind] += now - self.since
        self.done[self.kind] += count
        self.since = now
        self._tell()

    def _tell(self) -> None:
        if not self.shown:
            return
        left = {kind: n - self.done[kind] for kind, n in self.total.items() if n > self.done[kind]}
        known = [kind for kind in left if self.done[kind]]
        rest = sum(left[kind] * self.seconds[kind] / self.done[kind] for kind in known)
        fields = [self.what, f"{sum(self.done.values())}/{sum(self.total.values())}"]
        if known:  # of the others nothing is known yet
            more = "more than " if len(known) < len(left) else ""
            fields.append(f"{more}{duration(rest)} left")
        self.show(fields)


class LiveLine(_Line):
    """Shows the lines of metrics.jsonl as they are made; one object a stage.

    stage: its name. steps: how many it has. Speed and ETA are by `clock`, so time spent saving
    checkpoints counts.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream, clock)
        self.stage, self.steps = stage, steps
        # tokens of a step, those computed, seconds
        self.recent: deque[tuple[int, int, float]] = deque(maxlen=_RECENT)
        self.seen_at: float | None = None  # when the last update came

    def update(self, line: dict[str, Any]) -> None:
        """Show one optimizer step, given as its line of metrics.jsonl."""
        now = self.clock()
        elapsed = line["seconds"] if self.seen_at is None else now - self.seen_at
        self.seen_at = now
        self.recent.append((line["tokens"], line["tokens_computed"], elapsed))
        self.show(self._fields(line), at_once=line["step"] >= self.steps)

    def close(self) -> None:
        """End the line, so that what is printed next starts on its own."""
        if self.drawn:
            self.stream.write("\n")
            self.stream.flush()
            self.drawn = 0
        if self.unwritten:  # stopped between two lines: show how far it came
            self._write_plain(self.clock())

    def _fields(self, line: dict[str, Any]) -> list[str]:
        """What is shown, the most wanted first: a narrow terminal loses the last ones."""
        tokens, computed, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        speed = tokens / seconds if seconds > 0 else line["tokens_per_second"]
        apart = f" ({si(speed * computed / tokens)} computed)" if computed != tokens else ""
        eta = (self.steps - line["step"]) * seconds / len(self.recent)
        of = [
            f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/")
        ]
        fields = [
            f"{self.stage} {line['step']}/{self.steps}",
            f"loss {line['loss']:.3f}" + (f" ({', '.join(of)})" if of else ""),
            f"{si(speed)} tok/s{apart}",
            f"{si(line['tokens_seen'])} tokens",
            f"eta {duration(eta)}",
        ]
        if line["memory_bytes"] is not None:
            fields.append(f"mem {line['memory_bytes'] / 1e9:.1f} GB")
        if line["mfu"] is not None:
            fields.append(f"mfu {100 * line['mfu']:.0f} %")
        return [*fields, f"|g| {line['grad_norm']:.3g}", f"lr {line['learning_rate']:.1e}"]


def si(number: float) -> str:
    """Three digits and a letter: 570, 12.3k, 1.50M, 814M, 2.00G."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            break
        number /= 1000
    # As many decimals as make three digits, and none on plain counts
    decimals = 0 if unit == "" or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{decimals}f}{unit}"


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def _fit(fields: list[str], width: int) -> str:
    """As many whole fields as the width holds; the first one is cut if even that is too long."""
    text = fields[0][:width]
    for field in fields[1:]:
        if len(text) + 2 + len(field) > width:
            break
        text += "  " + field
    return text
