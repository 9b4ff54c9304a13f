"""Files -> lines and records, each with the place it came from.

A fault of one line or record comes back in its place as a `Rejected`, because the reader may skip
it; a fault of the whole file (missing, empty, a broken gzip) raises `UserError`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.files import resolve

RECORDS = (".jsonl", ".json", ".parquet")
PREPARED = ".xplus-prepare"  # marks what `xplus-fast prepare` made: shards, manifest, report
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
    """The files that hold the records of `path`: itself, or what a folder has of them.

    A folder's subfolders are left alone: they often hold test splits.
    """
    if not path.is_dir():
        return [path]
    if saved_dataset(path):
        return sorted(p for p in path.rglob("*") if p.is_file())
    if (path / PREPARED).is_file():
        return sorted(path.glob("data-*.parquet"))
    found = sorted(p for p in path.iterdir() if kind(p) in RECORDS)
    if not found:
        raise UserError(
            f"{path}: no data in this folder; {', '.join(RECORDS)} files, gettext catalogs"
            " (<language>/LC_MESSAGES/*.po) or a folder saved by `datasets` are read"
        )
    return found


def saved_dataset(path: Path) -> bool:
    return (path / _DATASET).is_file() or (path / _SPLITS).is_file()


def read_lines(path: Path) -> Iterator[tuple[str, str | Rejected]]:
    r"""Yield ("file:line", text) for each line of a plain or gzip file, without its end.

    Only \n ends a line (\r before it is dropped): U+2028 and its like occur inside sentences, and
    splitting there would shift the alignment of two files.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            number = 0
            for number, raw in enumerate(f, 1):
                where = f"{path}:{number}"
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield where, raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as e:
                    yield where, Rejected(where, "not UTF-8", f"byte {e.start + 1} of the line")
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


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
        yield from _json_list(path)
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


def _json_list(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    lines = []
    for _, line in read_lines(path):
        if isinstance(line, Rejected):
            raise UserError(str(line))
        lines.append(line)
    try:
        items = json.loads("\n".join(lines))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: malformed JSON ({e.msg}, column {e.colno})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: malformed JSON ({e})") from None
    for i, item in enumerate(items, 1):
        where = f"{path}: item {i}"
        yield where, _record(item, where)


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
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", record
    except pyarrow.ArrowException as e:
        raise UserError(f"{path}: not a valid Parquet file ({' '.join(str(e).split())})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({' '.join(str(e).split())})") from None


def _saved(path: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as e:
        raise UserError(
            f"{path}: not a whole folder of `datasets` ({' '.join(str(e).split())})"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        raise UserError(
            f"{path}: holds the splits {', '.join(loaded)}; name one of these folders in it instead"
        )
    for i, record in enumerate(loaded, 1):
        yield f"{path}:{i}", record
