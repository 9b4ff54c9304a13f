"""Each promise of docs/evaluation.md about code that a model wrote, by code that would break it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xplus_fast.errors import UserError
from xplus_fast.evaluation import confine, sandbox

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
LEVELS = sandbox.LEVELS
SHUT = LEVELS[:2]  # of which the file system is shut
GIB = 1 << 30


def works(level):
    if missing := sandbox._missing(level):
        pytest.skip(f"this kernel does not permit it: {missing}")


@pytest.fixture(params=LEVELS)
def level(request):
    works(request.param)
    return request.param


@pytest.fixture(params=SHUT)
def shut(request):
    works(request.param)
    return request.param


@pytest.fixture
def apart():
    works("namespaces")
    return "namespaces"


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


# files


def test_nothing_outside_is_written_or_deleted(shut, tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    here = Path(__file__).parent
    names = set(os.listdir(here)), set(os.listdir("/etc")), set(os.listdir("/"))
    all_refused(
        f"""
for folder in ({str(tmp_path)!r}, {str(here)!r}, "/etc", "/usr", "/", "/dev", "/proc", "/opt"):
    refused(open, folder + "/x-new", "w")
    refused(os.mkdir, folder + "/x-folder")
    refused(os.symlink, "/", folder + "/x-link")
refused(open, {str(kept)!r}, "a")
refused(os.remove, {str(kept)!r})
refused(os.rename, {str(kept)!r}, {str(kept)!r} + "2")
if {shut == "namespaces"}:  # Landlock knows nothing of permissions
    refused(os.chmod, {str(kept)!r}, 0)
refused(os.truncate, {str(kept)!r}, 0)
refused(open, "/proc/sys/kernel/core_pattern", "w")
with open("mine", "w") as f:
    f.write("may be written")
os.remove("mine")
print("tried")
""",
        shut, reads=[kept],
    )  # fmt: skip
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    assert names == (set(os.listdir(here)), set(os.listdir("/etc")), set(os.listdir("/")))


def test_a_read_only_file_that_it_may_read(shut, tmp_path):
    (tmp_path / "given").write_text("to be read")
    (tmp_path / "other").write_text("not")
    (tmp_path / "link").symlink_to(tmp_path / "given")
    code, said = limited(
        f"""
print(open({str(tmp_path / "link")!r}).read())
try:
    print(open({str(tmp_path / "other")!r}).read())
except OSError:
    print("nothing")
""",
        shut, reads=[tmp_path / "link"],
    )  # fmt: skip
    assert (code, said) == (0, "to be read\nnothing\n")


def test_keys_in_the_home_are_not_read_and_caches_are(shut, tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    for name in (".ssh/id_ed25519", ".netrc", ".cache/huggingface/token", ".aws/credentials",
                 ".cache/huggingface/stored_tokens", ".git-credentials"):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("secret")
    cached = home / ".cache/huggingface/datasets/a/b.arrow"
    cached.parent.mkdir(parents=True)
    cached.write_text("rows")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("A_TOKEN", "secret")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    code, said = limited(
        f"""
import os
assert not [v for v in os.environ.values() if "secret" in v]
assert open({str(cached)!r}).read() == "rows"
for folder, _, files in os.walk({str(home)!r}):
    print(sorted(files))
for name in (".ssh/id_ed25519", ".netrc", ".cache/huggingface/token", ".aws/credentials"):
    try:
        print(open({str(home)!r} + "/" + name).read())
    except OSError:
        pass
for file in ("/etc/shadow", os.path.expanduser("~root/.ssh/id_rsa")):
    try:
        print("read", file, open(file).read())
    except OSError:
        pass
try:  # a lock of the library that reads it
    open({str(cached.with_suffix(".lock"))!r}, "w").close()
    os.remove({str(cached)!r})
    print("written in a copy")
except OSError:
    print("not written")
""",
        shut,
    )  # fmt: skip
    assert code == 0 and "secret" not in said and "read /" not in said
    assert said.endswith("written in a copy\n" if shut == "namespaces" else "not written\n")
    assert os.listdir(cached.parent) == ["b.arrow"] and cached.read_text() == "rows"


def test_the_home_is_not_read_for_a_package_in_it(shut, tmp_path, monkeypatch):
    """An editable package may be the home itself."""
    (tmp_path / ".netrc").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = sandbox._of_python(sys.executable, os.environ["PATH"])
    monkeypatch.setattr(sandbox, "_of_python", lambda *a: (*found, str(tmp_path), "/"))
    code, said = limited(f"print(open({str(tmp_path / '.netrc')!r}).read())", shut)
    assert code == 1 and "secret" not in said.replace(str(tmp_path), "")


def test_a_data_set_is_found_in_its_cache(shut, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="what a judge reads its questions with")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    cached = tmp_path / "hub" / "datasets"
    told = f"'json', data_files={str(tmp_path / 'rows.jsonl')!r}, split='train'"
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(cached))
    before = sorted(cached.rglob("*"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    code = f"import datasets; print('rows', datasets.load_dataset({told})['a'])"
    got, said = limited(code, shut, reads=[tmp_path / "rows.jsonl"], seconds=120)
    assert got == 0 and said.endswith("rows [1, 2]\n") or "Column([1, 2])" in said, said
    assert sorted(cached.rglob("*")) == before


def test_what_it_writes_is_bounded_and_brought_back(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SCRATCH", 64 << 20)
    out = tmp_path / "out"
    out.mkdir()
    (out / "there").write_text("mine")
    (tmp_path / "other").write_text("untouched")
    code, said = limited(
        f"""
import os
os.chdir({str(out)!r})
open("there", "w").write("not mine")
os.makedirs("a/b")
open("a/b/c", "w").write("deep")
os.symlink({str(tmp_path / "other")!r}, "link")
os.mkfifo("pipe")
open("large", "wb").write(bytes(40 << 20))
for name in (os.environ["HOME"] + "/more", "/tmp/more", "/dev/shm/more"):
    try:
        open(name, "wb").write(bytes(40 << 20))
    except OSError as e:
        print(e.strerror)
""",
        out=out,
    )  # fmt: skip
    assert (code, said) == (0, "No space left on device\n" * 3)
    found = {str(p.relative_to(out)) for p in out.rglob("*")}
    assert found == {"there", "a", "a/b", "a/b/c", "large"}
    assert (out / "there").read_text() == "mine" and (out / "a/b/c").read_text() == "deep"
    assert (out / "large").stat().st_size == 40 << 20
    assert (tmp_path / "other").read_text() == "untouched"


# network, sockets, processes


def test_neither_network_nor_sockets_of_the_machine(apart, tmp_path):
    path = tmp_path / "docker.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        unix.bind(str(path))
        path.chmod(0o777)
        abstract.bind(f"\0xplus-{os.getpid()}")
        udp.bind(("127.0.0.1", 0))
        unix.listen()
        abstract.listen()
        all_refused(
            f"""
s = lambda: socket.socket(socket.AF_UNIX)
refused(s().connect, {str(path)!r})
refused(s().connect, "\\0xplus-{os.getpid()}")
refused(socket.create_connection, ("127.0.0.1", {tcp.getsockname()[1]}), 2)
refused(socket.create_connection, ("1.1.1.1", 53), 2)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
refused(u.sendto, b"x", ("127.0.0.1", {udp.getsockname()[1]}))
for folder in ("/run", "/var/run", "/var"):
    refused(os.listdir, folder)
a, b = socket.socketpair()  # among its own
a.send(b"x")
assert b.recv(1) == b"x"
print("tried")
""",
            apart,
        )  # fmt: skip


def test_landlock_takes_tcp_and_abstract_sockets_away():
    works("landlock")
    version = confine.landlock_version()
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0xplus-{os.getpid()}")
        abstract.listen()
        code = f"""
refused(socket.create_connection, ("127.0.0.1", {tcp.getsockname()[1]}), 2)
if {version} >= 6:
    refused(socket.socket(socket.AF_UNIX).connect, "\\0xplus-{os.getpid()}")
    refused(os.kill, {os.getpid()}, 0)
print("tried")
"""
        if version < 4:
            pytest.skip(f"Landlock {version} of this kernel leaves the network alone: 4 is wanted")
        all_refused(code, "landlock")


def test_it_sees_no_other_process_and_has_no_privilege(apart):
    kernel = [Path("/proc/sys", name) for name in ("kernel/pid_max", "user/max_user_namespaces")]
    before = [file.read_text() for file in kernel]
    all_refused(
        f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
assert sorted(int(p) for p in os.listdir("/proc") if p.isdigit()) == [1, os.getpid()]
refused(os.kill, {os.getpid()}, 0)
for fd in range(20):
    refused(os.readlink, f"/proc/1/fd/{{fd}}")
    refused(open, f"/proc/1/fd/{{fd}}")
refused(os.listdir, "/proc/1/root")
refused(open, "/proc/1/environ")
os.kill(1, 9)  # which the first process of a namespace does not hear
refused(call, "unshare", 0x10000000)
refused(call, "unshare", 0x20000)
refused(call, "mount", b"x", b"/tmp", b"tmpfs", 0, None)
refused(call, "umount2", b"/usr", 2)
refused(call, "sethostname", b"x", 1)
refused(call, "memfd_create", b"x", 0)
refused(call, "shmget", 0, 1 << 20, 0o1600)
refused(call, "msgget", 0, 0o1600)
refused(os.setuid, 12345)
refused(os.mknod, "disk", 0o60600, os.makedev(254, 0))
refused(open, "/proc/sys/kernel/pid_max", "w")
refused(open, "/proc/self/oom_score_adj", "w")
print("tried")
""",
        apart,
    )
    assert [file.read_text() for file in kernel] == before


def seconds(k):
    """A time to sleep that no other process of the machine names."""
    return f"{900 + k}.{os.getpid()}"


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
    assert ran.stdout == "stopped: it said more than 67 MB\nTrue\n", ran.stderr
    code, said = limited("print('a' * 100_000 + 'end')", level)
    assert code == 0 and said.endswith("aend\n") and len(said) == sandbox.TAIL


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
        _until(lambda: len(running(what)) >= 2 + 1)  # the driver's own line holds it
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _until(lambda: running(what) == [])


def _until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


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
    from xplus_fast.evaluation.recipe import EvaluateRecipe, ReasoningConfig

    monkeypatch.setattr(sandbox, "_missing", lambda level: "" if level == "limits" else "no")
    monkeypatch.setattr(reasoning, "_show", lambda *a: pytest.fail("the model was asked"))
    looked = {"x": {"known": True, "executes": ["x"], "judges": []}}
    monkeypatch.setattr(reasoning, "_look", lambda *a: looked)
    config = ReasoningConfig(tasks=["x"], allow_code=True)
    recipe = EvaluateRecipe(str(tmp_path), reasoning=config)
    found = reasoning.run_tasks(tmp_path, "d", recipe, tmp_path / "out", show=False)
    assert "code is not executed, as this system lets nobody" in found["x"]["missing"]
    assert json.dumps(found).count("\\n") == 0


def test_what_judges_are_made_of_works(level):
    """HumanEval's has a manager and processes, LiveCodeBench's a pool of them."""
    code = """
import multiprocessing, subprocess, sys, tempfile, threading
from concurrent.futures import ProcessPoolExecutor
def judge(results, program):
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        ran = subprocess.run([sys.executable, file.name], capture_output=True, text=True, timeout=9)
    results.append(ran.stdout.strip())
if __name__ == "__main__":
    with multiprocessing.Manager() as manager:
        results = manager.list()
        process = multiprocessing.Process(target=judge, args=(results, "print(6 * 7)"))
        process.start()
        process.join(timeout=20)
        print(list(results), process.exitcode)
    with ProcessPoolExecutor(max_workers=2) as pool:
        print(list(pool.map(abs, [-1, 2])))
    numbers = multiprocessing.Array("i", [1, 2])
    queue = multiprocessing.Queue()
    queue.put(numbers[:])
    print(queue.get(timeout=9))
"""
    got, said = limited(code, level)
    assert (got, said) == (0, "['42'] 0\n[1, 2]\n[1, 2]\n"), said
