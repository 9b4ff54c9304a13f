"""Files -> lines and records, each with the place it came from.

A fault of one line or record comes back in its place as a `Rejected`, because the reader may skip
it; a fault of the whole file (missing, empty, a broken gzip) raises `UserError`.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xplus_fast.data.compressed import as_utf8, kind, opened
from xplus_fast.data.folders import RECORDS, TABLES, choose_files, saved_dataset
from xplus_fast.errors import UserError
from xplus_fast.files import resolve

LINE_LIMIT = 16 << 20  # bytes of a line, or of an item of a JSON list
WHOLE_LIMIT = 64 << 20  # bytes of a file, or of a unit of one, that a library takes in whole
TEXT_LIMIT = 4_000_000  # characters of a conversation; tokenizing one takes 100 bytes
_ROWS = 256  # of a table that are in memory at a time
_SPACES = re.compile(r"[ \t\n\r]*")
_LIST = re.compile(rb"\s*\[\s*\{")  # of records, in JSON, where no line counts


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used: where it stands, the kind of fault, and its particulars."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def require(path: str) -> Path:
    """The path with `~` expanded; `UserError` if there is nothing there."""
    found = resolve(path)
    if not found.exists():
        raise UserError(f"{path}: no such file or folder")
    return found


def read_lines(path: Path) -> Iterator[tuple[str, str | Rejected]]:
    r"""Yield ("file:line", text) for each line of a plain or compressed file, without its end.

    Only \n ends a line (\r before it is dropped): U+2028 and its like occur inside sentences, and
    splitting there would shift the alignment of two files.
    """
    empty = True
    with opened(path) as f:
        for line in decoded(f, str(path)):
            empty = False
            yield line
    if empty:
        raise UserError(f"{path}: the file is empty")


def decoded(stream: Any, name: str) -> Iterator[tuple[str, str | Rejected]]:
    """Yield ("name:line", text) for each line of a stream, as `read_lines` does for a file's."""
    number, stream = 0, as_utf8(stream)
    while raw := stream.readline(LINE_LIMIT + 2):
        number += 1
        where = f"{name}:{number}"
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > 8 and max(raw[i::2].count(0) for i in (0, 1)) > len(raw) // 3:
                raise UserError(f"{where}: no text in UTF-8, nor in UTF-16 with its mark")
        whole = number == 1 and not raw.endswith(b"\n")  # all of it in one line
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if whole and b"\r" in raw and not _LIST.match(raw):
            raise UserError(f"{where}: its lines end in \\r alone, \\n or \\r\\n is wanted")
        if len(raw) > LINE_LIMIT:
            raise UserError(f"{where}: a line of more than {LINE_LIMIT >> 20} MiB")
        try:
            yield where, raw.decode("utf-8")
        except UnicodeDecodeError as e:
            yield where, Rejected(where, "not UTF-8", f"byte {e.start + 1} of the line")


def read_records(
    path: Path, split: str | None = None, subset: str | None = None, *, header: bool = True
) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yield (where, record) from a file of records (`RECORDS`) or a folder of them.

    split, subset: as `choose_files` has them. header: whether the first line of a table names its
    columns; without one they are "1", "2", ...

    `where` is "file:line" for JSONL and tables, "file:row" for Parquet and `datasets`,
    "file: item N" for a JSON list; all count from 1.
    """
    if path.is_dir() and (saved := saved_dataset(path, split, subset)):
        yield from _saved(saved)
        return
    for file in choose_files(path, split, subset).files:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif kind(file) in TABLES:
            yield from _table(file, header)
        elif kind(file) in RECORDS:
            yield from _json(file)
        else:
            raise UserError(
                f"{file}: {', '.join(RECORDS)} files hold records; this is none of them"
            )


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


def _table(path: Path, header: bool) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Rows of a CSV or TSV file, by the names of their columns.

    CSV is quoted as RFC 4180 has it, parted by the comma, semicolon or tab that its first line has
    most of. TSV is quoted only where its header is: a text may begin with a quote; but what writers
    of quoted TSV make of one with quotes in it is undone.
    """
    csv.field_size_limit(LINE_LIMIT)
    quoted = kind(path) == ".csv" or (header and _begins_quoted(path))
    rows = _csv_rows(path) if quoted else _tsv_rows(path)
    names: list[str] | None = None
    for where, row in rows:
        if isinstance(row, Rejected):
            if header and names is None:
                raise UserError(f"{row}: the names of the columns are wanted here")
            yield where, row
            continue
        if names is None:
            names = [str(i) for i in range(1, len(row) + 1)]
            if header:
                names = [n.strip() or f"column {i}" for i, n in enumerate(row, 1)]
                if twice := next((n for n in names if names.count(n) > 1), None):
                    raise UserError(f"{where}: two columns are named '{twice}'")
                continue
        if len(row) != len(names):
            detail = f"{len(names)} are wanted, found {len(row)}"
            yield where, Rejected(where, "a row with more or fewer columns", detail)
            continue
        yield where, dict(zip(names, row, strict=True))


def _begins_quoted(path: Path) -> bool:
    _, first = next(read_lines(path))
    return isinstance(first, str) and first.startswith('"')


def _tsv_rows(path: Path) -> Iterator[tuple[str, list[str] | Rejected]]:
    for where, line in read_lines(path):
        if isinstance(line, Rejected):
            yield where, line
        elif line:
            yield where, [_unquoted(cell) for cell in line.split("\t")]


def _unquoted(cell: str) -> str:
    """`"a ""b"" c"` -> `a "b" c`; anything else as it is, `"a"` too, which is a text in quotes."""
    if len(cell) < 4 or cell[0] != '"' or cell[-1] != '"':
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if re.fullmatch(r'(?:[^"]|"")*""(?:[^"]|"")*', inner) else cell


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str] | Rejected]]:
    places: list[str] = []  # of the row's lines
    bad: list[Rejected] = []  # those of them that cannot be read

    def lines() -> Iterator[str]:
        for place, line in read_lines(path):
            places.append(place)
            if isinstance(line, Rejected):
                bad.append(line)
                line = ""
            yield line + "\n"

    first = next((line for _, line in read_lines(path) if line), "")
    told = re.sub(r'"[^"]*"', "", first) if isinstance(first, str) else ""
    delimiter = max(",;\t", key=told.count)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        places.clear()
        bad.clear()
        try:
            row = next(reader, None)
        except csv.Error as e:
            where = places[0]
            if "end of data" in str(e) or "field limit" in str(e):
                raise UserError(f"{where}: a quoted text that does not end ({e})") from None
            yield where, bad[0] if bad else Rejected(where, "malformed CSV", str(e))
            continue
        if row is None:
            return
        if bad:
            yield bad[0].where, bad[0]
        elif row:
            yield places[0], row


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
    if isinstance(record, tuple):
        return where, Rejected(where, *record)
    return where, {k: _there(v) for k, v in record.items()}


def _there(value: Any) -> Any:
    """Without the keys that a table makes up: it gives each item all keys of any, filled with null.

    A tool's parameters would have those of all tools, a call's arguments those of all calls.
    """
    if isinstance(value, dict):
        return {k: _there(v) for k, v in value.items() if v is not None}
    return [_there(v) for v in value] if isinstance(value, list) else value


def _saved(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    import datasets
    import pyarrow

    row = 0
    try:
        loaded = datasets.load_from_disk(str(path))
        for batch in loaded.with_format("arrow").iter(_ROWS):
            for record in _rows(batch):
                row += 1
                yield _placed(record, f"{path}:{row}")
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as e:
        raise UserError(
            f"{path}: not a whole folder of `datasets` ({' '.join(str(e).split())[:200]})"
        ) from None
