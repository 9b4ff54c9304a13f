"""What code that a model wrote may take, how it ends, and where it is not executed at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.evaluation.shut_in import LEVELS, TRY, limited, running, seconds, until, works
from xplus_fast.errors import UserError
from xplus_fast.evaluation import sandbox

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"

BOMB = """
import os, time
made = 0
try:
    while made < 5000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as e:
    print(made, e.strerror, flush=True)
    os._exit(0)
time.sleep(30)
"""


def test_forks_are_refused(apart):
    code, said = limited(BOMB)
    made, why = said.split(" ", 1)
    assert code == 0 and 300 < int(made) < sandbox.PROCESSES and "unavailable" in why


@pytest.mark.parametrize("level", LEVELS[1:])
def test_where_forks_are_not_refused_all_is_stopped(level, monkeypatch):
    works(level)
    monkeypatch.setattr(sandbox, "PROCESSES", 40)
    start = time.monotonic()
    with pytest.raises(UserError, match="stopped: it ran more than 40 processes and threads"):
        limited(BOMB.replace("5000", "200").replace("60", seconds(0)), level)
    assert time.monotonic() - start < 20
    assert running(f"time.sleep({seconds(0)})") == []


def test_memory_of_all_processes_together(level):
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(b"x") * (150 << 20)
        time.sleep(30)
        os._exit(0)
time.sleep(30)
"""
    start = time.monotonic()
    with pytest.raises(UserError, match=r"stopped: its processes together took more than 0.5 GB"):
        limited(code, level, memory=500_000_000)
    assert time.monotonic() - start < 20


def test_what_forked_processes_share_counts_once(apart):
    code = """
import os, time
x = bytearray(b"x") * (200 << 20)
children = []
for _ in range(5):
    if (pid := os.fork()) == 0:
        time.sleep(1)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
print("done")
"""
    assert limited(code, memory=500_000_000) == (0, "done\n")


# what it says, how long it runs


def test_output_is_bounded_in_length_and_in_memory(tmp_path, level):
    driver = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from xplus_fast.errors import UserError
from xplus_fast.evaluation import sandbox
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    sandbox.run_limited([sys.executable, "-c", "import sys\\nfor _ in range(1000):"
        " sys.stdout.write('x' * 1_000_000)"], seconds=60, memory=1 << 32, least={level!r})
except UserError as e:
    print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 20)
"""
    ran = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True)
    assert ran.stdout == "stopped: it printed more than 67 MB\nTrue\n", ran.stderr
    code, said = limited("print('a' * 100_000 + 'end')", level)
    assert code == 0 and said.endswith("aend\n") and len(said) == sandbox.TAIL


DAEMON = """
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(NUMBER)"],
                     start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os._exit(0)
"""


def test_time_is_up_for_all_that_was_started(level):
    for number, end in (
        (seconds(1), "while True: pass"),
        (seconds(2), "os.close(1); os.close(2)\ntime.sleep(60)"),
    ):
        start = time.monotonic()
        with pytest.raises(UserError, match=r"stopped after 2 seconds \(reasoning.code_seconds\)"):
            limited(DAEMON.replace("NUMBER", str(number)) + end, level, seconds=2)
        assert time.monotonic() - start < 15
        assert running(f"time.sleep({number})") == []


def test_what_is_left_behind_ends_with_the_command(level):
    start = time.monotonic()
    code, said = limited(DAEMON.replace("NUMBER", seconds(3)) + "print('bye')", level)
    assert (code, said) == (0, "bye\n") and time.monotonic() - start < 15
    assert running(f"time.sleep({seconds(3)})") == []


def test_it_dies_with_a_parent_that_is_killed(level):
    what = f"time.sleep({seconds(4)})"
    code = DAEMON.replace("NUMBER", seconds(4)) + f"print('up', flush=True)\n{what}"
    driver = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from xplus_fast.evaluation import sandbox
least = {level!r}
if least != "namespaces":
    levels = sandbox.LEVELS
    sandbox._missing = lambda x: "no" if levels.index(x) < levels.index(least) else ""
sandbox.run_limited([sys.executable, "-c", {code!r}], seconds=90, memory=1 << 32, least=least)
"""
    parent = subprocess.Popen([sys.executable, "-c", driver])
    try:
        until(lambda: len(running(what)) >= 2 + 1)  # the driver's own line holds it
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: running(what) == [])


def test_limits_of_one_process(level, tmp_path):
    code, said = limited("import os; print(os.getcwd() == os.environ['HOME'])", level)
    assert (code, said) == (0, "True\n")
    code, said = limited("x = bytearray(8 << 30)", level)
    assert code == 1 and "MemoryError" in said
    code, said = limited("open('x', 'wb').truncate(2 << 30)", level)
    assert code == 1 and "File too large" in sandbox.last_error(said)
    code, said = limited("import sys; sys.exit(3)", level)
    assert (code, said) == (3, "")
    code, said = limited("import os; os.kill(os.getpid(), 11)", level)
    assert (code, said) == (-11, "")
    script = tmp_path / "python"  # which looks for one, as pyenv's does, where nothing is found
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    code, said = limited("print('found')", level, python=str(script))
    assert (code, said) == (0, "found\n")
    code, said = limited("", level, python="no-such-python")
    assert code == 127 and "no-such-python: No such file" in said
    code, said = limited("import sys; print(sys.stdin.read(), sys.argv)", level)
    assert (code, said) == (0, " ['-c']\n")


# where the system permits less


@pytest.fixture
def forbidden():
    """What begins a command in a user namespace that allows no more of them, as Docker does."""
    told = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", told, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("unshare --user is not permitted here: nothing to take away")
    return command


DRIVER = """
import sys
sys.path.insert(0, ROOT)
from xplus_fast.errors import UserError
from xplus_fast.evaluation import sandbox
try:
    command = [sys.executable, "-c", CODE]
    print(sandbox.run_limited(command, seconds=30, memory=1 << 32, least=LEAST))
except UserError as e:
    print("refused:", e)
"""


def driver(code, least):
    text = DRIVER
    for name, value in (("ROOT", str(ROOT)), ("CODE", code), ("LEAST", least)):
        text = text.replace(name, repr(value), 1)
    return text


def test_without_namespaces_nothing_is_executed_unless_less_is_accepted(forbidden, tmp_path):
    def run(least):
        text = driver(f"open({str(tmp_path / 'mark')!r}, 'w'); print('ran')", least)
        ran = subprocess.run(
            [*forbidden, sys.executable, "-c", text], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    said = run("namespaces")
    assert said.startswith("refused: code is not executed, as this system lets nobody shut it in")
    assert "namespaces: unshare: No space left on device" in said and said.count("\n") == 1
    assert "reasoning.code_isolation" in said and not (tmp_path / "mark").exists()
    if not sandbox._missing("landlock"):
        assert "PermissionError" in run("landlock")  # executed, and shut in by less
        assert not (tmp_path / "mark").exists()
    assert "(0, 'ran\\n')" in run("limits") or not sandbox._missing("landlock")


def test_it_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(
        sandbox, "_missing", lambda level: "" if level == "limits" else f"no {level}"
    )
    assert sandbox.permitted("limits") == "limits"
    with pytest.raises(UserError, match=r"shut it in \(no namespaces\)"):
        sandbox.permitted()
    with pytest.raises(UserError, match=r"shut it in \(no namespaces; no landlock\)"):
        sandbox.permitted("landlock")


# as somebody who is not root


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", SYSTEM_PYTHON]


def test_somebody_without_privileges_has_it_all(tmp_path):
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("root and setpriv are wanted, to be somebody else; the other tests are it")
    version = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import sys; assert sys.version_info >= (3, 11)"]
    )
    if version.returncode:
        pytest.skip(f"{SYSTEM_PYTHON}, which anybody may execute, is older than 3.11")
    folder = Path("/tmp") / f"xplus-test-{os.getpid()}"
    shutil.copytree(
        ROOT / "xplus_fast", folder / "xplus_fast", ignore=shutil.ignore_patterns("*.pyc")
    )
    folder.chmod(0o777)
    try:
        code = (
            TRY
            + f"""
refused(open, {str(folder / "new")!r}, "w")
refused(open, "/etc/new", "w")
refused(open, "/root/.bashrc")
refused(os.listdir, "/run")
refused(socket.create_connection, ("127.0.0.1", 22), 2)
print(os.getuid(), sum(p.isdigit() for p in os.listdir("/proc")))
made = 0
try:
    while made < 5000:
        if os.fork() == 0:
            import time
            time.sleep(60)
        made += 1
except OSError:
    print(made < 1024, flush=True)
"""
        )
        text = driver(code, "namespaces").replace(str(ROOT), str(folder))
        ran = subprocess.run([*NOBODY, "-c", text], capture_output=True, text=True,
                             env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"})  # fmt: skip
        if "refused: code is not executed" in ran.stdout:
            pytest.skip(ran.stdout.strip())
        assert ran.stdout == "(0, '65534 2\\nTrue\\n')\n", ran.stdout + ran.stderr
        assert not (folder / "new").exists()
    finally:
        shutil.rmtree(folder)


def test_the_command_line_refuses_before_the_model_answers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="runs the tasks: pip install 'xplus-fast[reasoning]'")
    from xplus_fast.evaluation import reasoning
    from xplus_fast.evaluation.generate import Subject
    from xplus_fast.evaluation.recipe import EvaluateRecipe, ReasoningConfig

    monkeypatch.setattr(sandbox, "_missing", lambda level: "" if level == "limits" else "no")
    monkeypatch.setattr(reasoning, "_show", lambda *a: pytest.fail("the model was asked"))
    looked = {"x": {"known": True, "executes": ["x"], "judges": []}}
    monkeypatch.setattr(reasoning, "_look", lambda *a: looked)
    config = ReasoningConfig(tasks=["x"], allow_code=True)
    recipe = EvaluateRecipe(str(tmp_path), reasoning=config)
    found = reasoning.run_tasks(
        Subject(tmp_path, "d", load=None), recipe, tmp_path / "out", show=False
    )
    assert "code is not executed, as this system lets nobody" in found["x"]["missing"]
    assert json.dumps(found).count("\\n") == 0
