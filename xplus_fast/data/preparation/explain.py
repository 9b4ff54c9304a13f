"""What each step thinks of one pair: `xplus-fast prepare RECIPE --explain SOURCE TARGET`."""

import numpy as np
import pyarrow as pa

from xplus_fast.data.languages import canonical, codes_of, language_name, two_languages
from xplus_fast.data.preparation.balance import count_tokens
from xplus_fast.data.preparation.parts import STEPS, judge
from xplus_fast.data.preparation.recipe import PrepareRecipe
from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.dedup import fingerprints
from xplus_fast.data.steps.identify import advantage
from xplus_fast.data.steps.instruct import instruct_pairs
from xplus_fast.data.steps.quality import COLUMNS, MARGIN, score_pairs
from xplus_fast.data.steps.quality import judge as judge_quality
from xplus_fast.errors import UserError


def explain_pair(
    recipe: PrepareRecipe, source: str, target: str, languages: str | None = None
) -> str:
    """A line for each step, whatever the steps before it thought.

    `languages` is such as "en-sw"; None: those that the texts look most like. Raises `UserError`
    where these are one, or are none.
    """
    if languages is None:
        found = [_likeliest(text) for text in (source, target)]
        if found[0] == found[1]:
            raise UserError(
                f"--explain: both texts look like {language_name(found[0])}; say what they"
                " are with --languages, such as en-sw"
            )
    else:
        found = list(two_languages(codes_of(languages), "--languages"))
    codes = [canonical(code) for code in found]
    batch = make_batch(
        [{"source": source, "target": target, "source_language": codes[0],
          "target_language": codes[1]}]
    )  # fmt: skip
    names = " - ".join(language_name(code) for code in codes)
    looks = "" if languages else ", as they look (--languages en-sw would say)"
    lines, gone = [f"{'languages':14} {names}{looks}"], ""
    for step in STEPS:
        verdict = judge(batch, step, recipe)
        reason, detail = verdict.reason[0].as_py(), verdict.detail[0].as_py()
        said = f"{reason} ({detail})" if detail else reason or "stays"
        gone = gone or (step if reason else "")
        before, batch = batch, verdict.batch
        if step == "identify" and not reason:
            gaps = [advantage(batch.column(s)[0].as_py(), codes[i].partition("_")[0])
                    for i, s in enumerate(("source", "target"))]  # fmt: skip
            said += "; " + ", ".join(
                f"{code} is {abs(gap):.0f} nats likelier than {other}" if gap <= 0
                else f"{other} is {gap:.0f} nats likelier than {code}, within the margin"
                for code, (gap, other) in zip(codes, gaps, strict=True) if other
            )  # fmt: skip
        lines.append(f"{step:14} {said}")
        for side in ("source", "target"):
            old, new = before.column(side)[0].as_py(), batch.column(side)[0].as_py()
            if old != new:
                lines.append(f"{'':14} {side} becomes: {new}")
    hashes = fingerprints(batch, recipe.dedup)
    simhashes = (hashes.column(f"{n}_simhash")[0].as_py() for n in ("first", "second"))
    shown = ", ".join(f"{simhash:016x}" for simhash in simhashes)
    lines.append(f"{'dedup':14} other pairs decide; SimHashes {shown}")
    if recipe.quality.method != "none":
        said, poor = _quality(batch, recipe)
        lines.append(f"{'quality':14} {said}")
        gone = gone or ("quality" if poor else "")
    tokens = sum(
        count_tokens([batch.column(s)[0].as_py()], [codes[i]], recipe.balance.tokenizer)[0]
        for i, s in enumerate(("source", "target"))
    )
    lines.append(f"{'balance':14} {tokens} tokens")
    if gone:
        return "\n".join([*lines, f"so it goes, at the step {gone}"])
    made = instruct_pairs(batch, recipe.instruct, direction="forward", seed=recipe.seed)
    lines.append("so it stays, as")
    for message in made.column("messages")[0].as_py():
        lines += [f"  {message['role']}: " + message["content"].replace("\n", "\n  ")]
    return "\n".join(lines)


def _likeliest(text: str) -> str:
    gap, other = advantage(text, "en")
    return other if gap > 0 else "en"


def _quality(batch: pa.RecordBatch, recipe: PrepareRecipe) -> tuple[str, bool]:
    """What step 5 says of one pair, and whether it goes."""
    options = recipe.quality
    scored = score_pairs(batch, options)
    quality, margin, least = (scored.column(n).to_numpy(False).astype(float) for n in COLUMNS)
    one = np.zeros(1, int)
    reason = judge_quality(quality, margin, least, one, one, options)[0]
    if np.isnan(quality[0]):
        said = "no score"
    elif np.isnan(margin[0]):
        said = (
            f"score {quality[0]:.3f}"
            if options.method == "auto"
            else f"{options.method} {quality[0]:.3f}"
        )
    else:
        wanted = MARGIN if options.margin is None else options.margin
        said = f"e5 {quality[0]:.3f}, margin {margin[0]:.3f} of at least {wanted}"
        said += "" if options.margin is not None else " (of a pair alone; a corpus tells its own)"
    if options.threshold is not None or options.best is not None:
        named = {"threshold": options.threshold, "best": options.best}
        said += "; " + ", ".join(f"{k} {v}" for k, v in named.items() if v is not None)
    return f"{reason} ({said})" if reason else said, reason is not None
