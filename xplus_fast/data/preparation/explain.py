"""What each step thinks of one pair: `xplus-fast prepare RECIPE --explain SOURCE TARGET`."""

from xplus_fast.data.languages import canonical
from xplus_fast.data.preparation.balance import count_tokens
from xplus_fast.data.preparation.parts import STEPS, judge
from xplus_fast.data.preparation.recipe import PrepareRecipe
from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.dedup import fingerprints
from xplus_fast.data.steps.identify import advantage
from xplus_fast.data.steps.instruct import instruct_pairs
from xplus_fast.data.steps.quality import score_pairs


def explain_pair(
    recipe: PrepareRecipe, source: str, target: str, languages: tuple[str, str]
) -> str:
    """A line for each step, whatever the steps before it thought."""
    codes = [canonical(code) for code in languages]
    batch = make_batch(
        [{"source": source, "target": target, "source_language": codes[0],
          "target_language": codes[1]}]
    )  # fmt: skip
    lines, gone = [], ""
    for step in STEPS:
        found = judge(batch, step, recipe)
        reason, detail = found.reason[0].as_py(), found.detail[0].as_py()
        said = f"{reason} ({detail})" if detail else reason or "stays"
        gone = gone or (step if reason else "")
        before, batch = batch, found.batch
        if step == "identify" and not reason:
            gaps = [advantage(batch.column(s)[0].as_py(), codes[i].partition("_")[0])
                    for i, s in enumerate(("source", "target"))]  # fmt: skip
            said += "; " + ", ".join(
                f"{code} is {-gap:.0f} nats likelier than {other}" if gap <= 0
                else f"{other} is {gap:.0f} nats likelier than {code}, within the margin"
                for code, (gap, other) in zip(codes, gaps, strict=True) if other
            )  # fmt: skip
        lines.append(f"{step:14} {said}")
        for side in ("source", "target"):
            old, new = before.column(side)[0].as_py(), batch.column(side)[0].as_py()
            if old != new:
                lines.append(f"{'':14} {side} becomes: {new}")
    hashes = fingerprints(batch, recipe.dedup)
    simhash = hashes.column("pair_simhash")[0].as_py()
    lines.append(f"{'dedup':14} other pairs decide; SimHash {simhash:016x}")
    if recipe.quality.method != "none":
        scored = score_pairs(batch, recipe.quality)
        quality = scored.column("quality")[0].as_py()
        shown_quality = "no score" if quality is None else f"{recipe.quality.method} {quality:.3f}"
        lines.append(f"{'quality':14} {shown_quality}; thresholds: {_thresholds(recipe)}")
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


def _thresholds(recipe: PrepareRecipe) -> str:
    q = recipe.quality
    named = {"threshold": q.threshold, "margin": q.margin, "best": q.best}
    return ", ".join(f"{k} {v}" for k, v in named.items() if v is not None) or "none"
