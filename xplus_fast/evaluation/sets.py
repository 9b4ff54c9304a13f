"""Test sets of translation: line-aligned files, documents, WMT24++ as distributed; and terms.

| `files` | what is one text |
|---|---|
| any text | a line; with `documents`, the lines between empty ones |
| `.jsonl` | a row of WMT24++; with `documents`, the rows of a document_id |
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xplus_fast.data.files import Rejected, kind, read_lines, read_records
from xplus_fast.data.languages import canonical, code_of, codes_of, is_language
from xplus_fast.errors import UserError
from xplus_fast.evaluation.recipe import TestSet
from xplus_fast.files import resolve

Sides = tuple[list[str], list[str]]
BREAK = "\n\n"  # between the segments of a document


@dataclass(frozen=True)
class Lines:
    """One direction of a test set."""

    name: str  # "flores200:en-sw"
    languages: tuple[str, str]
    sources: list[str]
    references: list[str]
    # a term of the source -> what may stand for it; None: the set has no file of terms
    terms: dict[str, list[str]] | None = None
    left_out: int = 0  # rows that the set itself calls bad

    def first(self, count: int) -> "Lines":
        """The same of the first sentences alone."""
        return replace(self, sources=self.sources[:count], references=self.references[:count])


def read_sets(sets: Sequence[TestSet]) -> list[Lines]:
    """Every direction of the test sets. Raises `UserError` for what their files lack."""
    found = []
    texts: dict[tuple[Path, bool], list[str]] = {}  # a language's file is of many directions
    for test in sets:
        for direction in test.directions:
            a, b = codes_of(direction)
            at = f"translation.sets: {test.name} {direction}"
            places = [resolve(test.files.format(lang=test.languages.get(c, c))) for c in (a, b)]
            left_out = 0
            if places[0] == places[1] and kind(places[0]) != ".jsonl":
                raise UserError(f"{at}: {places[0]}: is the file of both languages")
            if kind(places[0]) == ".jsonl":
                sides, left_out = _wmt24pp(places, (a, b), test.documents, at)
            else:
                for key in (key for p in places if (key := (p, test.documents)) not in texts):
                    texts[key] = _read(*key)
                sides = (texts[places[0], test.documents], texts[places[1], test.documents])
                if len(sides[0]) != len(sides[1]):
                    what = "documents" if test.documents else "lines"
                    raise UserError(
                        f"{at}: {len(sides[0])} {what} and {len(sides[1])}: equally many are wanted"
                    )
            terms = read_terms(resolve(test.terms), (a, b)) if test.terms else None
            cut = [side[: test.limit] for side in sides]
            name = f"{test.name}:{direction}"
            found.append(Lines(name, (a, b), cut[0], cut[1], terms, left_out))
    return found


def _read(path: Path, documents: bool = False) -> list[str]:
    if not path.is_file():
        raise UserError(f"translation.sets: {path}: no such file")
    lines = []
    for _, line in read_lines(path):
        if isinstance(line, Rejected):
            raise UserError(f"translation.sets: {line}")
        lines.append(line)
    if not documents:
        return lines
    texts: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            texts[-1].append(line)
        elif texts[-1]:
            texts.append([])
    return ["\n".join(text) for text in texts if text]


def _wmt24pp(
    places: Sequence[Path], languages: tuple[str, str], documents: bool, at: str
) -> tuple[Sides, int]:
    """Sources and references of WMT24++ (Deutsch et al. 2025, arXiv 2502.12404), and how many rows
    were left out: those of a bad source and the canary, as its card says.

    Its files, en-de_DE.jsonl, are of English and another language; the other way round is asked of
    the same rows. places: the file if `files` names the source's language, and the target's.
    """
    path = next((p for p in places[::-1] if p.is_file()), None)
    if path is None:
        other = f" nor {places[1].name}" if places[0] != places[1] else ""
        raise UserError(f"translation.sets: {places[0]}{other}: no such file")
    wanted = tuple(map(canonical, languages))
    rows: dict[Any, tuple[list[str], list[str]]] = {}
    left_out = 0
    for number, (where, row) in enumerate(read_records(path)):
        if isinstance(row, Rejected):
            raise UserError(f"translation.sets: {row}")
        ends, texts = _wmt24pp_row(row, where)
        if set(ends) != set(wanted):
            raise UserError(
                f"{at}: {where}: its languages are {' and '.join(ends)} (lp), not {wanted[0]} and"
                f" {wanted[1]}"
            )
        if row.get("is_bad_source") or row.get("domain") == "canary":
            left_out += 1
            continue
        key = row.get("document_id") if documents else number
        if key is None:
            raise UserError(f"{at}: {where}: 'document_id' is missing, which documents: true asks")
        sides = rows.setdefault(key, ([], []))
        for side, text in zip(sides, texts if ends == wanted else texts[::-1], strict=True):
            side.append(text)
    if not rows:
        raise UserError(f"translation.sets: {path}: no usable row in it")
    joined = [[BREAK.join(pair[side]) for pair in rows.values()] for side in (0, 1)]
    return (joined[0], joined[1]), left_out


def _wmt24pp_row(row: dict[str, Any], where: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """The row's languages, and its texts."""
    for key in ("lp", "source", "target"):
        if not isinstance(row.get(key), str):
            raise UserError(
                f"translation.sets: {where}: {key!r} is missing or no text: rows of WMT24++ are"
                " wanted in .jsonl"
            )
    codes = codes_of(row["lp"])
    if len(codes) != 2 or not all(map(is_language, codes)):
        raise UserError(f"translation.sets: {where}: lp is not two languages: {row['lp']!r:.40}")
    return (canonical(codes[0]), canonical(codes[1])), (row["source"], row["target"])


def read_terms(path: Path, languages: tuple[str, str]) -> dict[str, list[str]]:
    """Terms of the first language, `folded` -> what may stand for each in the second.

    A TSV: codes of languages in its first line, a term in each of them in the others; several forms
    with "|" between them. Raises `UserError` for what it lacks.
    """
    if not path.is_file():
        raise UserError(f"translation.sets: terms: {path}: no such file")
    lines = [line.split("\t") for line in _read(path)]
    header = [cell.strip() for cell in lines[0]]
    while header and not header[-1]:  # as spreadsheets leave them
        header.pop()
    named = [code_of(cell) for cell in header]
    if None in named or not header:
        unknown = header[named.index(None)] if header else ""
        raise UserError(
            f"{path}:1: {unknown!r:.40} is no language: the first line names the columns, such as"
            " en<tab>sw"
        )
    header = [code for code in named if code]
    columns = [_column(header, code, path) for code in languages]
    found: dict[str, list[str]] = {}
    for number, cells in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            raise UserError(
                f"{path}:{number}: {len(cells)} cells, the first line has {len(header)}"
            )
        forms = [[f.strip() for f in cells[c].split("|") if f.strip()] for c in columns]
        for term in forms[0] if forms[1] else ():
            known = found.setdefault(folded(term), [])
            known += [form for form in forms[1] if form not in known]
    if not found:
        raise UserError(f"{path}: no term of {languages[0]} and {languages[1]} in it")
    return found


def folded(text: str) -> str:
    """A text as terms are looked for: whatever its case, normal form and spaces."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def _column(header: list[str], code: str, path: Path) -> int:
    exact = [i for i, cell in enumerate(header) if cell == code]
    alike = [i for i, cell in enumerate(header) if canonical(cell) == canonical(code)]
    if not alike:
        raise UserError(f"{path}:1: no column of {code}; there are {', '.join(header)}")
    return (exact or alike)[0]
