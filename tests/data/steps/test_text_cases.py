"""Odd pairs of people's corpora: what stays, as what, and what goes. And how long that may take."""

import json
import time
from pathlib import Path

import pytest

from xplus_fast.data.languages import canonical
from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.decontaminate import (
    DecontaminateOptions,
    build_index,
    decontaminate_pairs,
)
from xplus_fast.data.steps.dedup import DedupOptions, fingerprints
from xplus_fast.data.steps.format import FormatOptions, format_pairs
from xplus_fast.data.steps.identify import IdentifyOptions, identify_pairs
from xplus_fast.data.steps.numbers import _MYRIADS

pytest.importorskip("py3langid", reason="identifies languages")
pytest.importorskip("ftfy", reason="mends mojibake")
CASES = json.loads((Path(__file__).parent / "text_cases.json").read_text())
STEPS = (
    (format_pairs, FormatOptions()), (clean_pairs, CleanOptions()),
    (identify_pairs, IdentifyOptions()),
)  # fmt: skip


def one(source: str, target: str, languages: str):
    codes = [canonical(code) for code in languages.split("-")]
    row = {"source": source, "target": target}
    return make_batch([{**row, "source_language": codes[0], "target_language": codes[1]}])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_odd_pairs(case) -> None:
    batch = one(case["source"], case["target"], case["languages"])
    reasons = []
    for step, options in STEPS:
        found = step(batch, options)
        reasons += [r for r in found.reason.to_pylist() if r]
        batch = found.kept
    assert bool(reasons) == (case["want"] == "gone"), reasons
    if not reasons:
        texts = [batch.column(side)[0].as_py() for side in ("source", "target")]
        assert texts == case["becomes"]


SIGNS = "=<>&#\\|[]{}'\"@.-_0a ?!;:/*%\u00c3\u2581\u4e00\u0420\u00e9"
PATTERNS = [
    *SIGNS, "<!--", "<b", "<b ", "[[", "{\\", "''", "<script>", "[b]", "</a", "@@ ", "&amp;", "&#",
    "quot;", "\\n", "{\\b ", "a@", "a.b", "www.", "1.", "1 000 ", "\u00c3\u00a9", "\u0420\u045f",
    "1\u4e07", "<a b=", "**", "](", "[a](", "{{a", "{a,", "{a, plural,", "\\ab{", "< b ", "< / b",
    "{y:", "{11}", "&a", "a%20", "=C3", "+A", "\u00bfa", "\u0301", "\uff41", "\u00bd1", "1h",
    "%(", "{a", "ab ", "a?b", "-\n",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ["1", "1,", "1.", "1\u4e07"])
def test_numbers_of_dense_scripts_take_no_time(pattern) -> None:
    text, start = (pattern * 20000)[:20000], time.process_time()
    _MYRIADS.sub("", text)
    assert time.process_time() - start < 0.5  # 7.5 s where each digit may begin one


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_lines_take_no_time(pattern) -> None:
    """20,000 characters: the least of three runs of each step, whatever it says of the line. With
    the bounds on lengths, and without."""
    text = (pattern * 20000)[:20000]
    index = build_index(["A line of an evaluation set, as long as such lines are."])
    wide = FormatOptions(max_characters=10**6), CleanOptions(max_characters=10**6)
    steps = [
        *STEPS, (format_pairs, wide[0]), (clean_pairs, wide[1]),
        (lambda b, o: decontaminate_pairs(b, o, index), DecontaminateOptions()),
        (fingerprints, DedupOptions()),
    ]  # fmt: skip
    for step, options in steps:
        batch, seconds = one(text, text[:-1] + "b", "en-fr"), []
        for _ in range(3):
            start = time.process_time()
            step(batch, options)
            seconds.append(time.process_time() - start)
            if seconds[-1] < 0.1:
                break
        assert min(seconds) < 0.1, (step, options)
