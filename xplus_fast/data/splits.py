"""Which of a folder's files are meant for training, as their names tell."""

import re
from collections.abc import Iterable
from pathlib import Path

from xplus_fast.errors import UserError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "tests", "testing", "eval", "evaluation", "heldout", "holdout"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
# as `datasets` names the pieces of a split: train-00000-of-00002.parquet
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def split_of(name: str) -> str:
    """The split that a name tells ("train" of "train-00000-of-00002"); empty if none or several."""
    told = {_SPLITS[word] for word in re.findall(r"[a-z]+", name.lower()) if word in _SPLITS}
    return told.pop() if len(told) == 1 else ""


def choose_split(folder: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files of the training split, and those of others; all of them where no name tells.

    files: in the folder, or in folders of it. Raises `UserError` where it is not clear what to
    train on.
    """
    told: dict[str, list[Path]] = {}
    for file in files:
        # the file's own name goes before its folder's
        split = split_of(_stem(file)) or split_of(file.parent.name if file.parent != folder else "")
        told.setdefault(split, []).append(file)
    chosen = told.pop("train", [])
    unclear = told.pop("", [])
    others = [file for split in told.values() for file in split]
    if unclear and (chosen or others):
        raise UserError(
            f"{folder}: the names of {_some(chosen + others)} tell splits, that of"
            f" {_some(unclear)} does not; name the files to train on"
        )
    if others and not chosen:
        raise UserError(
            f"{folder}: holds {_some(others)}, none of a training split; name the files to train on"
        )
    chosen = chosen or unclear
    stems = [_stem(file) for file in chosen]
    if doubled := next((f for f in chosen if _twice(f, chosen)), None):
        raise UserError(
            f"{folder}: {doubled.name} is there in several formats; name the one to train on"
        )
    shards = {m[1] for stem in stems if (m := _SHARD.fullmatch(stem))}
    if len(shards) > 1:
        raise UserError(
            f"{folder}: holds several sets, {some(sorted(shards))}; name the files to train on"
        )
    return sorted(chosen), sorted(others)


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _some(files: list[Path]) -> str:
    return some(file.name for file in files)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[0]


def _twice(file: Path, files: list[Path]) -> bool:
    return any(_stem(f) == _stem(file) and f.parent == file.parent for f in files if f != file)
