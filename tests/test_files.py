"""Writing: whole or not at all, in one place of the package; locks; paths."""

import ast
import errno
import io
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

import xplus_fast
from xplus_fast import files, locks
from xplus_fast.config import load_recipe
from xplus_fast.errors import UserError
from xplus_fast.files import (
    NewFile,
    append_lines,
    move,
    new_folder,
    program,
    remove,
    resolve,
    scratch,
    settle,
    whole_lines,
    write_bytes,
    write_file,
    write_json,
    write_text,
)
from xplus_fast.locks import Busy, is_free, locked, sweep, working_in
from xplus_fast.manifest import check_files, is_whole, read_manifest, write_manifest

PACKAGE = Path(xplus_fast.__file__).parent

# Nobody else writes

WRITERS = {
    "write_text", "write_bytes", "savefig", "mkdir", "makedirs", "rename", "renames", "unlink",
    "rmdir", "removedirs", "rmtree", "touch", "symlink_to", "hardlink_to", "symlink", "link",
    "truncate", "ftruncate", "chmod", "mkdtemp", "mkstemp", "NamedTemporaryFile",
    "TemporaryDirectory", "TemporaryFile", "SpooledTemporaryFile", "copyfile", "copytree", "copy2",
    "copymode", "copystat", "copyfileobj", "tofile", "memmap", "savez", "savez_compressed",
    "save_file", "save_pretrained", "save_to_disk", "to_parquet", "to_json", "to_csv",
    "ParquetWriter", "FileIO", "fsync", "extractall", "make_archive", "dump_state_dict",
}  # fmt: skip
OF_MODULES = {  # names that mean something else elsewhere
    "os": {"open", "write", "remove", "replace", "mkfifo", "mknod", "sendfile"},
    "shutil": {"move", "copy"},
    "np": {"save"}, "numpy": {"save"}, "torch": {"save"},
    "pq": {"write_table"},
}  # fmt: skip
# What runs where nothing of ours can be imported: in another Python, around a judged program
SCRIPTS = ("confine", "processes", "livecodebench_bridge", "metricx", "replay")
ALONE = {f"evaluation/{name}.py" for name in SCRIPTS}
# What writes into a handle of ours
ALLOWED = {
    ("data/corpus.py", "np.save"),
    ("data/packed.py", "np.memmap"),  # mode r
    ("data/preparation/parts.py", "pq.write_table"),
    ("data/preparation/run.py", "pq.write_table"),
    ("evaluation/sandbox.py", "shutil.copytree"),  # into the home of what it runs
    ("signals.py", "os.write"),  # to the terminal
}


def writers(source: str) -> list[str]:
    """What of a module's source may write a file or change a folder, as it is called there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil", "tempfile"):
            found += [f"from {node.module} import {alias.name}" for alias in node.names]
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if node.args and ast.unparse(node.args[0]) == "os.devnull":
            continue
        whole = ast.unparse(called)
        of = whole.rpartition(".")[0]
        if name == "open" and of != "os":
            at = 0 if isinstance(called, ast.Attribute) and of not in ("io", "gzip") else 1
            modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[at : at + 1]
            if any(
                not (isinstance(m, ast.Constant) and set(str(m.value)) <= set("rbt"))
                for m in modes
                if not (isinstance(m, ast.Name) and of in CLOSED)
            ):
                found.append(whole)
        elif name in OF_MODULES.get(of, ()) or (
            isinstance(called, ast.Attribute) and name in WRITERS
        ):
            found.append(whole)
        elif isinstance(called, ast.Attribute) and name == "replace" and len(node.args) == 1:
            found.append(whole)  # Path.replace: that of texts takes two, dataclasses' keywords
    return found


CLOSED = ("archive", "CheckpointFiles", "wave")  # whose `open` only reads


def test_nothing_else_in_the_package_writes():
    sources = {str(file.relative_to(PACKAGE)): file.read_text() for file in PACKAGE.rglob("*.py")}
    for name in ALONE:
        alone = sources.pop(name).replace("if __package__:\n    from xplus_fast", "")
        assert not re.search(r"^\s*(from|import) (xplus_fast|\.)", alone, re.MULTILINE)
    del sources["files.py"], sources["locks.py"]
    found = {(name, call) for name, source in sources.items() for call in writers(source)}
    assert found - ALLOWED == set()
    assert ALLOWED - found == set()


@pytest.mark.parametrize(
    "line",
    [
        'open("x", "w")', 'open("x", mode="ab")', "open(x, m)", 'x.open("w")', 'x.open("r+")',
        'gzip.open("x", "wt")', "x.write_text(t)", "x.write_bytes(b)", "figure.savefig(x)",
        "x.mkdir()", "os.makedirs(x)", "x.rename(y)", "os.replace(x, y)", "x.replace(y)",
        "x.unlink()", "os.remove(x)", "shutil.rmtree(x)", "shutil.move(x, y)", "x.touch()",
        "tempfile.mkdtemp()", "tempfile.TemporaryDirectory()", "np.save(x, a)", "torch.save(a, x)",
        "pq.write_table(t, x)", "model.save_pretrained(x)", "os.open(x, flags)",
        "os.write(1, b)", "from os import rename", "from shutil import rmtree as gone",
    ],
)  # fmt: skip
def test_the_search_for_writers_finds_them(line):
    assert writers(line)


@pytest.mark.parametrize(
    "line", ['open("x")', 'open("x", "rb")', 'x.open("rb")', 'x.replace("a", "b")', "x.remove(1)"]
)
def test_the_search_for_writers_leaves_readers_alone(line):
    assert not writers(line)


def test_no_file_is_split_where_unicode_ends_a_line():
    """U+2028 and its like occur inside sentences: a file's lines end in \\n alone."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".splitlines"):
                assert "read_text" not in ast.unparse(node.func), f"{file}:{node.lineno}"


# Paths


def test_nobody_else_says_what_a_tilde_means():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("expanduser"):
                constant = node.args and isinstance(node.args[0], ast.Constant)
                assert constant or file == Path(files.__file__), f"{file}:{node.lineno}"


@pytest.mark.parametrize("given", ["~/x", "x", "./x", "a/../x", "a/b/../../x", "link/x"])
def test_one_path_however_it_is_spelt(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(".")
    assert resolve(given) == tmp_path / "x" == resolve(resolve(given))
    assert resolve(tmp_path / given[2:] if given[0] == "~" else given) == tmp_path / "x"


def test_the_end_of_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "pairs.jsonl").symlink_to("blob")
    assert resolve("pairs.jsonl") == tmp_path / "pairs.jsonl"  # its name tells the format
    assert resolve("a/..") == resolve(".") == resolve("") == tmp_path
    assert resolve("..") == tmp_path.parent
    assert program("python") == "python" and program("a/../py") == str(tmp_path / "py")


@pytest.mark.parametrize("given", ["~nobody-of-this-name/x", "a\0b", "x" * 5000 + "/y"])
def test_what_no_path_can_be(given):
    with pytest.raises(UserError, match="not a path") as caught:
        resolve(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_recipes_paths_mean_the_same_wherever_it_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("model", "work"):
        (tmp_path / name).mkdir()
    text = """
        model: model
        output: gone/../run
        data: {sources: [{path: [a.en, ../a.sw]}], retention: [{path: ~/r}], cache: ~/cache}
        stages: [{layers: 0, sources: [{path: own.jsonl}]}, {layers: 1}]
    """
    Path("recipe.yaml").write_text("\n".join(line[8:] for line in text.split("\n")))
    made = load_recipe("recipe.yaml")
    here = str(tmp_path)
    assert (made.model, made.output) == (f"{here}/model", f"{here}/run")
    assert made.data.sources[0].path == [f"{here}/a.en", f"{tmp_path.parent}/a.sw"]
    assert made.data.retention[0].path == f"{here}/r" and made.data.cache == f"{here}/cache"
    assert made.stages[0].sources is not None
    assert made.stages[0].sources[0].path == f"{here}/own.jsonl" and made.stages[1].sources is None
    assert load_recipe("recipe.yaml", ["model=org/name"]).model == "org/name"
    assert load_recipe("recipe.yaml", ["model=~/none"]).model == f"{here}/none"


# Files


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


ACTIONS = {
    "write_text": lambda f: write_text(f / "a.txt", "new"),
    "write_json": lambda f: write_json(f / "deep.json", {"new": 1}),
    "write_bytes": lambda f: write_bytes(f / "a.txt", lambda out: out.write(b"new" * 9)),
    "new file": lambda f: write_text(f / "sub" / "b.txt", "new"),
    "append_lines": lambda f: append_lines(f / "lines", ["three", "four"]),
    "first line": lambda f: append_lines(f / "first", ["one"]),
    "new_folder": lambda f: fill(f / "folder"),
    "another folder": lambda f: fill(f / "another"),
}


def fill(folder: Path) -> None:
    with new_folder(folder, 12) as temporary:
        write_file(temporary / "x", [b"new", b" and more"])


def begin(folder: Path) -> Path:
    (folder / "folder").mkdir(parents=True)
    for name, text in (("a.txt", "old"), ("lines", "one\ntwo\n"), ("folder/x", "old")):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "mkdir"])
def test_whole_or_not_at_all_when_any_call_fails(tmp_path, monkeypatch, call, action, number):
    expected = begin(tmp_path / "expected")
    ACTIONS[action](expected)
    real = getattr(os, call)
    for nth in range(20):
        folder = begin(tmp_path / str(nth))
        before, calls = contents(folder), iter(range(99))

        def fail(*given, calls=calls, nth=nth, **options):
            if next(calls) == nth:
                raise OSError(number, os.strerror(number))
            return real(*given, **options)

        monkeypatch.setattr(os, call, fail)
        try:
            ACTIONS[action](folder)
        except UserError as e:
            monkeypatch.undo()
            assert str(e).startswith(str(folder)) and "\n" not in str(e)
            assert os.strerror(number) in str(e)
            now = contents(folder)
            # a file that is in its place though its folder could not be flushed is whole, too
            assert now in (
                before,
                before | {"sub": None},
                contents(expected),
                before | {"first": b""},
            )
            ACTIONS[action](folder)
            assert contents(folder) == contents(expected)
        else:
            monkeypatch.undo()
            settle(folder / "folder")  # what was replaced could not be removed
            assert contents(folder) == contents(expected)
            assert nth >= (call not in ("mkdir", "rename") or action in ("new_folder",))
            return
    raise AssertionError("it never ended")


def test_a_vanished_folder_is_not_made_again(tmp_path):
    """Else a run whose folder was removed would go on in one that is nobody's."""
    for write in (
        lambda: write_text(tmp_path / "run/evaluation/x.json", ""),
        lambda: append_lines(tmp_path / "run/metrics.jsonl", [""]),
        lambda: fill(tmp_path / "run/stage/checkpoint-1"),
    ):
        with pytest.raises(UserError, match="No such file or directory"):
            write()
    assert contents(tmp_path) == {}


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path):
    write_json(tmp_path / "x.json", {"a": "\ud800 é"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "\ud800 é"}
    write_text(tmp_path / "x.txt", "\udc80 é")
    assert (tmp_path / "x.txt").read_text() == "\\udc80 é"


def test_lines_that_a_kill_cut_off_are_no_lines(tmp_path):
    file = tmp_path / "lines"
    assert whole_lines(file) == []
    append_lines(file, ["é", "a\u2028b\x85c"])
    whole = file.read_bytes()
    for end in range(len("éé".encode()), 0, -1):
        file.write_bytes(whole + "éé".encode()[:end])  # inside of a character
        assert [line.decode() for line in whole_lines(file)] == ["é", "a\u2028b\x85c"]
        append_lines(file, ["next"])
        assert file.read_bytes() == whole + b"next\n"
    file.write_bytes(b"x" * 200_000)  # longer than what is looked at in one go, and no line
    append_lines(file, ["only"])
    assert file.read_bytes() == b"only\n"
    file.write_bytes(b"a\n" + b"x" * 200_000)
    append_lines(file, [])
    assert file.read_bytes() == b"a\n"


def test_small_writes_are_joined_and_counted(tmp_path):
    with NewFile(tmp_path / "x", hashed=True) as raw, io.BufferedWriter(raw, 100) as out:
        for _ in range(30):
            out.write(b"0123456789")
    assert raw.size == 300 == len((tmp_path / "x").read_bytes())
    assert (
        raw.digest.hexdigest()
        == write_file(tmp_path / "y", [b"0123456789" * 30], hashed=True).digest.hexdigest()
    )


def test_remove_and_move(tmp_path):
    begin(tmp_path / "f")
    (tmp_path / "f" / ".none.tmp").mkdir()  # of a removal that was killed
    remove(tmp_path / "f" / "none")
    remove(tmp_path / "f" / "a.txt")
    (tmp_path / "f" / "link").symlink_to(tmp_path / "f" / "folder")
    remove(tmp_path / "f" / "link")  # the link alone
    assert (tmp_path / "f/folder/x").exists()
    (tmp_path / "f" / ".folder.tmp").mkdir()  # of a removal that was killed
    (tmp_path / "f" / ".folder.tmp" / "old").write_text("")
    remove(tmp_path / "f" / "folder")
    move(tmp_path / "f" / "lines", tmp_path / "f" / "moved")
    assert contents(tmp_path / "f") == {"moved": b"one\ntwo\n"}


def test_what_killed_processes_left_is_cleared_up(tmp_path):
    for name in (".a.tmp", ".b.old", "c", ".c.old", ".d.tmp", ".mine.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / ".e.tmp").write_text("")
    (tmp_path / ".a.lock").write_text("")
    with locked(tmp_path / "d"):  # its process lives
        sweep(tmp_path, "[a-e]")
        assert (tmp_path / ".d.tmp/x").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"b", "c", ".d.tmp", ".mine.tmp"}
    assert (tmp_path / "b/x").read_text() == ".b.old" and (tmp_path / "c/x").read_text() == "c"
    settle(tmp_path / "d")
    assert not (tmp_path / ".d.tmp").exists()
    sweep(tmp_path / "none", ".*")


def test_scratch_folders_go(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), scratch("x-") as folder:
        (folder / "deep").mkdir()
        raise ZeroDivisionError
    assert not folder.exists()
    monkeypatch.setattr(
        files.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UserError, match=r"cannot be written \(full\)"), scratch("x-"):
        pass


# Locks


def test_one_process_at_a_time_however_it_ends(tmp_path):
    folder, (read, write) = tmp_path / "run", os.pipe()
    child = os.fork()
    if not child:
        with working_in(folder):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    for _ in range(2):  # the refused one takes nothing of it away
        with pytest.raises(Busy, match="run: in use by another process") as caught:
            with working_in(folder):
                pass
        assert "\n" not in str(caught.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / ".lock").exists()
    with working_in(folder):
        (folder / "x").write_text("")
    assert [p.name for p in folder.iterdir()] == ["x"]
    with working_in(tmp_path / "new/deep"):
        pass
    assert not (tmp_path / "new/deep").exists()  # nothing came into it


def test_who_waits_gets_it_when_the_other_ends(tmp_path):
    file, (read, write) = tmp_path / "x", os.pipe()
    for number in range(4):
        if not os.fork():
            with locked(file, wait=True):
                append_lines(tmp_path / "log", [f"{number} in"])
                time.sleep(0.05)
                append_lines(tmp_path / "log", [f"{number} out"])
            os.write(write, b"x")
            os._exit(0)
    for _ in range(4):
        os.read(read, 1)
        os.wait()
    lines = (tmp_path / "log").read_text().split()
    assert len(lines) == 16
    for a, b in zip(lines[::4], lines[2::4], strict=True):
        assert a == b  # in and out of one process follow on each other
    assert not (tmp_path / ".x.lock").exists()


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with working_in(tmp_path / "run"):
        (tmp_path / "run/x").write_text("")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]


def test_what_is_free(tmp_path):
    folder = tmp_path / "run"
    assert is_free(folder, ".mark")
    folder.mkdir()
    assert is_free(folder, ".mark")
    for name in (".lock", "..mark.tmp"):  # of a process killed before its mark was there
        (folder / name).write_text("")
        assert is_free(folder, ".mark")
    (folder / "thesis.txt").write_text("")
    assert not is_free(folder, ".mark") and not is_free(folder / "thesis.txt", ".mark")


# Manifests


def test_a_folder_knows_its_files(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    made = {name: write_file(folder / name, [name.encode()], hashed=True) for name in ("a", "b")}
    with pytest.raises(UserError, match="no manifest.json: cut off"):
        read_manifest(folder)
    write_manifest(folder, made)
    assert check_files(folder, "a hint") == ["a", "b"] and is_whole(folder)
    (folder / "b").write_text("c")
    assert is_whole(folder)
    with pytest.raises(UserError, match=r"f/b: damaged: its SHA-256 .*; a hint$"):
        check_files(folder, "a hint")
    (folder / "b").write_text("bb")
    assert not is_whole(folder)
    with pytest.raises(UserError, match="f/b: damaged: 2 bytes, not 1; a hint"):
        check_files(folder, "a hint")
    whole = json.loads((folder / "manifest.json").read_text())
    for name, item in (("b", None), ("a", whole["files"]["b"])):  # an entry gone, another's
        files = {k: v for k, v in (whole["files"] | {name: item}).items() if v}
        (folder / "manifest.json").write_text(json.dumps(whole | {"files": files}))
        with pytest.raises(UserError, match="manifest.json: damaged"):
            read_manifest(folder)
    del whole["sha256"]  # as before they had one
    (folder / "manifest.json").write_text(json.dumps(whole))
    assert read_manifest(folder).keys() == {"a", "b"}
    for text in ("", "{", "[]", "{}", '{"files": [1]}', '{"files": {"a": 1}}', "9" * 5000):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="manifest.json: damaged"):
            read_manifest(folder)
