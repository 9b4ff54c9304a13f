"""Which files of a folder, or of a data set on the hub, hold the records that are asked for.

| laid out as | subset | split |
|---|---|---|
| the card (README.md) has `configs` | config_name | split, of data_files |
| data/train-00000-of-00002.parquet, train.jsonl, train/0.jsonl | | by the name |
| en-sw/train.parquet, data/en-sw/train/0.parquet | en-sw | by the name |

Names alone decide, so that nothing of the hub is downloaded to find out.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from xplus_fast.data.compressed import kind, stem
from xplus_fast.data.splits import (
    choose_split,
    rest_of,
    same_split,
    some,
    split_of,
)
from xplus_fast.errors import UserError

TABLES = (".csv", ".tsv")
RECORDS = (".jsonl", ".json", ".parquet", *TABLES)
PREPARED = ".xplus-prepare"  # marks what `xplus-fast prepare` made: shards, manifest, report
CARD = "README.md"
# Descriptions that lie beside data.
_ABOUT = ("dataset_infos.json", "dataset_info.json", "state.json", "manifest.json", "config.json")
# What `datasets.save_to_disk` leaves beside the data: a dataset, a dictionary of splits.
_DATASET, _SPLITS = "state.json", "dataset_dict.json"
_CARD_LIMIT = 4 << 20  # bytes; some list hundreds of configs


@dataclass(frozen=True)
class Chosen:
    """Files of records: those to read and those left alone."""

    files: list[Path]
    left: list[Path] = field(default_factory=list)


def choose_files(path: Path, split: str | None = None, subset: str | None = None) -> Chosen:
    """The files that hold the records of `path`.

    path: a file, what `xplus-fast prepare` or `datasets` wrote, or a folder with files of records,
    laid out as on the hub or not. split: None: of those that names tell, the training split.
    subset: None: the only one.

    Raises `UserError` for a folder without records, and where it is not clear what is meant.
    """
    if not path.is_dir():
        return Chosen([path])
    if saved := saved_dataset(path, split, subset):
        return Chosen(sorted(p for p in saved.rglob("*") if p.is_file()))
    if (path / PREPARED).is_file():
        _refuse(path, split, subset)
        return Chosen(sorted(path.glob("data-*.parquet")))
    names = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name[0] != "."]
        names += [(Path(folder) / name).relative_to(path).as_posix() for name in files]
    card = _read_card(path / CARD) if (path / CARD).is_file() else ""
    return choose_names(path, names, card, split, subset)


def _refuse(path: Path, split: str | None, subset: str | None) -> None:
    for option, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise UserError(
                f"{path}: {option}: {value}: this folder holds one set, with no {option}s"
            )


def saved_dataset(path: Path, split: str | None, subset: str | None) -> Path | None:
    """The folder of the one data set that `datasets` saved in `path`; None: it did not.

    Raises `UserError` where `path` does not hold the split or subset that is asked for.
    """
    if (path / _DATASET).is_file():
        _refuse(path, split, subset)
        return path
    if not (path / _SPLITS).is_file():
        return None
    try:
        told = json.loads((path / _SPLITS).read_bytes())["splits"]
        names = [name for name in told if isinstance(name, str) and (path / name).is_dir()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path / _SPLITS}: damaged ({e})") from None
    _refuse(path, None, subset)
    found = same_split(split or "train", names)
    if found is None:
        raise UserError(f"{path}: holds the splits {some(names)}; name one of these as `split:`")
    return path / found


def snapshot(path: Path) -> Path:
    """The newest revision's files, where `path` is what the hub's cache keeps of a repository."""
    try:
        revision = (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return path
    found = path / "snapshots" / revision
    return found if found.is_dir() else path


def choose_names(
    root: Path, names: Sequence[str], card: str, split: str | None, subset: str | None
) -> Chosen:
    """`choose_files`, of a folder `root` that holds these files; card: the text of its README.md.

    names: relative to `root`, with "/".
    """
    records = sorted(
        name
        for name in names
        if kind(path := Path(name)) in RECORDS and path.name[0] != "." and path.name not in _ABOUT
    )
    if not records:
        raise UserError(
            f"{root}: no data in this folder; {', '.join(RECORDS)} files, gettext catalogs"
            " (<language>/LC_MESSAGES/*.po) or a folder saved by `datasets` are read"
        )
    configs = _configs(root, card)
    if configs:
        chosen = _by_card(root, records, configs, split, subset)
    else:
        chosen = _by_layout(root, records, split, subset)
    return Chosen(chosen, [root / name for name in records if root / name not in chosen])


# --- by the card ---


def _read_card(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_CARD_LIMIT).decode("utf-8", "replace")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def _configs(root: Path, card: str) -> dict[str, dict[str, list[str]]]:
    """subset -> split -> patterns of names, as the card's head has them; "" where it has none."""
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", card, re.DOTALL)
    if not head:
        return {}
    try:
        tree = yaml.safe_load(head[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a readme of something else
        return {}
    told = tree.get("configs") if isinstance(tree, dict) else None
    found: dict[str, dict[str, list[str]]] = {}
    default = None
    for config in told if isinstance(told, list) else []:
        if not isinstance(config, dict):
            continue
        name = str(config.get("config_name", "default"))
        files = config.get("data_files")
        if files is None and config.get("data_dir"):
            files = "**"
        if files is None:
            continue
        if isinstance(files, dict):
            files = [{"split": split, "path": path} for split, path in files.items()]
        below = str(config["data_dir"]).strip("./") + "/" if config.get("data_dir") else ""
        splits: dict[str, list[str]] = {}
        for item in files if isinstance(files, list) else [files]:
            at, paths = ("", item)
            if isinstance(item, dict):
                at, paths = str(item.get("split", "")), item.get("path")
            for pattern in paths if isinstance(paths, list) else [paths]:
                splits.setdefault(at, []).append(below + str(pattern).removeprefix("./"))
        found[name] = splits
        default = name if config.get("default") is True else default
    if default is not None:  # first, which `_by_card` takes
        found = {default: found[default], **found}
        found["default"] = found[default]
    return found


def _by_card(
    root: Path,
    records: list[str],
    configs: dict[str, dict[str, list[str]]],
    split: str | None,
    subset: str | None,
) -> list[Path]:
    from fsspec.utils import glob_translate

    name = subset or ("default" if "default" in configs else next(iter(configs)))
    if name not in configs or (subset is None and len(configs) > 1 and name != "default"):
        raise UserError(
            f"{root}: {'no subset ' + repr(subset) if subset else 'several subsets'} in its card:"
            f" {some(configs, 8)}; name one of these as `subset:`"
        )

    def files(patterns: list[str]) -> list[Path]:
        wanted = [re.compile(glob_translate(pattern)) for pattern in patterns]
        return [root / n for n in records if any(w.match(n) for w in wanted)]

    splits = configs[name]
    if set(splits) == {""}:  # files without a split: their names tell it
        found = files(splits[""])
        found = choose_split(root, found, split)[0] if found else []
    else:
        at = same_split(split or "train", list(splits))
        if at is None:
            raise UserError(
                f"{root}: no split '{split or 'train'}' in its card: {some(splits, 8)}; name one of"
                " these as `split:`"
            )
        found = files(splits[at])
    if not found:
        raise UserError(f"{root}: its card names files for '{name}', and none of them is there")
    return found


# --- by the layout ---


def _by_layout(root: Path, records: list[str], split: str | None, subset: str | None) -> list[Path]:
    groups: dict[str, list[str]] = {}
    for name in records:
        groups.setdefault(_subset(name), []).append(name)
    if subset is not None:
        wanted = subset.strip("/")
        found = (
            groups.get(wanted)
            or [n for n in records if n.startswith((f"{wanted}/", f"data/{wanted}/"))]
            or [n for n in groups.get("", []) if rest_of(stem(Path(n))) == wanted]
        )
        if not found:
            named = [g for g in groups if g] or [rest_of(stem(Path(n))) for n in records]
            raise UserError(f"{root}: no subset '{subset}'; found {some(dict.fromkeys(named), 8)}")
    elif "" in groups:
        # what lies at the top goes before what lies below it
        found = [n for n in groups[""] if "/" not in n] or groups[""]
    elif len(groups) == 1:
        (found,) = groups.values()
    else:
        raise UserError(
            f"{root}: has data in the folders {some(groups)}; name one of them, as `subset:` or in"
            " the path"
        )
    return choose_split(root, _of_a_kind([root / n for n in found]), split)[0]


def _subset(name: str) -> str:
    """What the folders of a name say beside `data` and splits."""
    *folders, _ = name.split("/")
    return "/".join(filter(None, (rest_of(f) for f in folders if f != "data")))


def _of_a_kind(files: list[Path]) -> list[Path]:
    """Without tables that lie beside other records and whose names tell no split: notes."""
    if all(kind(f) in TABLES for f in files):
        return files
    return [f for f in files if kind(f) not in TABLES or split_of(stem(f))]
