"""Which of a folder's files are meant for training, or for another split, as their names tell."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from xplus_fast.data.compressed import stem
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


def rest_of(name: str) -> str:
    """What a name says beside its split: "en-fr" of "en-fr.train", "train-en-fr" and "en-fr"."""
    shard = _SHARD.fullmatch(name)
    words = re.split(r"([a-zA-Z]+)", shard[1] if shard else name)
    return "".join(word for word in words if word.lower() not in _SPLITS).strip(".-_ ")


def same_split(wanted: str, names: Sequence[str]) -> str | None:
    """That of the names which is the split, by another word for it where need be ("dev")."""
    if wanted in names:
        return wanted
    told = [n for n in names if n.lower() in _SPLITS and _SPLITS[n.lower()] == _SPLITS.get(wanted)]
    return told[0] if len(told) == 1 else None


def choose_split(
    folder: Path, files: list[Path], split: str | None = None
) -> tuple[list[Path], list[Path]]:
    """The files of a split, and those of others; all of them where no name tells.

    files: in the folder, or in folders of it. split: None is that of training. Raises `UserError`
    where it is not clear what is meant.
    """
    told: dict[str, list[Path]] = {}
    for file in files:
        told.setdefault(_split_of_file(file, folder), []).append(file)
    if split is None:
        chosen = told.get("train", [])
        unclear = told.get("", [])
        others = [f for name, these in told.items() if name not in ("train", "") for f in these]
        if unclear and (chosen or others):
            raise UserError(
                f"{folder}: the names of {_some(chosen + others)} tell splits, that of"
                f" {_some(unclear)} does not; name the files to train on"
            )
        if others and not chosen:
            raise UserError(
                f"{folder}: holds {_some(others)}, none of a training split; name the files to"
                " train on, or another `split:`"
            )
        chosen = chosen or unclear
    else:
        wanted = _SPLITS.get(split.lower(), " ")
        chosen = told.get(wanted, [])
        if wanted == "train" and {*told} == {""}:
            chosen = told[""]
        # one by its whole name: train_sft, validation_matched
        chosen = chosen or [f for f in files if split in (_set_of(f), *_folders(f, folder))]
        if not chosen:
            found = dict.fromkeys(_split_of_file(f, folder) or _set_of(f) for f in files)
            raise UserError(f"{folder}: no split '{split}'; found {some(found, 8)}")
    if doubled := next((f for f in chosen if _twice(f, chosen)), None):
        raise UserError(
            f"{folder}: {doubled.name} is there in several formats; name the one to train on"
        )
    shards = {m[1] for file in chosen if (m := _SHARD.fullmatch(stem(file)))}
    if len(shards) > 1:
        raise UserError(
            f"{folder}: holds several sets, {some(sorted(shards))}; name the files to train on, or"
            " one of these as `split:`"
        )
    return sorted(chosen), sorted(file for file in files if file not in chosen)


def missing_piece(files: Sequence[Path]) -> str:
    """The first piece that is not among those of its set, as 00001-of-00002; empty if none is."""
    names = {stem(file) for file in files}
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            pieces = int(name[-5:])
            wanted = [f"{shard[1]}-{i:05}-of-{pieces:05}" for i in range(pieces)]
            if gone := next((piece for piece in wanted if piece not in names), ""):
                return gone
    return ""


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _some(files: list[Path]) -> str:
    return some(file.name for file in files)


def _folders(file: Path, root: Path) -> list[str]:
    """The folders between the root and the file, the nearest first."""
    return list(file.relative_to(root).parts[-2::-1])


def _split_of_file(file: Path, root: Path) -> str:
    """The file's own name goes before its folders'."""
    names = [stem(file), *_folders(file, root)]
    return next((split for name in names if (split := split_of(name))), "")


def _set_of(file: Path) -> str:
    shard = _SHARD.fullmatch(stem(file))
    return shard[1] if shard else stem(file)


def _twice(file: Path, files: list[Path]) -> bool:
    return any(stem(f) == stem(file) and f.parent == file.parent for f in files if f != file)
