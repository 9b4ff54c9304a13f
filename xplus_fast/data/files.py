"""Files -> lines and records, each with the place it came from.

A fault of one line or record comes back in its place as a `Rejected`, because the reader may skip
it; a fault of the whole file (missing, empty, a broken gzip) raises `UserError`.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xplus_fast.data.splits import choose_split, some, split_of
from xplus_fast.errors import UserError
from xplus_fast.files import resolve

LINE_LIMIT = 16 << 20  # bytes of a line, or of an item of a JSON list
WHOLE_LIMIT = 64 << 20  # bytes of a file, or of a unit of one, that a library takes in whole
TEXT_LIMIT = 4_000_000  # characters of a conversation; tokenizing one takes 100 bytes
_ROWS = 256  # of a table that are in memory at a time
RECORDS = (".jsonl", ".json", ".parquet")
PREPARED = ".xplus-prepare"  # marks what `xplus-fast prepare` made: shards, manifest, report
# Descriptions that lie beside data.
_ABOUT = ("dataset_infos.json", "dataset_info.json", "state.json", "manifest.json", "config.json")
_SPACES = re.compile(r"[ \t\n\r]*")
# What `datasets.save_to_disk` leaves beside the data: a dataset, a dictionary of splits.
_DATASET, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used: where it stands, the kind of fault, and its particulars."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def kind(path: Path) -> str:
    """The suffix that tells a file's format: ".jsonl" of both a.jsonl and a.jsonl.gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def stem(path: Path) -> str:
    """The file's name without suffix: "a" of both a.jsonl and a.jsonl.gz."""
    return path.name.removesuffix(".gz").removesuffix(kind(path))


def require(path: str) -> Path:
    """The path with `~` expanded; `UserError` if there is nothing there."""
    found = resolve(path)
    if not found.exists():
        raise UserError(f"{path}: no such file or folder")
    return found


def data_files(path: Path) -> list[Path]:
    """The files that hold the records of `path`: itself, or a folder's training split."""
    return choose_files(path)[0]


def choose_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that hold the records of `path`, and those of other splits that are left alone.

    path: a file, what `xplus-fast prepare` or `datasets` wrote, or a folder with files of records,
    laid out as on the hub or not: where names tell splits, those of the training split are taken.

    Raises `UserError` for a folder without records, and where names do not tell what is meant.
    """
    if not path.is_dir():
        return [path], []
    if saved_dataset(path):
        return sorted(p for p in path.rglob("*") if p.is_file()), []
    if (path / PREPARED).is_file():
        return sorted(path.glob("data-*.parquet")), []
    return choose_split(path, _record_files(path))


def _record_files(path: Path) -> list[Path]:
    """What a folder has of files of records; of its subfolders only where it has none itself."""

    def of(folder: Path) -> list[Path]:
        found = (p for p in folder.iterdir() if kind(p) in RECORDS and p.is_file())
        return sorted(p for p in found if p.name[0] != "." and p.name not in _ABOUT)

    if found := of(path):
        return found
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    below = {f: of(f) for f in folders}
    below = {f: files for f, files in below.items() if files}
    told = [split_of(f.name) for f in below]
    if len(below) > 1 and not all(told):
        raise UserError(
            f"{path}: has data in the folders {some(f.name for f in below)}; name one of them"
        )
    if not below:
        raise UserError(
            f"{path}: no data in this folder; {', '.join(RECORDS)} files, gettext catalogs"
            " (<language>/LC_MESSAGES/*.po) or a folder saved by `datasets` are read"
        )
    return [p for files in below.values() for p in files]


def saved_dataset(path: Path) -> bool:
    return (path / _DATASET).is_file() or (path / _SPLITS).is_file()


def read_lines(path: Path) -> Iterator[tuple[str, str | Rejected]]:
    r"""Yield ("file:line", text) for each line of a plain or gzip file, without its end.

    Only \n ends a line (\r before it is dropped): U+2028 and its like occur inside sentences, and
    splitting there would shift the alignment of two files.
    """
    empty = True
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            for line in decoded(f, str(path)):
                empty = False
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if empty:
        raise UserError(f"{path}: the file is empty")


def decoded(stream: Any, name: str) -> Iterator[tuple[str, str | Rejected]]:
    """Yield ("name:line", text) for each line of a stream, as `read_lines` does for a file's."""
    number = 0
    while raw := stream.readline(LINE_LIMIT + 2):
        number += 1
        where = f"{name}:{number}"
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(raw) > LINE_LIMIT:
            raise UserError(f"{where}: a line of more than {LINE_LIMIT >> 20} MiB")
        try:
            yield where, raw.decode("utf-8")
        except UnicodeDecodeError as e:
            yield where, Rejected(where, "not UTF-8", f"byte {e.start + 1} of the line")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yield (where, record) from a JSONL, JSON or Parquet file or a folder of them.

    `where` is "file:line" for JSONL, "file:row" for Parquet and `datasets`, "file: item N" for a
    JSON list; all count from 1.
    """
    if path.is_dir() and saved_dataset(path):
        yield from _saved(path)
        return
    for file in data_files(path):
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif kind(file) in RECORDS:
            yield from _json(file)
        else:
            raise UserError(f"{file}: {', '.join(RECORDS)} files hold records, this is another")


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """JSON lines, or one list; the first character tells, as both go under both suffixes."""
    for _, line in read_lines(path):
        if isinstance(line, Rejected) or line.strip():
            break
    else:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(line, Rejected) and line.lstrip().startswith("["):
        for _ in _list_items(path):  # a fault of the file stops before any item is used
            pass
        for i, item in enumerate(_list_items(path), 1):
            where = f"{path}: item {i}"
            yield where, _record(item, where)
        return
    for where, line in read_lines(path):
        if isinstance(line, Rejected):
            yield where, line
        elif line.strip():
            try:
                yield where, _record(json.loads(line), where)
            except (ValueError, RecursionError) as e:
                column = f", column {e.colno}" if isinstance(e, json.JSONDecodeError) else ""
                message = getattr(e, "msg", str(e))
                yield where, Rejected(where, "malformed JSON", f"{message}{column}")


def _list_items(path: Path) -> Iterator[Any]:
    """The items of a file that is one JSON list, without more of it in memory than an item."""
    lines = read_lines(path)
    decoder = json.JSONDecoder()
    text, first, at = "", 1, 0  # what is at hand, the number of its first line, where we are in it

    def fault(message: str, position: int) -> UserError:
        line = first + text.count("\n", 0, position)
        column = position - text.rfind("\n", 0, position)
        return UserError(f"{path}:{line}: malformed JSON ({message}, column {column})")

    def more() -> bool:
        """Take in more lines, as many again; whether there were any."""
        nonlocal text, first, at
        first += text.count("\n", 0, at)
        parts, size, wanted = [text[at:]], 0, max(1 << 16, len(text) - at)
        at = 0
        if len(parts[0]) > LINE_LIMIT:
            raise UserError(f"{path}:{first}: an item of more than {LINE_LIMIT >> 20} MiB")
        while size < wanted:
            _, line = next(lines, (None, None))
            if line is None:
                break
            if isinstance(line, Rejected):
                raise UserError(str(line))
            parts.append(line + "\n")
            size += len(line) + 1
        text = "".join(parts)
        return size > 0

    def peek() -> str:
        """The next character that is no space, not yet taken; empty at the end."""
        nonlocal at
        while True:
            at = _SPACES.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or not more():
                return text[at : at + 1]

    wants = "["
    while True:
        found = peek()
        if wants and found == "]" and wants != "[":
            at += 1
            break
        if not wants or found not in wants:
            raise fault(f"Expecting '{wants[0]}'" if wants else "Extra data", at)
        at += 1
        if wants == "[" and peek() == "]":
            at += 1
            break
        peek()
        while True:
            try:
                item, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as e:
                failure = fault(e.msg, e.pos)
                if not more():
                    raise failure from None
                continue
            except (ValueError, RecursionError) as e:
                raise fault(str(e), at) from None
            if end == len(text) and more():  # a number may go on
                continue
            break
        at = end
        yield item
        wants = ",]"
    if peek():
        raise fault("Extra data", at)


def _record(item: Any, where: str) -> dict[str, Any] | Rejected:
    if isinstance(item, dict):
        return item
    return Rejected(where, "not a JSON object", f"found {type(item).__name__}")


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for record in _rows(batch):
                    row += 1
                    yield _placed(record, f"{path}:{row}")
    except pyarrow.ArrowException as e:
        raise UserError(f"{path}: not a valid Parquet file ({' '.join(str(e).split())})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({' '.join(str(e).split())})") from None


def _rows(batch: Any) -> Iterator[Any]:
    """A batch's records; in place of one with values that Python cannot have, what it says."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # not UTF-8, or a date out of range: of which row?
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as e:
            yield "not UTF-8", f"byte {e.start + 1} of a text"
        except (ValueError, OverflowError) as e:
            yield "a value that cannot be read", " ".join(str(e).split())[:200]


def _placed(record: Any, where: str) -> tuple[str, dict[str, Any] | Rejected]:
    return where, Rejected(where, *record) if isinstance(record, tuple) else record


def _saved(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    import datasets
    import pyarrow

    row = 0
    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            raise UserError(
                f"{path}: holds the splits {', '.join(loaded)};"
                " name one of these folders in it instead"
            )
        for batch in loaded.with_format("arrow").iter(_ROWS):
            for record in _rows(batch):
                row += 1
                yield _placed(record, f"{path}:{row}")
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{path}: not a whole folder of `datasets` ({' '.join(str(e).split())[:200]})"
        ) from None
