"""What leaves the frozen layers below the lowest trained one, kept from one epoch to the next.

A token's state [H] has a place, that of the token in the order in which the data are trained on. A
micro-batch whose states are all there starts from them; any other is computed as always and
written. So which rows and micro-batches a plan makes does not matter. A prefix that sequences share
has the place of the first of them: no two micro-batches write to one place, and what one reads is,
bit for bit, what it would compute.

The host is ahead of a GPU by most of a micro-batch, so that it reads and writes (`hidden_store`)
while the GPU computes.

Legend: T rows computed, H hidden.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast import __version__
from xplus_fast.data.corpus import Corpus
from xplus_fast.data.packed import ITEMS, STARTS, TOKENS
from xplus_fast.files import make_folder, remove, speaking, write_json
from xplus_fast.locks import sweep, working_in
from xplus_fast.manifest import read_manifest
from xplus_fast.model.frozen import format_of, tensors_of
from xplus_fast.model.host_memory import zeros_on_host
from xplus_fast.model.packing import PackLayout
from xplus_fast.planning.flops import Work
from xplus_fast.planning.hidden import HOST, NAMES, OFF, Hidden, Rows
from xplus_fast.training.checkpoints import tensor_bytes
from xplus_fast.training.hidden_store import InFolder, InMemory, Runs, Store
from xplus_fast.training.place import Place, barrier

ABOUT = "about.json"
_VERSION = 1  # of what lies in a folder


class HiddenCache:
    """States of one stage's data at one level, and how they come to the device and from it.

    level: the layer that they enter. width: bytes of one. made_of: what they are computed with.
    """

    def __init__(
        self, level: int, width: int, store: Store, made_of: dict[str, str], place: Place
    ) -> None:
        self.level, self.width, self.store, self.made_of = level, width, store, made_of
        self.dtype, self.device = place.dtype, place.device
        self._pinned = torch.empty(0, dtype=torch.uint8)  # on its way to a GPU or from it
        self._free: Any = None  # the event after which that memory may be used again

    def of(self, layout: PackLayout) -> "Part":
        """A micro-batch's states, which rows of `PackedDataset` have."""
        return Part(self, layout)

    def ahead(self, collate: Callable[[Any], dict[str, Any]]) -> Any:
        """A collator that tells the store of a batch, which is trained on a step later."""

        def collated(rows: Any) -> dict[str, Any]:
            batch = collate(rows)
            runs = _runs(batch["layout"])
            if self.store.has(runs):
                self.store.expect(runs)
            return batch

        return collated

    def rows(self, tokens: int) -> Tensor:
        """Host memory for so many states, uint8 [T, W]."""
        width = self.width
        if self.device.type != "cuda":
            return torch.empty(tokens, width, dtype=torch.uint8)
        if self._free is not None:
            self._free.synchronize()
        if len(self._pinned) < tokens * width:
            self._pinned = zeros_on_host((tokens * width,), torch.uint8, self.device)
        return self._pinned[: tokens * width].view(tokens, width)

    def copy(self, to: Tensor, x: Tensor) -> Any:
        """Between the host's memory and the device; returns what to wait for."""
        to.copy_(x, non_blocking=True)
        if self.device.type == "cuda":
            self._free = torch.cuda.Event()
            self._free.record()
        return self._free


class Part:
    """A micro-batch's states: `Below`, as the engine takes it."""

    def __init__(self, cache: HiddenCache, layout: PackLayout) -> None:
        self.level, self.found = cache.level, False
        self._cache, self._tokens = cache, int(layout.edges[-1])
        self._runs = _runs(layout)
        self._made: Tensor | None = None  # uint8 [T, W]
        self._copied: Any = None

    def get(self) -> Tensor | None:
        cache = self._cache
        if not cache.store.has(self._runs):
            return None
        host = cache.rows(self._tokens)
        if not cache.store.read(self._runs, host.numpy()):
            return None
        self.found = True
        states = host.view(cache.dtype)
        if cache.device.type != "cuda":
            return states
        x = torch.empty(states.shape, dtype=cache.dtype, device=cache.device)
        cache.copy(x, states)
        return x

    def put(self, x: Tensor) -> None:
        assert x.dtype == self._cache.dtype and len(x) == self._tokens
        x = x.detach().contiguous().view(torch.uint8)
        if x.is_cuda:
            host = self._cache.rows(len(x))
            self._copied = self._cache.copy(host, x)
            x = host
        self._made = x

    def keep(self) -> None:
        """Write what was computed, once all else of the micro-batch is under way."""
        if self._made is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        self._cache.store.write(self._runs, self._made.numpy())


def _runs(layout: PackLayout) -> Runs:
    assert layout.starts is not None
    return list(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True))


# --- whose states they are ---


class HiddenCaches:
    """A run's, as its stages want them."""

    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        self.place, self.say = place, say
        self._open: dict[str, tuple[int, HiddenCache]] = {}  # name -> the last stage, the states

    @contextmanager
    def hold(self, where: str) -> Iterator[None]:
        """A lock on the folder of this option, for all that is done in it.

        Raises `UserError` if it is another's, or cannot be written.
        """
        if where in (OFF, HOST):
            yield
            return
        with working_in(Path(where)):
            with speaking(Path(where)):
                sweep(Path(where), NAMES)
            yield

    def of_stage(self, stage: int, wanted: Hidden | None, model: Any) -> HiddenCache | None:
        """A stage's, whose model is laid out as it trains; those that none wants any more go.

        wanted: as planned. Raises `UserError` for a folder that cannot be used.
        """
        self._open = {name: (last, c) for name, (last, c) in self._open.items() if last >= stage}
        if wanted is None:
            return None
        now = made_of(model, wanted, self.place)
        if wanted.name in self._open and self._open[wanted.name][1].made_of == now:
            return self._open[wanted.name][1]
        self._open.pop(wanted.name, None)  # its memory goes first
        width = model.model.layers[0].shape.hidden * self.place.dtype.itemsize
        if wanted.where == HOST:
            store: Store = InMemory(wanted.places, width)
        else:
            folder = Path(wanted.where) / wanted.name
            if self.place.first:
                self._make_way(folder, now)
            barrier(self.place)
            store = InFolder(folder, wanted.places, width)
            if found := np.count_nonzero(store.checks):
                self.say(f"hidden states: {found:,} tokens' found in {folder}")
        cache = HiddenCache(wanted.level, width, store, now, self.place)
        self._open[wanted.name] = (wanted.last, cache)
        return cache

    def _make_way(self, folder: Path, now: dict[str, str]) -> None:
        """Leave a folder with states that were computed with all this, or without any."""
        try:
            there = json.loads((folder / ABOUT).read_bytes())
        except (OSError, ValueError, RecursionError):
            there = None  # nothing is there, or nothing is known of it
        if there == now:
            return
        if isinstance(there, dict):
            other = ", ".join(key for key in now if there.get(key) != now[key])
            self.say(
                f"hidden states: those in {folder} are of other {other}: they are computed again"
            )
        remove(folder)
        make_folder(folder)
        write_json(folder / ABOUT, now)


def read_rows(corpus: Corpus, work: Work, place: Place) -> Rows:
    """What a plan wants to know of a stage's data: also which tokens they are, in which order."""
    rows = corpus.train
    listed = read_manifest(rows.folder)
    sums = [listed[name]["sha256"] for name in (TOKENS, STARTS, ITEMS)]
    digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    computed = math.ceil(rows.total_tokens * work.tokens / work.data_tokens)
    return Rows(digest, rows.total_tokens, computed, len(rows) // place.processes)


def made_of(model: Any, wanted: Hidden, place: Place) -> dict[str, str]:
    """All that decides, to the last bit, what enters a layer: as it is now."""
    base, kind = model.model, place.device.type
    blocks = [base.layers[i] for i in range(wanted.level)]
    shape = base.layers[0].shape
    embedding = base.embed_tokens
    table = embedding.weight if embedding.weight is not None else embedding.on_host
    weights, formats = hashlib.sha256(), []
    _add(weights, table)
    for block in blocks:
        for name in shape.packed_shapes():
            now = block.weight(name)
            frozen = None if now is not None else block.frozen.weights[name]
            formats.append("bf16" if frozen is None else format_of(frozen))
            for tensor in (now,) if frozen is None else tensors_of(frozen):
                _add(weights, tensor)
    rope = hashlib.sha256(repr(base.rotary_emb.attention_scaling).encode())
    _add(rope, base.rotary_emb.inv_freq)
    asking = torch.empty(1, shape.heads, shape.head_dim, dtype=place.dtype, device=place.device)
    name = torch.cuda.get_device_name(place.device) if kind == "cuda" else _cpu()
    names = ("torch", "triton", "flash-attn", "flash-attn-4")
    return {
        "form": str(_VERSION),
        "data": wanted.data,
        "level": str(wanted.level),
        "shape": str(shape),
        "rope": rope.hexdigest(),
        "weights": weights.hexdigest(),
        "formats": " ".join(formats),
        "dtype": f"{place.dtype}, products in {torch.get_float32_matmul_precision()}",
        "device": f"{kind}: {name}",
        "attention": ops.attention_backend(asking),
        "versions": ", ".join(
            [f"xplus-fast {__version__}", *(f"{n} {_version(n)}" for n in names)]
        ),
    }


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for piece in tensor_bytes(tensor):
        digest.update(piece)


def _cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"
