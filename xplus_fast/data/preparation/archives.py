"""Zips of OPUS: line-aligned members named by language, beside them much that is none.

    en-sw.txt.zip: README, LICENSE, GNOME.en-sw.en, GNOME.en-sw.sw, GNOME.en-sw.ids, maybe .scores

Members that begin alike and end in two languages are a corpus; a zip may hold several.
"""

import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xplus_fast.data.files import Rejected, decoded
from xplus_fast.data.languages import canonical, is_language, two_languages
from xplus_fast.data.readers import Pair
from xplus_fast.data.splits import some, split_of
from xplus_fast.errors import UserError

# Endings of members that are no text of a corpus; some are codes of languages, too (xml, txt, ids).
_ASIDE = frozenset("ids xml txt scores md html htm pdf json gz info log csv tsv".split())
_NOTES = ("readme", "license", "licence", "copying", "info", "about")
Scored = tuple[Pair, tuple[str, str | Rejected] | None]  # with where its score stands, and it


def read_archive(
    path: Path, languages: Sequence[str], subset: str | None
) -> Iterator[Scored | Rejected]:
    """Stream the pairs of a zip's corpora, one after the other.

    languages: of the pairs; empty: as the members' names tell. subset: the corpus to read; None:
    all. Raises `UserError` for a broken zip, members that do not fit each other, and where it is
    not clear which are meant.
    """
    with _opened(path) as archive:
        corpora = _corpora(archive, path, languages, subset)
        # Counted before any work: of members that slipped no pair is right.
        for stem, members in list(corpora.items()):
            try:
                _check_lengths(archive, path, stem, members)
            except UserError as e:
                if len(corpora) == 1:
                    raise
                del corpora[stem]  # the others are right
                yield Rejected(f"{path}/{stem}", "a corpus that is not whole", str(e))
        for stem, members in corpora.items():
            yield from _read(archive, path, stem, members)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as e:
        raise UserError(f"{path}: not a whole zip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def _corpora(
    archive: zipfile.ZipFile, path: Path, languages: Sequence[str], subset: str | None
) -> dict[str, dict[str, str]]:
    """Beginning of the members' names -> language -> member, two of each."""
    groups: dict[str, dict[str, str]] = {}
    for name in archive.namelist():
        *folders, last = name.split("/")
        stem, dot, code = name.removesuffix(".txt").rpartition(".")
        if "__MACOSX" in folders or last[:1] in ("", ".") or not dot or "/" in code:
            continue
        notes = last.lower().startswith(_NOTES)
        if code not in _ASIDE and not notes and is_language(code):
            groups.setdefault(stem, {})[code] = name
    found: dict[str, dict[str, str]] = {}
    for stem, members in groups.items():
        if subset is not None and subset not in (stem, stem.rpartition("/")[2]):
            continue
        if chosen := _two(members, languages, f"{path}/{stem}"):
            found[stem] = chosen
    names = [name for members in groups.values() for name in members.values()]
    if not found:
        wanted = f" in {' and '.join(languages)}" if languages else ""
        of = f" of '{subset}'" if subset else ""
        raise UserError(
            f"{path}: no two line-aligned members{of}{wanted};"
            f" found {some(names or archive.namelist(), 6) or 'nothing'}"
        )
    others = [stem for stem in found if split_of(stem.rpartition("/")[2]) not in ("", "train")]
    if others and subset is None:
        raise UserError(f"{path}: holds {some(found)}; `subset:` names the one to read")
    return found


def _two(members: dict[str, str], languages: Sequence[str], where: str) -> dict[str, str] | None:
    """The members in the two languages, by the codes that the pairs shall have; None: not there."""
    if not languages:
        told = where.rpartition(".")[2].rpartition("/")[2].split("-")  # en-sw of GNOME.en-sw
        if len(told) == 2 and all(code in members for code in told):
            return {code: members[code] for code in told}
        if len(members) > 2:
            raise UserError(
                f"{where}: has members in {', '.join(members)}; `languages: [en, sw]` chooses two"
            )
        if len(members) < 2:
            return None
        two_languages(list(members), where)
        return members
    two_languages(languages, where)
    found = {}
    for code in languages:
        base = canonical(code).partition("_")[0]
        same = [m for m in members if m == code or canonical(m) == canonical(code)]
        # `sr_Latn` may be what the recipe knows of a member that is named sr
        same = same or [m for m in members if canonical(m).partition("_")[0] == base]
        if len(same) != 1:
            return None
        found[code] = members[same[0]]
    return found


def _check_lengths(
    archive: zipfile.ZipFile, path: Path, stem: str, members: dict[str, str]
) -> None:
    names = [*members.values(), *_scores(archive, stem)]
    counts = {name: sum(1 for _ in _lines(archive, path, name)) for name in names}
    short, long = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if not counts[long]:
        raise UserError(f"{path}: {long} is empty")
    if counts[short] != counts[long]:
        raise UserError(
            f"{path}: {short} is shorter than the other, which ends in {path}/{long}:{counts[long]}"
            f" (not :{counts[short]})"
        )


def _scores(archive: zipfile.ZipFile, stem: str) -> list[str]:
    return [name for name in archive.namelist() if name == f"{stem}.scores"]


def _read(
    archive: zipfile.ZipFile, path: Path, stem: str, members: dict[str, str]
) -> Iterator[Scored | Rejected]:
    first, second = members
    streams = [_lines(archive, path, name) for name in members.values()]
    scored = next((_lines(archive, path, name) for name in _scores(archive, stem)), None)
    for (where, a), (_, b) in zip(*streams, strict=True):
        score = next(scored) if scored else None
        if isinstance(a, Rejected):
            yield a
        elif isinstance(b, Rejected):
            yield b
        else:
            yield Pair(where, (first, second), (a, b)), score


def _lines(archive: zipfile.ZipFile, path: Path, name: str) -> Iterator[tuple[str, str | Rejected]]:
    try:
        stream = archive.open(name)
    except (RuntimeError, NotImplementedError) as e:  # a password, a method that Python lacks
        raise UserError(f"{path}: cannot be unpacked ({e})") from None
    with stream:
        yield from decoded(stream, f"{path}/{name}")
