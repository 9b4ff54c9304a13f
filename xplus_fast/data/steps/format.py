"""Step 1, format: every text in one form, and what cannot be brought into it goes.

Unicode NFC, mojibake, entities, markup, control and invisible characters, white space, and the
placeholders of user interfaces.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, judge_rows
from xplus_fast.data.steps.characters import NO_MARKS, scripts_of
from xplus_fast.data.steps.letters import own_letters
from xplus_fast.data.steps.markup import TEMPLATE, doubtful_markup, strip_markup
from xplus_fast.data.steps.mojibake import mend_encoding
from xplus_fast.options import Count


@dataclass(frozen=True)
class FormatOptions:
    max_characters: Count = 10_000  # of either text, before its markup goes
    mojibake: Literal["repair", "reject"] = "repair"  # UTF-8 that was read as another encoding
    markup: Literal["strip", "reject", "keep"] = "strip"  # HTML, wiki and subtitle markup
    # %(name)s, {name}, %d: "agree": the same ones on both sides
    placeholders: Literal["agree", "reject", "keep"] = "agree"


# Characters that a text made of whole words may lose: controls, byte order marks, soft hyphens,
# directional marks, icons of fonts; not the joiners of Indic and Arabic scripts.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ue000-\uf8ff]"
)
_SPACE = re.compile(r"\s\s+|[^\S ]")  # of str: the no-break and ideographic ones, too
# Question marks that stand for letters which an encoding had not
_WITHIN = re.compile(r"[^\W\d_]\?+[^\W\d_A-Z]")
_UNWRITTEN = re.compile(
    r"[^\W\d_]\?\s+[^\W\d_A-Z]|[^\W\d_]\?[,;:]|[^\W\d_]\?\.(?!\.)|(?<![\w?])\?+\w|\?\s+\?"
    r"|(?<![\w?])\?{3,}"
)
_LINK = re.compile(r"(?:\w{1,10}://|www\.)\S*")
_ASKS = re.compile("[?;\u037e\u061f\uff1f\u055e\u1367\u00bf]")
_PLACEHOLDER = re.compile(
    r"%\([A-Za-z_]\w*\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]|%\d+\$[a-z@]|%[sdifrxg](?![\w%])|%@"
    r"|%?\$?\{[A-Za-z_][\w.]*\}|\{\d+\}|\{\}|\{\s?\w{1,60}(?=\s?,\s?(?:plural|select))"
)
_COMMAND = re.compile(r"\\[A-Za-z]{2,20}(?:\[[^\[\]]{0,200}\])?\{[^{}]{0,300}\}")  # of TeX
# Bytes of letters as addresses, mails and programs write them
_ENCODED = re.compile(
    r"%[C-Fc-f][0-9A-Fa-f]%[89ABab][0-9A-Fa-f]|\w%20\w+%20\w|=[C-F][0-9A-F]=[89AB][0-9A-F]"
    r"|\\x[89a-f][0-9a-f]|[^\W\d_]\\[23][0-7]{2}|[^\W\d_]\+A[A-Z][A-Za-z0-9+/]-"
)


def format_pairs(batch: pa.RecordBatch, options: FormatOptions) -> Judged:
    """Bring both texts of every pair into one form."""

    def judge(source: str, target: str, *languages: str) -> tuple[str, str]:
        texts = []
        for side, text, language in zip(
            ("source", "target"), (source, target), languages, strict=True
        ):
            try:
                texts.append(tidy(text or "", options, language))
            except Reject as e:
                raise Reject(f"{side}: {e.reason}", e.detail) from None
        _one_sided(texts[0], texts[1], languages, options)
        if options.placeholders != "keep":
            _placeholders(texts[0], texts[1], options)
        return texts[0], texts[1]

    return judge_rows(batch, judge)


def tidy(text: str, options: FormatOptions, language: str = "") -> str:
    """One text, of the language that a canonical code names, in its form; raises `Reject` where
    that cannot be."""
    if len(text) > options.max_characters:
        raise Reject("too long", f"{len(text)} characters")
    if not text.isascii():
        if "\ufffd" in text:
            raise Reject("broken characters", "U+FFFD")
        text = _letters(text, options, language)
    if options.markup != "keep":
        text = strip_markup(text, reject=options.markup == "reject")
        if "\ufffd" in text:
            raise Reject("broken characters", "U+FFFD")
    # what is printable has no invisible characters, and no white space but spaces
    if not text.isprintable() or "  " in text:
        text = _SPACE.sub(" ", _INVISIBLE.sub("", text))
    text = text.strip()
    if not text:
        raise Reject("empty")
    return text


def _letters(text: str, options: FormatOptions, language: str) -> str:
    script = scripts_of(language)[0]
    mended = mend_encoding(text, language, script)
    if mended != text and options.mojibake == "reject":
        raise Reject("mojibake", mended[:60])
    return own_letters(mended, language.partition("_")[0], script)


def _one_sided(
    source: str, target: str, languages: tuple[str, ...], options: FormatOptions
) -> None:
    """Reject what is a fault where only one side has it."""
    for side, text, other in (("source", source, target), ("target", target, source)):
        if "?" in text:
            said = _LINK.sub("", text)
            unasked = not NO_MARKS.isdisjoint(code.partition("_")[0] for code in languages)
            more = said.count("?") - len(_ASKS.findall(other)) > 1 or not _ASKS.search(other)
            if _WITHIN.search(said) or more and not unasked and _UNWRITTEN.search(said):
                raise Reject(f"{side}: lost characters", text[:60])
        if found := _encoded(text):
            if not _encoded(other):
                raise Reject(f"{side}: encoded characters", found)
        if options.markup != "keep" and (found := doubtful_markup(text)):
            if not doubtful_markup(other):
                raise Reject(f"{side}: markup debris", found)


def _encoded(text: str) -> str:
    if "%" not in text and "=" not in text and "\\" not in text and "+A" not in text:
        return ""
    found = _ENCODED.search(_LINK.sub("", text))
    return found[0] if found else ""


def _placeholders(source: str, target: str, options: FormatOptions) -> None:
    if "%" not in source and "{" not in source and "%" not in target and "{" not in target:
        return
    found = _held(source), _held(target)
    if found[0] == found[1] and options.placeholders == "agree":
        return
    ours, theirs = map(Counter, found)
    if options.placeholders == "reject" and (ours or theirs):
        raise Reject("placeholders", ", ".join(ours | theirs))
    if ours != theirs:
        odd = (ours - theirs) + (theirs - ours)
        raise Reject("placeholders differ", ", ".join(odd))


def _held(text: str) -> list[str]:
    """The placeholders of a text; those within the forms of a plural are not compared."""
    text = _COMMAND.sub("", text) if "\\" in text else text
    return _PLACEHOLDER.findall(TEMPLATE.sub(_outer, text))


def _outer(template: re.Match[str]) -> str:
    name, _, rest = template[0].partition(",")
    return f"{name.strip()}, {rest.split(',')[0].strip()}" if rest else template[0]
