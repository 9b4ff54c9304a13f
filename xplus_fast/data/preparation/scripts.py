"""A language in another script: Serbian in Cyrillic, Chinese in the other characters.

Chinese is opencc's. Serbian is a table: its Latin letters stand for the Cyrillic ones but for three
digraphs, which are two letters in a few words. Words that are not Serbian stay as they are.
"""

import re
from collections.abc import Callable

from xplus_fast.data.languages import canonical
from xplus_fast.errors import UserError

# from -> to, in canonical codes
KNOWN = {"sr_Latn": "sr", "zh_Hant": "zh", "zh": "zh_Hant"}
_OPENCC = {"zh": "t2s", "zh_Hant": "s2t"}
_CYRILLIC = dict(
    zip(
        "abvgd\u0111e\u017ezijklmnoprst\u0107ufhc\u010d\u0161",
        "\u0430\u0431\u0432\u0433\u0434\u0452\u0435\u0436\u0437\u0438\u0458\u043a\u043b\u043c\u043d"
        "\u043e\u043f\u0440\u0441\u0442\u045b\u0443\u0444\u0445\u0446\u0447\u0448",
        strict=True,
    )
)
_DIGRAPHS = {"lj": "\u0459", "nj": "\u045a", "d\u017e": "\u045f"}
_DIGRAPHS |= {"\u01c9": "\u0459", "\u01cc": "\u045a", "\u01c6": "\u045f"}  # as one character
_LETTER = re.compile("d\u017e|lj|nj|.", re.IGNORECASE | re.DOTALL)
# Beginnings of words in which n and j, d and z with caron are two letters
_APART = re.compile(
    "(?:kon(?=jug|junk)|in(?=jek|jic)|tan(?=jug)|an(?=jon)|nad(?=\u017eiv|\u017enj|\u017eet)"
    "|od(?=\u017eal|\u017eiv)|pod(?=\u017eanr|\u017eup)|pred(?=\u017eivot)|van(?=jezi))",
    re.IGNORECASE,
)
# Left as they are: addresses, placeholders, tags, entities, Roman numbers, words with a digit or
# with a letter that Serbian does not have
_KEPT = re.compile(
    r"(?:https?://|www\.)\S+|\S+@\S+|%\(\w+\)\w|%\d*\$?[a-z](?!\w)|\{[^{}]*\}|<[^<>]*>|&#?\w+;"
    r"|\b[IVX]{2,}\b|\w*\d\w*|\w+"
)


def check_conversion(source: str, target: str, at: str) -> None:
    """See that one code's texts can be turned into the other's here. Raises `UserError`."""
    if KNOWN.get(canonical(source)) != canonical(target):
        known = ", ".join(f"{a}: {b}" for a, b in KNOWN.items())
        raise UserError(f"{at}: {source}: {target}: not known; known: {known}")
    converter(canonical(target))


def converter(target: str) -> Callable[[str], str]:
    """What turns a text into the script of one of the codes that `KNOWN` leads to.

    Raises `UserError` where opencc is wanted and not installed.
    """
    if target == "sr":
        return cyrillic
    try:
        import opencc
    except ImportError:
        raise UserError(
            f"convert: to {target}: needs opencc: pip install 'xplus-fast[prepare]'"
        ) from None
    return opencc.OpenCC(_OPENCC[target]).convert


def cyrillic(text: str) -> str:
    """Serbian in Latin letters -> in Cyrillic ones; a text that is mostly Cyrillic stays."""
    latin = sum(c.isascii() and c.isalpha() for c in text)
    if sum("\u0400" <= c <= "\u04ff" for c in text) > latin:
        return text
    return _KEPT.sub(lambda match: _word(match[0]), text)


def _word(word: str) -> str:
    letters = {*_CYRILLIC, *_DIGRAPHS}
    if not all(c.lower() in letters for c in word) or re.fullmatch("[IVX]{2,}", word):
        return word
    begun = _APART.match(word)
    pieces = [*(begun[0] if begun else ""), *_LETTER.findall(word[begun.end() if begun else 0 :])]
    made = ""
    for piece in pieces:
        low = piece.lower()
        letter = _DIGRAPHS.get(low) or _CYRILLIC[low]
        made += letter.upper() if piece[0] != low[0] else letter
    return made
