"""The live line, against a clock that the test winds."""

import io
import os

import pytest

from xplus_fast.progress import LiveLine, WorkLine, duration, si


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def stream(tty, monkeypatch=None, columns=200):
    made = io.StringIO()
    made.isatty = lambda: tty
    if monkeypatch is not None:
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    return made


def line(step, **changes):
    made = {
        "stage": "bottom", "step": step, "steps": 40, "loss": 2.3144, "grad_norm": 1.234,
        "learning_rate": 9.8e-5, "tokens": 1024,
        "tokens_computed": 1024, "supervised": 300, "tokens_seen": 1024 * step,
        "seconds": 2.0, "tokens_per_second": 512.0, "mfu": 0.43, "memory_bytes": 1_900_000_000,
    }  # fmt: skip
    return {**made, **changes}


def test_every_field(clock, monkeypatch):
    out = stream(True, monkeypatch)
    live = LiveLine("bottom", 40, out, clock)
    live.update(line(12))
    assert out.getvalue() == (
        "\rbottom 12/40  loss 2.314  512 tok/s  12.3k tokens  eta 0:56  mem 1.9 GB  mfu 43 %"
        "  |g| 1.23  lr 9.8e-05"
    )
    live.close()
    live.close()
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")


def test_computed_tokens_stand_beside_those_of_the_data(clock, monkeypatch):
    out = stream(True, monkeypatch)
    LiveLine("bottom", 40, out, clock).update(line(1, tokens_computed=512))
    assert "  512 tok/s (256 computed)  1.02k tokens  " in out.getvalue()


def test_unknown_figures_are_left_out(clock, monkeypatch):
    out = stream(True, monkeypatch)
    LiveLine("bottom", 40, out, clock).update(
        line(1, mfu=None, memory_bytes=None, loss=float("nan"))
    )
    assert "mfu" not in out.getvalue() and "mem" not in out.getvalue()
    assert "loss nan" in out.getvalue()


def test_speed_and_eta_follow_the_wall_clock_of_recent_steps(clock, monkeypatch):
    out = stream(True, monkeypatch)
    live = LiveLine("bottom", 1000, out, clock)
    for step in range(1, 21):  # each logs 2 s, but 8 s pass on average from one to the next
        live.update(line(step, steps=1000))
        clock.now += 4.0 if step <= 10 else 12.0
    live.update(line(21, steps=1000))  # the first one's 2 s have left the window
    shown = out.getvalue().rpartition("\r")[2]
    assert "  128 tok/s  " in shown and f"  eta {duration(979 * 8)}  " in shown
    assert "  eta 2:10:32  " in shown


def test_rewrites_in_place_and_leaves_no_rest_of_a_longer_line(clock, monkeypatch):
    out = stream(True, monkeypatch)
    live = LiveLine("bottom", 40, out, clock)
    live.update(line(9))
    clock.now += 2
    live.update(line(10, mfu=None))
    first, second = out.getvalue().split("\r")[1:]
    assert len(second) == len(first) and second.endswith("lr 9.8e-05" + " " * 9)
    assert "\n" not in out.getvalue()


@pytest.mark.parametrize("columns", [10, 40, 80, 107, 108])
def test_narrow_terminal_loses_whole_fields(clock, monkeypatch, columns):
    out = stream(True, monkeypatch, columns)
    LiveLine("bottom", 40, out, clock).update(line(12))
    shown = out.getvalue()[1:]
    whole = stream(True, monkeypatch)
    LiveLine("bottom", 40, whole, clock).update(line(12))
    whole = whole.getvalue()[1:]
    assert len(shown) < columns and whole.startswith(shown)
    if columns >= 40:
        rest = whole[len(shown) :]
        assert rest == "" or rest.startswith("  ")
        following = rest[2:].split("  ")[0]  # cut no earlier than necessary
        assert rest == "" or len(shown) + 2 + len(following) > columns - 1


def test_pipe_gets_first_last_and_one_line_in_ten_seconds(clock):
    out = stream(False)
    live = LiveLine("bottom", 40, out, clock)
    for step in range(1, 41):
        live.update(line(step))
        clock.now += 3.0
    live.close()
    lines = out.getvalue().splitlines()
    # at 0 s, then at the first step 10 s or more after the line before
    assert [text.split()[1] for text in lines] == [
        *(f"{step}/40" for step in range(1, 41, 4)),
        "40/40",
    ]
    assert "\r" not in out.getvalue() and lines[0].endswith("lr 9.8e-05")


def test_pipe_gets_the_step_at_which_training_broke_off(clock):
    out = stream(False)
    live = LiveLine("bottom", 40, out, clock)
    for step in (1, 2, 3):
        live.update(line(step))
        clock.now += 1.0
    live.close()
    live.close()
    assert [text.split()[1] for text in out.getvalue().splitlines()] == ["1/40", "3/40"]


def test_no_step_no_output(clock):
    for tty in (True, False):
        out = stream(tty)
        LiveLine("bottom", 40, out, clock).close()
        assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (570.4, "570"), (999.4, "999"), (999.6, "1.00k"), (1024, "1.02k"),
        (12_288, "12.3k"), (99_960, "100k"), (999_600, "1.00M"), (1.5e6, "1.50M"),
        (814e6, "814M"), (14.77e9, "14.8G"), (2.5e13, "25000G"),
    ],
)  # fmt: skip
def test_si(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (52.4, "0:52"), (59.6, "1:00"), (3599.7, "1:00:00"), (100_000, "27:46:40")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


WORK = [("held-out en-fr", "loss", 1), ("held-out en-fr", "loss", 1), ("translating", "more", 4),
        ("translating", "more", 4)]  # fmt: skip


def worked(clock, out, seconds):
    with WorkLine({"loss": 2, "more": 8}, stream=out, clock=clock) as work:
        for (what, kind, count), spent in zip(WORK, seconds, strict=True):
            work.begin(what, kind)
            clock.now += spent
            work.update(count)


def test_work_of_two_kinds_says_what_is_left_of_each(clock, monkeypatch):
    """Of a kind that has not begun nothing is known; each kind has its own speed."""
    out = stream(True, monkeypatch)
    worked(clock, out, [3, 3, 40, 40])
    shown = [text.strip() for text in out.getvalue().split("\r") if text.strip()]
    assert shown == [
        "held-out en-fr  0/10",
        "held-out en-fr  1/10  more than 0:03 left", "held-out en-fr  1/10  more than 0:03 left",
        "held-out en-fr  2/10", "translating  2/10", "translating  6/10  0:40 left",
        "translating  6/10  0:40 left", "translating  10/10",
    ]  # fmt: skip
    assert out.getvalue().endswith(" \r")  # nothing of it stays


def test_work_in_a_pipe_is_told_every_ten_seconds(clock):
    out = stream(False)
    worked(clock, out, [1, 1, 1, 1])  # soon done: nothing
    assert out.getvalue() == ""
    worked(clock, out, [8, 8, 40, 1])
    assert out.getvalue().splitlines() == [
        "held-out en-fr  2/10", "translating  6/10  0:40 left",
    ]  # fmt: skip
    work = WorkLine({"loss": 1}, show=False, stream=out, clock=clock)
    work.begin("x", "loss")
    clock.now += 60
    work.update()
    assert len(out.getvalue().splitlines()) == 2
