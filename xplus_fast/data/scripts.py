"""In which script a text is written."""

import unicodedata
from collections import Counter
from functools import cache

from xplus_fast.data.steps.characters import SCRIPTS
from xplus_fast.data.steps.identify import chinese_scripts


def in_script(text: str, language: str) -> bool | None:
    """Whether a text is in the script that a language's code means: Cyrillic for sr, Latin for
    sr_Latn, Simplified for zh.

    By most of its letters; of Chinese characters, by those that one script alone has. None: it has
    no letters, or nothing is known of the script.
    """
    script = _script(language)
    wanted = SCRIPTS.get(script)
    letters = Counter(_letter(c) for c in text if c.isalpha())
    total = letters.total()
    if wanted is None or not total:
        return None
    if 2 * sum(letters[name] for name in wanted) < total:
        return False
    if script in ("Hans", "Hant"):
        simplified, traditional = chinese_scripts(text)
        right, wrong = (simplified, traditional)
        if script == "Hant":
            right, wrong = wrong, right
        return wrong <= right
    return True


@cache
def _script(language: str) -> str:
    from langcodes import Language

    return Language.get(language).maximize().script or ""


@cache
def _letter(character: str) -> str:
    """The script in a letter's name; that of FULLWIDTH LATIN and HALFWIDTH KATAKANA, too."""
    first, _, rest = unicodedata.name(character, "").partition(" ")
    return rest.partition(" ")[0] if first in ("FULLWIDTH", "HALFWIDTH", "MODIFIER") else first
