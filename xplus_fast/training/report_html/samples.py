"""Translations before and after, side by side, their differences marked."""

import difflib
import re
from html import escape

from xplus_fast.training.report_data import Finished

# Words with what follows them, a character each where none are between words, punctuation, spaces
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_MARKS = r".,;:!?()\[\]\"\u00ab\u00bb\u2026\u3001\u3002\uff01\uff0c\uff1f"
_WORD = re.compile(rf"\s+|[{_MARKS}]|[{_NO_SPACES}]|[^\s{_MARKS}{_NO_SPACES}]+")


def translations(found: Finished) -> list[str]:
    """Every sample once, the first and the last measurement's output side by side."""
    outputs: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for label, value in found.measured.items():
        for tag, samples in value["samples"].items():
            for s in samples:
                of = outputs.setdefault(tag, {})
                of.setdefault((s["source"], s["reference"]), {})[label] = s["output"]
    parts = []
    for i, (tag, samples) in enumerate(outputs.items()):
        made = "\n".join(_sample(*texts, by) for texts, by in samples.items())
        state = " open" if i < 4 else ""
        parts.append(f"<details{state}><summary>{escape(tag)}</summary>\n{made}\n</details>")
    note = (
        '<p class="note">Struck out: words that the last output has no more; underlined: words'
        " that are new in it.</p>"
    )
    return [note, *parts] if parts else []


def _sample(source: str, reference: str, by_label: dict[str, str]) -> str:
    labels = list(by_label)
    first, last = labels[0], labels[-1]
    if first == last:
        sides = _text(first, _shown(by_label[first]))
    else:
        before, after = marked(by_label[first], by_label[last])
        sides = _text(first, before) + _text(last, after)
    between = "".join(_text(label, _shown(by_label[label])) for label in labels[1:-1])
    pair = f'<div class="pair">{_text("source", _shown(source))}'
    pair += f"{_text('reference', _shown(reference))}{sides}</div>"
    return f'<div class="sample">{pair}{between}</div>'


def _text(title: str, html: str) -> str:
    return f'<div><h4>{escape(title)}</h4><p dir="auto">{html}</p></div>'


def _shown(text: str) -> str:
    return escape(text) if text.strip() else '<span class="empty">(empty)</span>'


def marked(before: str, after: str) -> tuple[str, str]:
    """Both as HTML, the words marked that only one of them has."""
    if not before.strip() or not after.strip():
        return _shown(before), _shown(after)
    a, b = _WORD.findall(before), _WORD.findall(after)
    left, right = [], []
    for what, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, new = escape("".join(a[i:j])), escape("".join(b[k:m]))
        left.append(gone if what == "equal" or not gone else f"<del>{gone}</del>")
        right.append(new if what == "equal" or not new else f"<ins>{new}</ins>")
    return "".join(left), "".join(right)
