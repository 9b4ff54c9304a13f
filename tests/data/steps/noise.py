"""Clean pairs of 16 languages and the noise that is planted into them.

Real sentences: news (FLORES-200) and everyday ones (Tatoeba, TICO-19) where shared data are, the
translations of Django's messages otherwise. Thresholds were set on sentences whose hash is even;
these are the odd ones.
"""

import gzip
import os
import random
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from xplus_fast.data.steps.format import FormatOptions, tidy
from xplus_fast.data.steps.plain import UNSPACED

SHARED = Path(os.environ.get("XPLUS_DATA", Path(__file__).parents[4] / "shared/data"))
LANGUAGES = "ar bn cs de es fr hu ja ko ru sr sw te th vi zh".split()
FLORES = {
    "ar": "arb_Arab", "bn": "ben_Beng", "cs": "ces_Latn", "de": "deu_Latn", "en": "eng_Latn",
    "es": "spa_Latn", "fr": "fra_Latn", "hu": "hun_Latn", "ja": "jpn_Jpan", "ko": "kor_Hang",
    "ru": "rus_Cyrl", "sr": "srp_Cyrl", "sw": "swh_Latn", "te": "tel_Telu", "th": "tha_Thai",
    "vi": "vie_Latn", "zh": "zho_Hans",
}  # fmt: skip
# Django has few sentences in some languages, and they are dialogues of an interface
DJANGO = {"sr": "sr", "zh": "zh_Hans"}
Pair = tuple[str, str]


def held_out(text: str) -> bool:
    return blake2b(text.encode(), digest_size=4).digest()[0] % 2 == 1


def news(language: str) -> list[str]:
    """FLORES's lines, all of them, in the order that all languages share."""
    if not SHARED.is_dir():
        pytest.skip("FLORES-200 is not at hand")
    text = (SHARED / f"flores200/{FLORES[language]}.devtest").read_text("utf-8")
    return text.splitlines()


def news_pairs(language: str) -> list[Pair]:
    pairs = zip(news("en"), news(language), strict=True)
    return _chosen([pair for pair in pairs if held_out(pair[0])])


def everyday_pairs(language: str) -> list[Pair]:
    if not SHARED.is_dir():
        return _chosen(_django(language))
    name = "tico19" if language == "sw" else "tatoeba"
    sides = [
        gzip.open(SHARED / f"parallel/{name}.en-{language}.{side}.gz", "rt", encoding="utf-8")
        .read().split("\n")
        for side in ("en", language)
    ]  # fmt: skip
    pairs = zip(*sides, strict=True)
    return _chosen([pair for pair in pairs if all(pair) and held_out(pair[0])])


def _chosen(pairs: list[Pair]) -> list[Pair]:
    """Distinct ones, in a fixed random order."""
    pairs = list(dict.fromkeys(pairs))
    random.Random(0).shuffle(pairs)
    return pairs


def _django(language: str) -> list[Pair]:
    django = pytest.importorskip("django", reason="its translations stand in for the shared data")
    polib = pytest.importorskip("polib")
    code = DJANGO.get(language, language)
    files = Path(django.__file__).parent.glob(f"**/locale/{code}/LC_MESSAGES/*.po")
    entries = (e for f in sorted(files) for e in polib.pofile(str(f)).translated_entries())
    return [
        (e.msgid, e.msgstr)
        for e in entries
        if len(e.msgid.split()) >= 4 and e.msgstr and not re.search(r"[%{<\n]", e.msgid + e.msgstr)
    ]


def row(source: str, target: str, language: str) -> dict[str, str]:
    return {"source": source, "target": target, "source_language": "en",
            "target_language": language}  # fmt: skip


DEBRIS = (
    '<div class="a"', "</td>", "&nbsp;", "&#160;", "{{cite web|title=", "[[File:x.png|", "<br/>",
    "[url=http://a.example]", "\\n", "<!-- -->", "\\u00e9", 'style="width:', "}}", "<b>&amp;nbsp;",
)  # fmt: skip
PROGRAM = '<script type="text/javascript">var a = 1; show(a);</script>'


def marked(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice(
        [
            f"<b>{words[at]}</b>", f'<a href="http://a.example/x" title="y">{words[at]}</a>',
            f"{{\\i {words[at]}}}", f"[b]{words[at]}[/b]", f"{words[at]} {rng.choice(DEBRIS)}",
        ]
    )  # fmt: skip
    return rng.choice(
        [
            " ".join(words), " ".join(words), f'<p class="x">{text}</p>', PROGRAM + text,
            f"<style>p {{color: red}}</style> {text}", f"{text} {text}",
            f"<!-- a -->{text}<!-- b -->", text.replace(" ", "&nbsp;", 1) + "&amp;nbsp;",
        ]
    )  # fmt: skip


ENCODINGS = ("latin-1", "sloppy-windows-1252", "sloppy-windows-1250", "sloppy-windows-1251",
             "koi8-r", "twice", "mac-roman")  # fmt: skip
# Code pages of one byte that are taken for one another
CONFUSED = {
    "cs": ("cp1250", "cp1252"), "hu": ("cp1250", "cp1252"), "ru": ("koi8-r", "cp1251"),
    "sr": ("koi8-r", "cp1251"),
}  # fmt: skip


def garbled(text: str, language: str, rng: random.Random) -> str:
    """The text as if read in another encoding; itself where that shows nothing."""
    encoding = rng.choice(ENCODINGS)
    if language in CONFUSED and rng.random() < 0.2:
        written, read = CONFUSED[language]
        raw = text.encode(written, "ignore")
        # one letter is no evidence
        if sum(byte > 0x7F for byte in raw) < 8:
            return text
        return raw.decode(read, "ignore")
    if encoding == "twice":
        text = text.encode().decode("sloppy-windows-1252")
        encoding = "sloppy-windows-1252"
    return text.encode().decode(encoding)


def looped(text: str, rng: random.Random) -> str:
    space = "" if UNSPACED.search(text) else " "
    words = text.split(" ") if space else list(text)
    size = rng.choice([1, 2, 3]) * (1 if space else 3)
    at = rng.randrange(max(1, len(words) - size))
    phrase = space.join(words[at : at + size])
    return text[: len(text) // 2] + space + space.join([phrase] * 8)


def subwords(text: str) -> str:
    return " ".join(f"{w[:2]}@@ {w[2:]}" if len(w) > 4 else w for w in text.split(" "))


def unwritten(text: str) -> str:
    return "".join(c if c.isascii() else "?" for c in text)


def changed(text: str, others: list[str], rng: random.Random, count: int = 1) -> str:
    """With words of other texts in the place of some."""
    if UNSPACED.search(text):
        for _ in range(count):
            size, other = rng.choice([1, 2, 3]), rng.choice(others)
            at = rng.randrange(max(1, len(text) - size))
            there = rng.randrange(max(1, len(other) - size))
            text = text[:at] + other[there : there + size] + text[at + size :]
        return text
    words = text.split(" ")
    for at in rng.sample(range(len(words)), min(count, len(words))):
        words[at] = rng.choice(rng.choice(others).split(" "))
    return " ".join(words)


KINDS = (
    "wrong target", "wrong source", "swapped", "copy", "markup", "mojibake", "too short",
    "too long", "cut off", "loop", "subwords", "lost letters", "misaligned",
)  # fmt: skip


def plant(
    kind: str, clean: dict[str, list[Pair]], seed: int = 1
) -> Iterator[tuple[str, str, dict]]:
    """Noisy rows of a kind, as (language, the right target, row)."""
    rng = random.Random(f"{kind} {seed}")
    for language, pairs in clean.items():
        others = [o for o in clean if o != language]
        for s, t in pairs:
            source, target, right = s, t, tidy(t, FormatOptions(), language)
            if kind == "wrong target":
                target = rng.choice(clean[rng.choice(others)])[1]
            elif kind == "wrong source":
                source = rng.choice(clean[rng.choice(others)])[1]
            elif kind == "swapped":
                source, target = t, s
            elif kind == "copy":
                target = s
            elif kind == "markup":
                target = marked(t, rng)
            elif kind == "mojibake":
                target = garbled(right, language, rng)
            elif kind == "too short":
                target = t[:1] if rng.random() < 0.5 else "..."
            elif kind == "too long":
                target = " ".join(rng.choice(pairs)[1] for _ in range(8)) + " " + t
            elif kind == "cut off":
                target = t[: int(len(t) * rng.uniform(0.3, 0.7))].rstrip()
            elif kind == "loop":
                target = looped(t, rng)
            elif kind == "subwords":
                target = subwords(t)
            elif kind == "lost letters":
                target = unwritten(t)
            elif kind == "misaligned":
                target = rng.choice([other for _, other in pairs if other != t])
            small = kind in ("too short", "cut off") and min(len(s), len(t)) < 20
            # Thai has no question marks to tell lost letters by, but then all of it is lost
            if not small and (kind in ("wrong source", "misaligned") or target not in (t, right)):
                yield language, right, row(source, target, language)
