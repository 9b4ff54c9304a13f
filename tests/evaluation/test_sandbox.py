"""Each promise of docs/evaluation.md about code that a model wrote, by code that would break it."""

import os
import socket
import sys
from pathlib import Path

import pytest

from tests.evaluation.shut_in import all_refused, limited, works
from xplus_fast.evaluation import confine, sandbox

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
