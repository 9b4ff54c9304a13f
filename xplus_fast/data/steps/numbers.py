"""Numbers of two texts that contradict each other: "1995" against "1959".

One that only one side has may be written out on the other. Numbers are the same however they are
grouped and whatever their unit: thousands, ten thousands and lakhs, decimal commas, times of twelve
and twenty-four hours, years of two digits and of other calendars, feet and metres.
"""

import re
import unicodedata
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

_NUMBER = re.compile(
    r"(?<!\d)\d{1,3}(?:[.,' \u00a0\u202f\u066c]\d{3})+(?![\d])(?:[.,\u066b]\d+)?"  # 1 234 567.8
    r"|\d+(?:[.,:\u066b\u066c]\d+)*"  # 5.30, 17:30, 12,5, 25,00,000, 9.11.2001
)
_DIGITS = re.compile(r"\d+")
_MYRIADS = re.compile(
    r"(?<!\d)(?<!\d[.,])"  # one beginning a number, or long ones take quadratic time
    r"(?:\d[\d.,]*\s?[\u767e\u5343\u4e07\u842c\u5104\u4ebf\u5146\ubc31\ucc9c\ub9cc\uc5b5\uc870]+\s?)+(?:\d[\d.,]*)?"
)
_MYRIAD = re.compile(r"(\d[\d.,]*)\s?([^\d\s.,]*)")
_UNITS = {
    "\u767e": 100, "\u5343": 1000, "\u4e07": 10**4, "\u842c": 10**4, "\u5104": 10**8,
    "\u4ebf": 10**8, "\u5146": 10**12, "\ubc31": 100, "\ucc9c": 1000, "\ub9cc": 10**4,
    "\uc5b5": 10**8, "\uc870": 10**12,
}  # fmt: skip
# Years: what a calendar's are ahead of or behind the common ones
CALENDARS = {
    "th": (543,), "lo": (543,), "km": (543, 544), "my": (543, 544), "si": (543, 544),
    "fa": (-621, -622), "ps": (-621, -622), "ne": (56, 57), "am": (-7, -8), "ti": (-7, -8),
    "he": (3760, 3761), "bn": (-593, -594), "hi": (56, 57, -78),
    # lunar years, of this century and the last
    **dict.fromkeys(("ar", "ur"), tuple(range(-583, -576))),
}  # fmt: skip
_ERAS = {
    "\u660e\u6cbb": 1867, "\u5927\u6b63": 1911, "\u662d\u548c": 1925, "\u5e73\u6210": 1988,
    "\u4ee4\u548c": 2018, "\u6c11\u56fd": 1911, "\u6c11\u570b": 1911,
}  # fmt: skip
_ERA = re.compile(f"({'|'.join(_ERAS)})(\\d{{1,3}})")
_HALVES = re.compile(  # 5.30pm, and what else is the time of day
    r"\d\s?[ap]\.?\s?m\b|\bo'clock\b|\bin the (?:morning|afternoon|evening)\b|\bat night\b"
    r"|\d\s?(?:Uhr|h|heures|horas|hod|\u00f3ra|gi\u1edd|\u0447\u0430\u0441\u043e?\u0432?)\b|\d\s?[\u70b9\u9ede\u65f6\u6642\uc2dc]",
    re.I,
)
# Counted from six in the morning and in the evening: Swahili, Amharic
_FROM_SIX = re.compile("\\bsaa\\b|\u1230\u12d3\u1275|\u1230\u12a0\u1275", re.I)
# Superscripts are no digits of the number before them, and fractions are its decimals
_SMALL = re.compile("[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2153\u2154]")
_RAISED = str.maketrans({
    **dict.fromkeys(map(chr, (0xB2, 0xB3, 0xB9, *range(0x2070, 0x209D))), " "),
    "\u00bd": ".5", "\u00bc": ".25", "\u00be": ".75", "\u2153": ".33", "\u2154": ".67",
})  # fmt: skip

_MEASURES = {
    "feet": 0.3048, "foot": 0.3048, "ft": 0.3048, "mile": 1.609, "miles": 1.609, "mi": 1.609,
    "mph": 1.609, "inch": 2.54, "inches": 2.54, "yard": 0.914, "yards": 0.914, "pound": 0.4536,
    "pounds": 0.4536, "lb": 0.4536, "lbs": 0.4536, "gallon": 3.785, "gallons": 3.785,
    "acre": 0.4047, "acres": 0.4047, "ounces": 28.35,
}  # fmt: skip
# Feet and inches, minutes and seconds: 5'11", 48\u00b051'24"
_HEIGHT = re.compile(r"\d{1,3}\s?['\u2032\u2019]\s?\d{1,2}(?:\s?[\"\u2033\u201d]|'')")
_FAHRENHEIT = re.compile(r"\u00b0\s?F\b|\bFahrenheit\b")
_MEASURE = re.compile(rf"\b(?:{'|'.join(_MEASURES)})\b", re.I)


@dataclass(frozen=True)
class _Number:
    written: str

    @cached_property
    def parts(self) -> list[int]:
        return [int(part) for part in _DIGITS.findall(self.written)]

    @cached_property
    def whole(self) -> str:
        """Its digits without the zeros at either end: units move the point."""
        return _bare("".join(_DIGITS.findall(self.written)))

    @cached_property
    def forms(self) -> set[str]:
        return {self.whole, *(_bare(part) for part in _DIGITS.findall(self.written))}


def _bare(digits: str) -> str:
    return digits.lstrip("0").rstrip("0") or "0"


def contradiction(source: str, target: str, languages: tuple[str, str]) -> str | None:
    """The numbers that either side has on its own, or None where the texts may go together."""
    found = _DIGITS.search(source), _DIGITS.search(target)
    if not any(found):
        return None
    ours, theirs = _numbers(source), _numbers(target)
    shifts = {s for code in languages for s in CALENDARS.get(code.partition("_")[0], ())}
    mine, other = _alone(ours, theirs, shifts), _alone(theirs, ours, shifts)
    if mine and other:
        hours = {12} if _HALVES.search(source) or _HALVES.search(target) else set()
        if _FROM_SIX.search(source) or _FROM_SIX.search(target):
            hours |= {6, 18}
        if hours:
            mine, other = (_alone(a, b, shifts, hours) for a, b in ((ours, theirs), (theirs, ours)))
    if mine and other and _converted(mine, other, source + " " + target):
        return None
    if mine and other or len(mine) > 2 or len(other) > 2:
        return f"{', '.join(sorted(mine))} | {', '.join(sorted(other))}"
    return None


def _converted(mine: set[str], other: set[str], text: str) -> bool:
    """Whether the numbers are the same measures in units of two systems, about."""
    factors = {_MEASURES[unit.lower()] for unit in _MEASURE.findall(text)}
    heat = bool(_FAHRENHEIT.search(text))

    def same(a: float, b: float) -> bool:
        return any(abs(a * f / b - 1) < 0.1 for f in factors) or (
            heat and abs(abs((a - 32) / 1.8) - b) < 1.5
        )

    ours, theirs = ([_value(number) for number in side] for side in (mine, other))
    return all(any(same(a, b) or same(b, a) for a in ours) for b in theirs)


def _value(written: str) -> float:
    """A number as it is written in English, about."""
    digits = re.sub(r"[^\d.]", "", re.sub(r"[., ](?=\d{3}\b)", "", written).replace(",", "."))
    whole, _, rest = digits.partition(".")
    return float(f"{whole or 0}.{rest.replace('.', '') or 0}") or 1.0


def _numbers(text: str) -> list[_Number]:
    if _HEIGHT.search(text):
        text = _HEIGHT.sub(" ", text)
    if not text.isascii():
        if _SMALL.search(text):
            text = text.translate(_RAISED)
        text = unicodedata.normalize("NFKC", text)
        text = "".join(str(unicodedata.digit(c)) if c.isdigit() and c > "9" else c for c in text)
        text = _ERA.sub(lambda m: f"{m[1]}{_ERAS[m[1]] + int(m[2])}", text)
        text = _MYRIADS.sub(_multiplied, text)
    return [_Number(found) for found in _NUMBER.findall(text)]


def _multiplied(match: re.Match[str]) -> str:
    total = 0.0
    for number, units in _MYRIAD.findall(match[0]):
        value = number.rstrip(".,").replace(",", "")
        if value.count(".") > 1:
            return match[0]
        product = float(value)
        for unit in units:
            product *= _UNITS.get(unit, 1)
        total += product
    trailing = match[0][len(match[0].rstrip()) :]
    return f"{total:.0f}{trailing}" if total < 1e18 else match[0]


def _alone(
    ours: list[_Number], theirs: list[_Number], shifts: set[int], hours: Set[int] = frozenset()
) -> set[str]:
    """The numbers of one side, of two digits and more, that nothing on the other explains."""
    forms = {form for number in theirs for form in number.forms}
    values = {part for number in theirs for part in number.parts}
    years = {v % 100 for v in values if 1000 <= v < 3000}
    left = set()
    for number in ours:
        if number.whole in forms:
            continue
        for part, digits in zip(number.parts, _DIGITS.findall(number.written), strict=True):
            if len(digits) < 2 or _bare(digits) in forms:
                continue
            if len(digits) == 2 and part in years or 1000 <= part < 3000 and part % 100 in values:
                continue  # the 90s, 1950-53
            if any(part + s in values or part - s in values for s in shifts):
                continue
            if any(part + s in values or part - s in values or part in (0, s) for s in hours):
                continue
            left.add(number.written)
    return left
