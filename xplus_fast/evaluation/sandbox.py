"""A process in limits, for code that a model wrote.

What holds, and where, is told in docs/evaluation.md; how it is done, in `confine`, which is started
here as a process of its own.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from xplus_fast.errors import UserError
from xplus_fast.files import make_folder, resolve, scratch, speaking

Level = Literal["namespaces", "landlock", "limits"]
Kind = Literal["read", "out", "hub", "cache"]  # the hub's folder holds the caches, and a token
LEVELS: tuple[Level, ...] = ("namespaces", "landlock", "limits")
CONFINE = Path(__file__).with_name("confine.py").absolute()
SCRATCH = 1 << 30  # bytes of all files that may be written
PROCESSES = 1024  # and threads, at a time: libraries make one for each core
OUTPUT = 64 << 20  # bytes that it may say
TAIL = 1 << 16  # bytes of them that are kept
# Nothing else of the environment is passed on: it may hold tokens
KEPT = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "HF_DATASETS_CACHE", "HF_MODULES_CACHE",
        "OMP_NUM_THREADS")  # fmt: skip
CACHES = ("hub", "datasets", "modules", "evaluate", "metrics")  # in the hub's folder
# what programs and their libraries are, on any Linux
SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr", "/opt", "/nix", "/gnu",
          *(f"/etc/{name}" for name in (
              "alternatives", "ca-certificates", "group", "host.conf", "hosts", "ld.so.cache",
              "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf",
              "os-release", "passwd", "pki", "ssl",
          )))  # fmt: skip
# of a Python: where it is, where its packages are, where editable ones are
ASK = """
import importlib.metadata, json, sys, urllib.parse, urllib.request
found = [sys.executable, sys.prefix, sys.base_prefix, *sys.path]
for package in importlib.metadata.distributions():
    try:
        told = json.loads(package.read_text("direct_url.json") or "{}")
        if told["dir_info"]["editable"]:
            found.append(urllib.request.url2pathname(urllib.parse.urlsplit(told["url"]).path))
    except (ValueError, LookupError, TypeError):
        pass
print(json.dumps(found))
"""


def run_limited(
    command: Sequence[str], *, seconds: int, memory: int, folder: Path | None = None,
    environment: Mapping[str, str] | None = None, reads: Iterable[Path] = (),
    out: Path | None = None, least: Level = "namespaces",
) -> tuple[int, str]:  # fmt: skip
    """Run a command, which begins with a Python, in limits; its exit code and the end of what it
    said.

    seconds: by the clock for all of it, and of processor time for each process. memory: bytes of
    address space of each process, and of all they hold together. folder: where it runs, and may
    read; None: in its home. environment: added to what little it gets. reads: files and folders
    that it may read, beside Python's. out: a folder in which it may write; it is empty or new, and
    what was written is in it afterwards. least: of LEVELS, what the system has to permit.

    Raises `UserError` where that is not permitted, where time is up, and for more processes, memory
    or output than is allowed.
    """
    level = permitted(least)
    if out is not None:
        make_folder(out)
    hub = _hub_home().absolute()
    with scratch("xplus-code-") as home:
        inside = "/tmp/home" if level == "namespaces" else str(home)
        given = {name: os.environ[name] for name in KEPT if name in os.environ}
        given |= {
            "HOME": inside, "TMPDIR": inside, "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(hub),
            # as many threads as there are cores would be too many processes
            "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", "1"), "OPENBLAS_NUM_THREADS": "1",
            **(environment or {}),
        }  # fmt: skip
        caches = [given[name] for name in KEPT if "CACHE" in name and name in given]
        caches += [str(hub / name) for name in CACHES]
        if level == "landlock":
            with speaking(home):
                given |= _own_caches(home, hub, given)
        own = _of_python(command[0], given.get("PATH", os.defpath))
        user = os.path.realpath(os.path.expanduser("~"))
        # whatever a Python may find there: not the home as a whole
        paths: list[str | Path] = [
            path for path in (*SYSTEM, *own) if not _below(user, [os.path.realpath(path)])
        ]
        paths += [*reads, *([folder] if folder else [])]
        places: dict[Kind, Sequence[str | Path]] = {
            "hub": [hub], "read": paths, "cache": caches, "out": [out] if out else [],
        }  # fmt: skip
        links, mounts = _mounts(places)
        job = {
            "level": level, "command": [*(own[:1] or command[:1]), *command[1:]],
            "environment": given, "seconds": seconds, "memory": memory, "most": PROCESSES,
            "scratch": SCRATCH, "links": links,
            "mounts": mounts, "root": str(home), "out": os.path.realpath(out) if out else None,
            "cwd": str(folder.absolute()) if folder else inside,
        }  # fmt: skip
        return _run(job, seconds)


def _run(job: dict[str, Any], seconds: int) -> tuple[int, str]:
    report, report_in = os.pipe()
    alive, alive_in = os.pipe()
    job = {**job, "parent": os.getpid(), "report": report_in, "alive": alive}
    running = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CONFINE), json.dumps(job)], cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        pass_fds=(report_in, alive), start_new_session=True,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
    )  # fmt: skip
    os.close(report_in)
    os.close(alive)
    try:
        end = time.monotonic() + seconds
        said = _listen(running, end)
        running.wait(timeout=max(0, end - time.monotonic()))  # it may have closed its output
        told = os.read(report, 1 << 16).decode()
    except subprocess.TimeoutExpired:
        raise UserError(f"stopped after {seconds} seconds (reasoning.code_seconds)") from None
    finally:
        os.close(alive_in)  # at this it ends, and all that it started with it
        try:
            running.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        os.close(report)
    ended: dict[str, Any] = {}
    for line in told.splitlines():
        ended |= json.loads(line)
    if "unable" in ended:
        raise UserError(f"code is not executed: {ended['unable']}")
    if "exit" not in ended:
        raise UserError(f"stopped: {ended.get('stopped', 'it was killed')}")
    return ended["exit"], said.decode(errors="replace")


def _listen(running: "subprocess.Popen[bytes]", end: float) -> bytes:
    """The end of what it says, until it ends, or the clock shows `end`."""
    assert running.stdout is not None
    pipe, tail, said = running.stdout.fileno(), b"", 0
    with running.stdout:
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(running.args, 0)
            ready, _, _ = select.select([pipe], [], [], min(left, 0.2))
            if not ready:
                if running.poll() is not None:  # somebody else holds the other end
                    return tail
                continue
            if not (piece := os.read(pipe, 1 << 16)):
                return tail
            said += len(piece)
            if said > OUTPUT:
                raise UserError(f"stopped: it printed more than {OUTPUT / 1e6:.0f} MB")
            tail = (tail + piece)[-TAIL:]


def readable(paths: Iterable[str]) -> list[Path]:
    """What a recipe lets judging read. Raises `UserError` for what is not there."""
    found = [resolve(path) for path in paths]
    if lacking := next((path for path in found if not path.exists()), None):
        raise UserError(f"reasoning.code_reads: {lacking}: no such file or folder")
    return found


def permitted(least: Level = "namespaces") -> Level:
    """The strictest level that this system permits.

    Raises `UserError`, naming what is missing, if that is less than `least`.
    """
    why = []
    for level in LEVELS[: LEVELS.index(least) + 1]:
        if not (missing := _missing(level)):
            return level
        why.append(missing)
    raise UserError(
        f"code is not executed, as this system lets nobody shut it in ({'; '.join(why)}): run in a"
        " container or on a machine that does, or accept less with reasoning.code_isolation:"
        " docs/evaluation.md tells what holds then"
    )


@cache
def _missing(level: Level) -> str:
    """What a level lacks here; nothing if it works, for a command that does nothing."""
    with scratch("xplus-code-") as home:
        links, mounts = _mounts({"read": list(SYSTEM)})
        job = {
            "level": level, "command": ["true"], "environment": {"PATH": os.defpath}, "seconds": 60,
            "memory": 1 << 33, "most": PROCESSES, "scratch": 1 << 20, "links": links,
            "mounts": mounts, "root": str(home), "out": None, "cwd": "/",
        }  # fmt: skip
        try:
            code, said = _run(job, 60)
        except UserError as e:
            return f"{level}: {str(e).removeprefix('code is not executed: ')}"
        return f"{level}: {last_error(said)}" if code else ""


def _mounts(places: Mapping[Kind, Sequence[str | Path]]) -> tuple[dict[str, str], dict[str, Kind]]:
    """Symbolic links on the way to the places, and each place that they lead to with its kind.

    What does not exist is left out, but for the hub's folder; so is what may be read inside of what
    may be read.
    """
    links: dict[str, str] = {}
    mounts: dict[str, Kind] = {}
    for kind, paths in places.items():
        for path in map(os.path.abspath, paths):
            if kind == "hub" or os.path.exists(path):
                mounts.setdefault(_follow(path, links), kind)
    reads = [path for path, kind in mounts.items() if kind == "read"]
    for path in reads:
        if _below(os.path.dirname(path), reads):
            del mounts[path]
    return {k: v for k, v in sorted(links.items()) if not _below(k, mounts)}, mounts


def _follow(path: str, links: dict[str, str]) -> str:
    """Where a path leads to; the links on the way are added."""
    at, rest = "/", path.split("/")[::-1]
    while rest:
        part = rest.pop()
        here = os.path.dirname(at) if part == ".." else os.path.join(at, part)
        if part != ".." and os.path.islink(here):
            links[here] = target = os.readlink(here)
            rest += target.split("/")[::-1]
            at = "/" if target.startswith("/") else at
        elif part not in ("", "."):
            at = here
    return at


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == f or path.startswith(f.rstrip("/") + "/") for f in folders)


@cache
def _of_python(python: str, path: str) -> tuple[str, ...]:
    """A Python, which is no script that looks for one, and what it and its packages are made of; a
    command that is no Python is a file alone."""
    found = shutil.which(python, path=path)
    if found is None:
        return ()
    ran = subprocess.run([found, "-I", "-c", ASK], capture_output=True, text=True, cwd="/",
                         stdin=subprocess.DEVNULL)  # fmt: skip
    try:
        return tuple(json.loads(ran.stdout)) if ran.returncode == 0 else (found,)
    except ValueError:
        return (found,)


def _hub_home() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("HF_HOME", f"{cache_home}/huggingface"))


def _own_caches(home: Path, hub: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Caches in a home that can be written, as the libraries lock what they read: folders with
    links to the files of the data sets that are there, and the modules, which are small."""
    data = Path(given.get("HF_DATASETS_CACHE", hub / "datasets")).absolute()
    modules = Path(given.get("HF_MODULES_CACHE", hub / "modules"))
    if data.is_dir():
        ignored = shutil.ignore_patterns("*.lock")
        shutil.copytree(data, home / "datasets", copy_function=os.symlink, ignore=ignored)
    if modules.is_dir():
        shutil.copytree(modules, home / "modules")
    names = ("datasets", "modules", "metrics", "evaluate")
    return {f"HF_{name.upper()}_CACHE": str(home / name) for name in names}


def last_error(said: str) -> str:
    """The one line of what a program said that tells why it failed."""
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    named = next((x for x in reversed(lines) if "Error" in x or "not found" in x), None)
    return (named or (lines or ["no reason given"])[-1])[:300]
