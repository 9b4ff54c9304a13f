"""A folder's list of its own files: manifest.json, written last, with the size and SHA-256 of each.

A folder without one was cut off; one whose files differ from it is damaged. The list has a SHA-256
of its own, so that an entry that went missing is noticed, too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.files import NewFile, write_file

MANIFEST = "manifest.json"


def write_manifest(folder: Path, made: Mapping[str, NewFile]) -> None:
    """List the files of a new folder, by name, each written with its digest. Raises `OSError`."""
    files = {n: {"bytes": f.size, "sha256": f.digest.hexdigest()} for n, f in made.items()}
    document = {"files": files, "sha256": _digest(files)}
    write_file(folder / MANIFEST, [json.dumps(document, indent=1).encode()])


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}; `UserError` if there is no manifest or it is damaged."""
    file = folder / MANIFEST
    try:
        document = json.loads(file.read_bytes())
        listed = document["files"]
        own = _digest(listed)
        if document.get("sha256", own) != own:  # an older manifest has none
            raise ValueError
        if not all(item.keys() == {"bytes", "sha256"} for item in listed.values()):
            raise ValueError
        if any(Path(name).name != name or "\0" in name for name in listed):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}: cut off while it was written") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: damaged: not a list of files and their checksums") from None
    return listed


def is_whole(folder: Path) -> bool:
    """Whether a folder has a manifest and its files the sizes that it says."""
    try:
        listed = read_manifest(folder)
        return all((folder / n).stat().st_size == item["bytes"] for n, item in listed.items())
    except (UserError, OSError):
        return False


def check_files(folder: Path, hint: str) -> list[str]:
    """The names of a folder's files, after every one's size and SHA-256 has been looked at.

    Raises `UserError` naming the file that is missing or damaged, with a hint behind it.
    """
    listed = read_manifest(folder)
    for name, item in listed.items():
        file = folder / name
        try:
            if (size := file.stat().st_size) != item["bytes"]:
                raise UserError(f"{file}: damaged: {size} bytes, not {item['bytes']}; {hint}")
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as e:
            raise UserError(f"{file}: cannot be read ({e.strerror or e}); {hint}") from None
        if digest != item["sha256"]:
            raise UserError(f"{file}: damaged: its SHA-256 is not that of {MANIFEST}; {hint}")
    return list(listed)


def _digest(listed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
