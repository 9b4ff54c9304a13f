"""Sources -> a tokenized, packed corpus on disk, made once and found again by its content."""

import hashlib
import heapq
import io
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xplus_fast.config import DataConfig, Source
from xplus_fast.data.chat import Encoded, encode, pieces
from xplus_fast.data.collate import PackCollator
from xplus_fast.data.compressed import stem
from xplus_fast.data.corpus_text import describe
from xplus_fast.data.packed import (
    ITEMS,
    SOURCES,
    STARTS,
    SUPERVISED,
    TOKENS,
    PackedDataset,
    pack_examples,
    pack_texts,
)
from xplus_fast.data.packing import mixed_order, shared_order
from xplus_fast.data.readers import Example, Reading, read_examples, source_files
from xplus_fast.data.template import has_template, template_variables
from xplus_fast.errors import UserError
from xplus_fast.files import BUFFER, NewFile, new_folder, remove, resolve
from xplus_fast.locks import locked, sweep
from xplus_fast.manifest import check_files, write_manifest

__all__ = [
    "Corpus", "PackCollator", "PackedDataset", "describe", "load_corpus", "pack_examples",
    "pack_texts",
]  # fmt: skip

# Of everything between the sources' bytes and the files below; raise it when it changes.
_VERSION = 6
MOST_TIMES = 1000  # that a source with a share is drawn in an epoch
_BATCH = 1000  # examples tokenized together
_BATCH_TEXT = 2_000_000  # characters of them, or one longer example
_HELDOUT, _SUMMARY = "heldout.jsonl", "summary.json"
_NAMES = "[0-9a-f]{32}"  # of corpora in the cache


@dataclass(frozen=True)
class Corpus:
    """What to train on, what was kept out of it, and the figures for the user."""

    train: PackedDataset
    heldout: dict[str, list[Example]]  # tag -> examples
    summary: dict[str, Any]  # JSON; `corpus_text` says it in words


def load_corpus(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    show: bool,
    keep_out: Iterable[Example] = (),
    vocabulary: int | None = None,
) -> Corpus:
    """Read, tokenize, hold out and pack the sources, or find that done in the cache.

    seed: of the sequences' order. show: a progress bar, on a terminal. keep_out: what another
    corpus holds out, with its duplicates not to be trained on here either. vocabulary: of the
    model.

    Raises `UserError` for what is wrong with the sources, for sources that leave nothing to train
    on, and for a cache that cannot be written.
    """
    others = list(keep_out)
    folder = resolve(data.cache) / _key(sources, data, tokenizer, seed, others, vocabulary)
    sweep(folder.parent, _NAMES)
    for left in folder.parent.glob(".building-*"):  # by a version that held no locks
        remove(left)
    if not (found := folder.exists()):
        with locked(folder, wait=True):  # of two that want it, one makes it
            if not folder.exists():
                with new_folder(folder) as building:
                    _build(building, sources, data, tokenizer, seed, show, others, vocabulary)
    return _open(folder, found)


def read_validation(
    data: DataConfig, tokenizer: Any, vocabulary: int | None
) -> dict[str, list[Example]]:
    """What `data.validation` holds, by tag; with `data.on_error: skip`, without what is unfit.

    Raises `UserError`, also where there is nothing.
    """
    reading, found = Reading(), dict[str, list[Example]]()
    for source in data.validation:
        for batch in _batches(read_examples(source, data, reading)):
            encoded = encode(batch, tokenizer, data.think, data.pack_tokens, vocabulary)
            for example, e in zip(batch, encoded, strict=True):
                if isinstance(e, Encoded):
                    found.setdefault(example.tag, []).append(example)
                else:
                    reading.skip(e, data)
    if not found:
        raise UserError(f"data.validation: {_names(data.validation)}: empty, no example in it")
    return found


# --- the cache ---


def _key(
    sources: Sequence[Source], data: DataConfig, tokenizer: Any, seed: int, others: list[Example],
    vocabulary: int | None,
) -> str:  # fmt: skip
    """Hash of everything that decides what a corpus holds."""
    options = asdict(data)
    for name in ("sources", "retention", "validation", "cache", "cache_hidden", "shared_prompts"):
        del options[name]
    digest = hashlib.blake2b(digest_size=16)
    away = sorted({(e.key, e.mirror) for e in others})
    asked = [_VERSION, seed, vocabulary, away, options, [asdict(s) for s in sources]]
    digest.update(json.dumps(asked).encode())
    about = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token]
    digest.update(json.dumps([*about, tokenizer.bos_token]).encode())
    for path in (p for source in sources for p in source_files(source)):
        try:
            with open(path, "rb") as f:
                content = hashlib.file_digest(f, "blake2b").digest()
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
        digest.update(f"{path}\0".encode() + content)
    return digest.hexdigest()


def _open(folder: Path, cached: bool) -> Corpus:
    """Raises `UserError` for a damaged file: a flipped bit would train on other data.

    All are read for it, once a process: about as long as `_key` takes for the sources, a minute for
    100 GB where the disk keeps up.
    """
    if cached:
        check_files(folder, "damaged cache; delete this folder")
    try:
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        train = PackedDataset(folder, summary["pack_tokens"], steady=bool(summary["shares"]))
        whole = len(train.tokens) == len(train.supervised) == train.starts[-1]
        lines = (folder / _HELDOUT).read_text(encoding="utf-8").split("\n")
        heldout: dict[str, list[Example]] = {}
        for line in lines[:-1]:
            fields = json.loads(line)
            example = Example(tuple(fields.pop("messages")), **fields)
            heldout.setdefault(example.tag, []).append(example)
        describe(summary)  # that all of it is there
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder}: damaged cache; delete this folder ({e})") from None
    if not whole:
        raise UserError(f"{folder}: damaged cache; delete this folder (files of unequal length)")
    return Corpus(train, heldout, {**summary, "cached": cached, "folder": str(folder)})


# --- building ---


class _Heldout:
    """The `n` pairs of each group whose keys hash lowest, found in one pass.

    A hash decides, not the position, so that duplicates and both directions of a pair fall on the
    same side, and adding data elsewhere does not reshuffle what is held out.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        # group -> hash -> tag -> example
        self.groups: dict[str, dict[int, dict[str, Example]]] = {}
        # group -> negated hashes: the highest comes out first
        self.heaps: dict[str, list[int]] = {}

    def offer(self, key: int, example: Example) -> None:
        chosen = self.groups.setdefault(example.group, {})
        heap = self.heaps.setdefault(example.group, [])
        if key not in chosen:
            if len(heap) < self.n:
                heapq.heappush(heap, -key)
            elif self.n and key < -heap[0]:
                del chosen[-heapq.heapreplace(heap, -key)]
            else:
                return
            chosen[key] = {}
        chosen[key].setdefault(example.tag, example)

    def examples(self) -> Iterator[Example]:
        for group in sorted(self.groups):
            for key in sorted(self.groups[group]):
                yield from self.groups[group][key].values()


def _build(
    folder: Path,
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Any,
    seed: int,
    show: bool,
    others: list[Example],
    vocabulary: int | None,
) -> None:
    """Write a corpus into an empty folder. Raises `UserError`, and `OSError` for a full disk."""
    reading, heldout = Reading(), _Heldout(data.heldout)
    # By sequence, 32 bytes: all that stays in memory.
    lengths, supervised, tags, origins = array("i"), array("i"), array("i"), array("i")
    keys, mirrors = array("Q"), array("Q")
    tag_ids: dict[str, int] = {}
    groups: list[str] = []  # by tag
    read = cut = 0
    bar = tqdm(unit=" examples", disable=not (show and sys.stderr.isatty()), leave=False)
    made: dict[str, NewFile] = {}

    def new(name: str) -> io.BufferedWriter:
        made[name] = NewFile(folder / name, hashed=True)
        return io.BufferedWriter(made[name], BUFFER)

    with new(TOKENS) as tokens, new(SUPERVISED) as mask, bar:
        for origin, source in enumerate(sources):
            for batch in _batches(read_examples(source, data, reading)):
                encoded = encode(batch, tokenizer, data.think, data.pack_tokens, vocabulary)
                for example, e in zip(batch, encoded, strict=True):
                    if not isinstance(e, Encoded):
                        reading.skip(e, data)
                        continue
                    key, mirror = _hash(example.key), _hash(example.mirror)
                    heldout.offer(key, example)
                    if example.tag not in tag_ids:
                        tag_ids[example.tag] = len(groups)
                        groups.append(example.group)
                    cut += e.cut
                    for piece in pieces(e, data.pack_tokens):
                        tokens.write(piece.input_ids.tobytes())
                        mask.write(piece.supervised.tobytes())
                        keys.append(key)
                        mirrors.append(mirror)
                        origins.append(origin)
                        tags.append(tag_ids[example.tag])
                        lengths.append(len(piece.input_ids))
                        supervised.append(int(piece.supervised.sum()))
                read += len(batch)
                bar.update(len(batch))
    _check_unread(reading, tokenizer)
    if not lengths:
        left_out = "; ".join(f"{n} x {reason}" for reason, n in reading.skipped.items())
        raise UserError(
            f"{_names(sources)}: empty data, no example in it ({left_out or 'none read'})"
        )

    n, tag = np.asarray(lengths, np.int64), np.asarray(tags)
    held = list(heldout.examples())
    # Neither side of a held-out pair may be trained on, not even with another translation.
    away = [*held, *others]
    gone = _among(keys, [_hash(e.key) for e in away])
    gone |= _among(mirrors, [_hash(e.mirror) for e in away if e.mirror])
    train = np.flatnonzero(~gone)
    by_tag = np.bincount(tag[train], minlength=len(groups)).tolist()
    for group in dict.fromkeys(groups):
        if not sum(c for c, g in zip(by_tag, groups, strict=True) if g == group):
            option = "validation" if data.validation else "heldout"
            raise UserError(
                f"data.{option}: without the pairs held out of every language pair, nothing is left"
                f" to train on of {group}"
            )
    counts, of_source = np.asarray(supervised, np.int64), np.asarray(origins)
    order, shares = _order(sources, tag[train], of_source[train], counts[train], seed)
    items = train[order]
    by_tag = np.bincount(tag[items], minlength=len(groups)).tolist()
    starts = np.concatenate([[0], np.cumsum(n)])
    arrays = {STARTS: starts, ITEMS: items}
    if len(sources) > 1:
        arrays[SOURCES] = np.asarray(origins)
    for name, values in arrays.items():
        with new(name) as out:
            np.save(out, values)
    with new(_HELDOUT) as out:
        out.writelines((json.dumps(asdict(e)) + "\n").encode() for e in held)
    summary = {
        "read": read,
        "formats": reading.formats,
        "files": reading.files,
        "left": reading.left,
        "unread": sorted(reading.unread),
        "skipped": dict(reading.skipped),
        "skipped_first": reading.first,
        "cut": cut,
        "sequences": len(items),
        "tags": {t: by_tag[i] for t, i in tag_ids.items()},
        "tokens": int(n[items].sum()),
        "supervised": int(counts[items].sum()),
        "shares": shares,
        "sources": _short(sources),
        "pack_tokens": data.pack_tokens,
        "heldout": {t: sum(e.tag == t for e in held) for t in tag_ids} if held else {},
        "kept_out": len(n) - len(train),
        "template": has_template(tokenizer),
    }
    with new(_SUMMARY) as out:
        out.write(json.dumps(summary).encode())
    write_manifest(folder, made)


def _order(
    sources: Sequence[Source], tags: np.ndarray, origins: np.ndarray, supervised: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:  # fmt: skip
    """The order of what is trained on, and of each source with a share: what it asked for, what it
    got, and how many times over it is in an epoch.

    tags, origins, supervised: of each sequence. Raises `UserError` for such a source without any.
    """
    asked = [source.share for source in sources]
    if all(share is None for share in asked):
        return mixed_order(tags, seed), {}
    own = np.bincount(origins, supervised, minlength=len(sources))
    rest = [k for k, share in enumerate(asked) if share is None]
    left = 1 - sum(share for share in asked if share is not None)
    whole = own[rest].sum() / left if rest else own.sum()
    for k, share in enumerate(asked):
        name = _names([sources[k]])
        if not own[k]:
            raise UserError(f"{name}: nothing of it is trained on, where sources have shares")
        if share is not None and share * whole > MOST_TIMES * own[k]:
            raise UserError(
                f"{name}: share {share:g}: that is {share * whole / own[k]:,.0f} times over in an"
                f" epoch; {MOST_TIMES:,} at most"
            )
    order = shared_order(tags, origins, supervised, asked, seed)
    got = np.bincount(origins[order], supervised[order], minlength=len(sources))
    told = {
        name: {"asked": s, "share": got[k] / got.sum(), "times": got[k] / own[k]}
        for k, (name, s) in enumerate(zip(_short(sources), asked, strict=True)) if s is not None
    }  # fmt: skip
    return order, told


def _check_unread(reading: Reading, tokenizer: Any) -> None:
    """See that no key of records that went unread is a variable of the chat template."""
    for key in sorted(template_variables(tokenizer) & set(reading.unread)):
        raise UserError(
            f"{reading.unread[key]}: the chat template has a variable '{key}', but this key is not"
            f" passed to it; `ignore: [{key}]` of the source leaves it unread"
        )


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Lists of examples to be tokenized together, bounded in number and in text."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        length = sum(len(m["content"]) for m in example.messages)
        if batch and (len(batch) == _BATCH or size + length > _BATCH_TEXT):
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += length
    if batch:
        yield batch


def _among(found: Any, hashes: Sequence[int]) -> np.ndarray:
    """bool [N]: which of uint64 [N] are among them."""
    # not by a table, the other way: numpy 2.0's overflows beyond int64
    return np.isin(found, np.array(hashes, np.uint64), kind="sort")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _short(sources: Sequence[Source]) -> list[str]:
    """A name of each source, no two alike."""
    paths = [s.path if isinstance(s.path, str) else s.path[0] for s in sources]
    made: list[str] = []
    for name in (stem(Path(path)) for path in paths):
        n = sum(m == name or m.startswith(f"{name}#") for m in made)
        made.append(f"{name}#{n + 1}" if n else name)
    return made


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(s.path if isinstance(s.path, str) else " + ".join(s.path) for s in sources)
