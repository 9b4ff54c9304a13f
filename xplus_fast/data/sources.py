"""Where a source of a recipe lies, here or on the hub, and which of its files are read."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from xplus_fast.config import Source, is_hub_data
from xplus_fast.data.files import require
from xplus_fast.data.folders import Chosen, choose_files, choose_names, snapshot
from xplus_fast.data.splits import missing_piece
from xplus_fast.errors import UserError
from xplus_fast.model.hub import data_from_hub


def located(source: Source) -> Path:
    """Where the source lies: what of it is on the hub is downloaded. Raises `UserError`."""
    assert isinstance(source.path, str)
    if is_hub_data(source.path):
        return _downloaded(source.path, source.split, source.subset)
    return snapshot(require(source.path))


@cache
def _downloaded(name: str, split: str | None, subset: str | None) -> Path:
    def choose(names: Sequence[str], card: str) -> list[str]:
        root = Path(name)
        found = choose_names(root, names, card, split, subset).files
        return [file.relative_to(root).as_posix() for file in found]

    return data_from_hub(name, choose)


def chosen_files(source: Source) -> Chosen:
    """The files of records that a source is read from, and those left alone."""
    chosen = choose_files(located(source), source.split, source.subset)
    # a download that was cut off, gone on with where the hub is not reached
    if is_hub_data(str(source.path)) and (piece := missing_piece(chosen.files)):
        raise UserError(f"{source.path}: {piece} is not in the hub's cache; download it")
    return chosen
