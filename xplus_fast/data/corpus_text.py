"""What a corpus holds, in words."""

from typing import Any

from xplus_fast.data.splits import some


def describe(summary: dict[str, Any]) -> str:
    """The figures of a corpus in a few lines of text: all but where it lies.

    saved: the share of its tokens that another sequence's stand for in a step, where it is known.
    """
    tags = ", ".join(f"{tag} {n:,}" for tag, n in summary["tags"].items())
    lines = [
        f"data: {summary['sequences']:,} sequences ({tags}), {summary['tokens']:,} tokens,"
        f" {summary['supervised']:,} of them supervised",
    ]
    for name, of in summary["shares"].items():
        lines.append(
            f"share: {of['share']:.1%} of the supervised tokens are of {name} (asked for:"
            f" {of['asked']:.1%}), {of['times']:.2f} times over an epoch"
        )
    if summary.get("saved"):
        lines.append(f"prompts computed once: {summary['saved']:.0%} of tokens")
    lines += [f"format: {name}: {found}" for name, found in summary["formats"].items()]
    for name, files in summary["files"].items():
        left = summary["left"][name]
        aside = f"; left alone: {some(left)}" if left else ""
        lines.append(f"read: {some(files)} of {name}{aside}")
    if summary["unread"]:
        lines.append(f"keys of records that are not read: {some(summary['unread'], 12)}")
    for reason, n in summary["skipped"].items():
        lines.append(f"left out: {n:,} x {reason}: {', '.join(summary['skipped_first'][reason])}")
        lines[-1] += ", ..." if n > len(summary["skipped_first"][reason]) else ""
    if summary["cut"]:
        lines.append(f"cut to {summary['pack_tokens']:,} tokens: {summary['cut']:,} answers")
    if summary["heldout"]:
        held = ", ".join(f"{tag} {n:,}" for tag, n in summary["heldout"].items())
        lines.append(f"held out: {held} ({summary['kept_out']:,} sequences with their duplicates)")
    if not summary["template"]:
        lines.append("no chat template: an example is its prompt, a newline, the answer and eos")
    return "\n".join(lines)
