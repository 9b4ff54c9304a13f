"""A corpus, and what a run that nothing disturbs makes of it."""

import gzip
import json
from pathlib import Path

import pytest

from tests.data.preparation.runs import recipe
from xplus_fast import cli


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Django's messages, French and Swahili, as two line-aligned files and JSONL, with noise."""
    polib = pytest.importorskip("polib")
    django = pytest.importorskip("django", reason="its catalogs are the corpus")
    folder = tmp_path_factory.mktemp("corpus")
    pairs = {}
    for code in ("fr", "sw"):
        files = Path(django.__file__).parent.glob(f"**/locale/{code}/LC_MESSAGES/*.po")
        entries = [e for f in sorted(files) for e in polib.pofile(str(f)).translated_entries()]
        pairs[code] = [
            (e.msgid, e.msgstr)
            for e in entries
            if len(e.msgid.split()) > 3 and "\n" not in e.msgid + e.msgstr
        ]
    for side, code in enumerate(("en", "fr")):
        lines = [pair[side] for pair in pairs["fr"]]
        with gzip.open(folder / f"django.{code}.gz", "wt", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
    records = [{"translation": {"en": a, "sw": b}} for a, b in pairs["sw"]]
    records += records[:10]  # exact duplicates, of which some go for other reasons
    records += [{"translation": {"en": a, "sw": a}} for a, _ in pairs["sw"][:10]]  # copies
    (folder / "sw.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "flores.devtest").write_text(pairs["sw"][3][0].upper() + "\n")
    return folder


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(["prepare", str(recipe(corpus, folder))]) == 0
    return folder / "out"
