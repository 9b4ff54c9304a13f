"""What goes around a command that a model wrote: it is started here, watched, and ended.

    python -I -S confine.py {"level": ..., "command": [...], ...}

Run by its path, apart from everything: it imports nothing of this project but `processes`.
`sandbox` says what to do (`Job`), reads what the command says, and learns from a pipe how it ended.
Levels:

namespaces  the command gets a file system of its own: what it needs, read-only, and a home in
            memory; no network, no other processes. The supervisor is process 1 of the namespace:
            when it ends, the kernel ends all others.
landlock    the file system is the machine's; the kernel refuses to open what is not needed.
limits      neither.

Everything is Linux: https://man7.org/linux/man-pages/man7/user_namespaces.7.html, landlock.7.
"""

import ctypes
import json
import os
import platform
import re
import resource
import select
import signal
import stat
import struct
import sys
import time
from typing import Any, NoReturn

if __package__:
    from xplus_fast.evaluation.processes import others, too_much
else:  # run by its path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from processes import others, too_much  # type: ignore[no-redef]

LIBC: Any = ctypes.CDLL(None, use_errno=True)
# from <sched.h>, <sys/mount.h>, <linux/prctl.h>, <linux/landlock.h>, <linux/seccomp.h>
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV, AT_RECURSIVE = 1, 2, 4, 0x8000
DEATH_SIGNAL, DUMPABLE, SECCOMP, DROP_BOUND, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 22, 24, 36, 38
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
# by machine: seccomp's name of it, pivot_root, and what is refused: memory that no process has
# (memfd_create, memfd_secret, shmget, msgget) and the kernel's keys (add_key, request_key, keyctl)
MACHINES = {
    "x86_64": (0xC000003E, 155, (319, 447, 29, 68, 248, 249, 250)),
    "aarch64": (0xC00000B7, 41, (279, 447, 194, 186, 217, 218, 219)),
}
OWN_PID_MAX = (6, 14)  # Linux since which pid_max is of a namespace, and not of the machine
DEVICES = ("null", "zero", "full", "random", "urandom")
OPEN = 1024  # files open at a time
LOOK = 0.05  # seconds between two looks at what runs


class Unable(Exception):
    """This system does not permit a level; it says what failed."""


def main(job: dict[str, Any]) -> int:
    """Run the job's command; report {"exit": code}, {"stopped": why} or {"unable": what}."""
    os.set_inheritable(job["report"], False)
    if sys.platform != "linux":
        _report(job, {"unable": "only Linux can"})
        return 1
    os.set_inheritable(job["alive"], False)
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")  # if memory gives out, this goes first
        if job["level"] == "namespaces":
            return _in_namespaces(job)
        return _supervise(job, None)
    except (Unable, OSError) as e:
        _report(
            job, {"unable": f"{e}" if isinstance(e, Unable) else f"{e.strerror} ({e.filename})"}
        )
        return 1


def _report(job: dict[str, Any], what: dict[str, Any]) -> None:
    os.write(job["report"], json.dumps(what).encode() + b"\n")


def _call(what: str, result: int) -> int:
    if result < 0:
        raise Unable(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(what: int, *values: int) -> None:
    _call(f"prctl {what}", LIBC.prctl(what, *[ctypes.c_ulong(v) for v in (*values, 0, 0, 0)][:4]))


# namespaces


def _in_namespaces(job: dict[str, Any]) -> int:
    if platform.machine() not in MACHINES:
        raise Unable(f"namespaces on {platform.machine()} are not known here")
    uid, gid = os.getuid(), os.getgid()
    out = os.open(job["out"], os.O_RDONLY | os.O_DIRECTORY) if job["out"] else None
    _die_with_parent(job["parent"])
    _call("unshare", LIBC.unshare(NEWUSER | NEWPID | NEWNET | NEWIPC | NEWUTS))
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"),
    ):  # fmt: skip
        try:
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
        except OSError as e:
            raise Unable(f"{name}: {e.strerror}") from None
    _die_with_parent(job["parent"])  # new credentials have undone it
    first = os.fork()
    if first == 0:
        code = 1
        try:
            _prctl(DEATH_SIGNAL, signal.SIGKILL)
            _call("unshare", LIBC.unshare(NEWNS))
            _own_files(job)
            code = _supervise(job, out)
        except (Unable, OSError) as e:
            _report(job, {"unable": str(e)})
        finally:
            os._exit(code)
    os.waitpid(first, 0)
    return 0


def _die_with_parent(parent: int) -> None:
    _prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        os._exit(1)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    args = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _call(f"mount {kind or 'bind'} on {target}", LIBC.mount(*args))


def _lock(target: str, attributes: int, below: int = AT_RECURSIVE) -> None:
    """Add attributes to a mount, and to all below it."""
    told, here = struct.pack("QQQQ", attributes, 0, 0, 0), ctypes.c_int(-100)
    done = LIBC.syscall(MOUNT_SETATTR, here, target.encode(), below, told, len(told))
    _call(f"read-only {target}", done)


def _own_files(job: dict[str, Any]) -> None:
    """A file system that holds what the command needs and nothing else."""
    root = job["root"]
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    _mount("xplus", root, "tmpfs", NOSUID | NODEV, "size=4m,mode=755")
    for name in ("tmp", "proc", "dev"):
        os.mkdir(f"{root}/{name}")
    _mount("xplus", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={job['scratch']},mode=755")
    for name in ("home", ".out", ".shm", ".over", ".hub"):
        os.mkdir(f"{root}/tmp/{name}")
    for name in DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"/dev/{name}", f"{root}/dev/{name}", "", BIND)
    os.mkdir(f"{root}/dev/shm")
    _mount(f"{root}/tmp/.shm", f"{root}/dev/shm", "", BIND)
    for path, target in job["links"].items():
        if not os.path.lexists(root + path):
            _place(root + path)
            os.rmdir(root + path)
            os.symlink(target, root + path)
    for path, kind in sorted(job["mounts"].items()):  # what is inside another comes after it
        _place(root + path, os.path.isdir(path) or kind == "hub")
        if kind == "cache":  # what is written into one stays in memory
            upper, work = (f"{root}/tmp/.over/{path.replace('/', '-')}{end}" for end in "uw")
            os.mkdir(upper)
            os.mkdir(work)
            told = f"lowerdir={path},upperdir={upper},workdir={work},userxattr"
            try:
                _mount("xplus", root + path, "overlay", NOSUID | NODEV, told)
                continue
            except Unable:
                kind = "read"
        own = {"out": f"{root}/tmp/.out", "hub": f"{root}/tmp/.hub"}
        _mount(own.get(kind, path), root + path, "", BIND | RECURSIVE)
        if kind == "read":
            _lock(root + path, ATTR_READ_ONLY | ATTR_NOSUID | ATTR_NODEV)
    _mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    limits = {"user/max_user_namespaces": 0}  # a further one would have privileges again
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= OWN_PID_MAX:
        limits["kernel/pid_max"] = job["most"]
    for name, value in limits.items():
        try:
            with open(f"{root}/proc/sys/{name}", "w") as f:
                f.write(str(value))
        except OSError as e:
            raise Unable(f"{name}: {e.strerror}") from None
    _lock(f"{root}/proc", ATTR_READ_ONLY)
    _lock(root, ATTR_READ_ONLY, below=0)
    os.chdir(root)
    pivot = MACHINES[platform.machine()][1]
    _call("pivot_root", LIBC.syscall(pivot, b".", b"."))
    _call("umount", LIBC.umount2(b".", DETACH))
    os.chdir("/")


def _place(path: str, folder: bool = True) -> None:
    """Something to mount on; the folders above it that it needs are nobody's to write in."""
    above = os.path.dirname(path)
    if not os.path.lexists(above):
        _place(above)
        os.chmod(above, 0o555)
    if os.path.lexists(path):
        return
    if folder:
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


# the command


def _command(job: dict[str, Any]) -> NoReturn:
    """In the child: limited and without privileges, then it is the command."""
    try:
        if job["level"] == "namespaces":
            for capability in range(64):
                if LIBC.prctl(DROP_BOUND, capability, 0, 0, 0) < 0:
                    break
        else:
            _prctl(DEATH_SIGNAL, signal.SIGKILL)
        _prctl(NO_NEW_PRIVILEGES, 1)
        if job["level"] == "landlock":
            _landlock(job)
        os.nice(5)  # behind the supervisor
        for what, most in (
            (resource.RLIMIT_CPU, job["seconds"]), (resource.RLIMIT_AS, job["memory"]),
            (resource.RLIMIT_FSIZE, job["scratch"]), (resource.RLIMIT_NOFILE, OPEN),
            (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, job["most"]),
        ):  # fmt: skip
            if what == resource.RLIMIT_NPROC and job["level"] != "namespaces":
                continue  # it would count all that the user runs
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))
        if job["level"] == "namespaces":  # the last use of them is behind us
            header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
            _call("capset", LIBC.capset(header, none))
        _refuse_calls()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.chdir(job["cwd"])
    except (Unable, OSError) as e:
        _report(job, {"unable": str(e)})
        os._exit(1)
    try:
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except OSError as e:
        print(f"{job['command'][0]}: {e.strerror}", flush=True)
        os._exit(127)


def _refuse_calls() -> None:
    """System calls by which memory could be had that no process is charged for: EPERM."""
    if platform.machine() not in MACHINES:
        return
    arch, _, refused = MACHINES[platform.machine()]
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, deny = 0x7FFF0000, 0x80000000, 0x00050001
    n = len(refused)
    program = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0),
        (above, n + 1, 0, 0x40000000),  # x32's numbers
        *((equal, n - i, 0, number) for i, number in enumerate(refused)),
        (give, 0, 0, allow), (give, 0, 0, deny),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("seccomp", LIBC.prctl(SECCOMP, 2, filters, 0, 0))


def landlock_version() -> int:
    return LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)


def _landlock(job: dict[str, Any]) -> None:
    version = _call("landlock", landlock_version())
    # execute, write, read, list, remove_dir, remove_file, make_*(7), then refer, truncate, ioctl
    files = (1 << 13) - 1
    files |= (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    tcp, scopes = 3 * (version >= 4), 3 * (version >= 6)  # bind, connect; sockets, signals
    told = struct.pack("QQQ", files, tcp, scopes)[: 8 * (1 + (version >= 4) + (version >= 6))]
    rules = _call("landlock", LIBC.syscall(LANDLOCK_CREATE, told, len(told), 0))
    read = 1 | 4 | 8
    own = [job["root"], *([job["out"]] if job["out"] else [])]
    reads = [path for path, kind in job["mounts"].items() if kind in ("read", "cache")]
    for paths, access in (
        ([*reads, *(f"/dev/{name}" for name in DEVICES)], read),
        (["/dev/null", "/dev/shm", *own], files),
    ):
        for path in paths:
            handle = os.open(path, os.O_PATH)
            # what a file can have: execute, write, read, truncate, ioctl
            can = -1 if os.path.isdir(path) else 1 | 2 | 4 | 1 << 14 | 1 << 15
            rule = struct.pack("=Qi", access & files & can, handle)
            _call(f"landlock {path}", LIBC.syscall(LANDLOCK_ADD, rules, 1, rule, 0))
            os.close(handle)
    _call("landlock", LIBC.syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


# the supervisor


def _supervise(job: dict[str, Any], out: int | None) -> int:
    """Start the command, look after it, end all that it started."""
    apart = job["level"] == "namespaces"
    _prctl(DUMPABLE, 0)  # its files are not the command's to take
    if not apart:
        _prctl(SUBREAPER, 1)  # what loses its parent comes to us
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _command(job)
    code, why = None, ""
    alive = select.poll()
    alive.register(job["alive"], select.POLLIN)
    looked = 0.0
    while code is None and not why:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK)
        if alive.poll(0):  # whoever asked for this is no more
            why = "nobody waits for it"
        while (ended := _reap())[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
        if not why and code is None and time.monotonic() - looked > LOOK:
            why = too_much(others(apart), job["most"], job["memory"])
            looked = time.monotonic()
    while left := others(apart):  # a dying one may still start another
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        while _reap()[0]:
            pass
        time.sleep(0.001)
    if out is not None and not why:
        why = _bring("/tmp/.out", out)
    _report(job, {"stopped": why} if why else {"exit": code})
    return 0


def _reap() -> tuple[int, int]:
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _bring(source: str, out: int) -> str:
    """Copy files and folders, nothing else, to a folder that is open; why not, or nothing."""
    for entry in os.scandir(source):
        kind = entry.stat(follow_symlinks=False).st_mode
        try:
            if stat.S_ISDIR(kind):
                os.mkdir(entry.name, dir_fd=out)
                inner = os.open(
                    entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=out
                )
                why = _bring(entry.path, inner)
                os.close(inner)
                if why:
                    return why
            elif stat.S_ISREG(kind):
                # never over a file that is there
                made = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
                new = os.open(entry.name, made, 0o644, dir_fd=out)
                old = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                while piece := os.read(old, 1 << 20):
                    os.write(new, piece)
                os.close(old)
                os.close(new)
        except FileExistsError:
            continue
        except OSError as e:
            return f"{entry.name}, which it made, cannot be written ({e.strerror})"
    return ""


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
