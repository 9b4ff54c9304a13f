"""Texts without case, punctuation and white space: what tells one sentence from another."""

import re
import unicodedata
from functools import cache

# Scripts that do not set spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)


def plain(text: str) -> str:
    """In lower case, words set apart by single spaces, no punctuation."""
    return _noise().sub(" ", text.casefold()).strip()


def words(text: str) -> list[str]:
    return plain(text).split()


def glued(text: str) -> str:
    """`plain` without spaces: the same for a text and its segmentation into words."""
    return _noise().sub("", text.casefold())


@cache
def _noise() -> re.Pattern[str]:
    """Whatever is no letter, mark or digit. `re` has no class that counts the vowel signs of
    Indic scripts and of Thai as parts of words."""
    ranges, start = ["\U0001f000-\U0001fbff"], None  # emoji; more ranges as high would be slow
    for code in range(0x10001):
        outside = code < 0x10000 and unicodedata.category(chr(code))[0] not in "LMN"
        if outside and start is None:
            start = code
        elif not outside and start is not None:
            ranges.append(f"\\u{start:04x}-\\u{code - 1:04x}")
            start = None
    return re.compile(f"[{''.join(ranges)}]+")
