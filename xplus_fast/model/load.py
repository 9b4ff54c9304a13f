"""From model files to a prepared model as a layout wants it, a tensor at a time.

A layer is read, quantized where its format asks for it, and put in its place before the next is
touched: memory never holds more than what stays and the layer at hand. `arrange` does the same
between stages, for the layers whose part changes.
"""

import math
from copy import copy
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import xplus_kernels as ops
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles, read_entry
from xplus_fast.model.families import BESIDE, PACKED
from xplus_fast.model.frozen import (
    MATRICES,
    Resident,
    Stream,
    Streamed,
    format_of,
    freeze,
    quantize_rows,
)
from xplus_fast.model.headers import Entry, read_range
from xplus_fast.model.host_memory import zeros_on_host
from xplus_fast.model.layer import Block
from xplus_fast.model.layout import LayerLayout, Layout, united
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import send
from xplus_fast.model.prepare import take_over
from xplus_fast.model.pretrained import load_generation_config
from xplus_kernels.linear_cross_entropy import head_logits


class Weights:
    """A model's tensors on disk, by Hugging Face name; what was trained since covers the base's.

    Raises `UserError` for a tied head that is stored too and is not the embedding: transformers
    would not tie it.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        head, table = (files.entries.get(BESIDE[name]) for name in ("head", "embedding"))
        if files.config.get("tie_word_embeddings") and head and table and not _alike(head, table):
            raise UserError(
                f"{head.file}: {BESIDE['head']!r} is not the embedding, to which config.json's"
                " tie_word_embeddings ties it: with false it is a head of its own"
            )
        self.folder = files.folder
        self._entries: dict[str, Entry] = dict(files.entries)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def cover(self, entries: dict[str, Entry]) -> None:
        """Take these tensors from elsewhere from now on."""
        self._entries |= entries

    def read(self, names: tuple[str, ...], dtype: torch.dtype, *, staged: bool = False) -> Tensor:
        """Tensors stacked along axis 0, on the CPU: in memory of their own, or staged, in that of
        the staged one before (the same memory for all leaves no holes in the heap)."""
        entries = [self._entries[name] for name in names]
        rows = [e.shape[0] for e in entries]
        shape = (sum(rows), *entries[0].shape[1:])
        if staged:
            size = math.prod(shape) * dtype.itemsize
            if len(self._staging) < size:
                self._staging = torch.empty(size, dtype=torch.uint8)
            whole = self._staging[:size].view(dtype).view(shape)
        else:
            whole = torch.empty(shape, dtype=dtype)
        for part, entry in zip(whole.split(rows), entries, strict=True):
            read_entry(entry, part)
        return whole

    def close(self) -> None:
        """Give the staging memory back."""
        self._staging = torch.empty(0, dtype=torch.uint8)


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (a.code, a.shape) != (b.code, b.shape):
        return False
    pieces = (read_range(e.file, e.start, e.end) for e in (a, b))
    return all(x == y for x, y in zip(*pieces, strict=True))


def load_model(
    weights: Weights, config: Any, layout: Layout, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """A prepared model, laid out on `device` and in host memory, in evaluation mode.

    Raises `UserError` for files that cannot be read and a layout that the model cannot take.
    """
    config = copy(config)
    # what is loaded is no codes any more, whatever the files hold
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if (generation := load_generation_config(weights.folder)) is not None:
        model.generation_config = generation
    take_over(model)
    arrange(model, layout, weights, dtype=dtype, device=device)
    return model.eval()


def arrange(
    model: Any, layout: Layout, weights: Weights, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Bring a prepared model into a layout: what trains, where everything lies, in which format.

    What is there already as wanted is left alone; else a plain tensor is taken as it is now, and
    one that was quantized or streamed is read again.
    """
    blocks: list[Block] = list(model.model.layers)
    reaches = [i for i, layer in enumerate(layout.layers) if layer.trains]
    also = united(layout.also, tied=model.config.tie_word_embeddings)
    layout = replace(layout, also=also)
    lowest = 0 if "embedding" in also else min(reaches, default=len(blocks))
    stream = next((b.frozen.stream for b in blocks if isinstance(b.frozen, Streamed)), None)
    stream = stream or Stream(device)
    stream.lowest = lowest
    for block, want in zip(blocks, layout.layers, strict=True):
        _arrange_layer(block, want, weights, stream, dtype, device)
        block.requires_grad_(want.trains)
    set_activations(model, layout)
    size = 0
    for i, block in enumerate(blocks):
        if block.frozen is not None:
            for w in block.frozen.weights.values():
                need = ops.scratch_bytes(w, dtype=dtype, backward=i >= lowest, device=device)
                size = max(size, need)
    scratch = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    for block in blocks:
        block.scratch = scratch
    _arrange_embedding(model, layout, weights, dtype, device)
    _arrange_head(model, layout, weights, dtype, device)
    norm = model.model.norm
    if norm.weight.is_meta:
        norm.weight = _parameter(weights.read((BESIDE["final_norm"],), dtype), device)
    norm.weight.requires_grad_("final_norm" in layout.also)
    weights.close()


def set_activations(model: Any, layout: Layout, tokens: int = 0) -> None:
    """What each block keeps for its backward; all else of the layout is left as it is.

    tokens: that a micro-batch will have at most, so that host memory is pinned once.
    """
    # the one that is there has pinned memory already
    offload = next((b.offload for b in model.model.layers if b.offload is not None), Offload())
    offload.tokens = tokens
    for block, want in zip(model.model.layers, layout.layers, strict=True):
        block.activations = want.activations
        block.offload = offload if want.activations == "offload" else None


def _arrange_layer(
    block: Block, want: LayerLayout, weights: Weights, stream: Stream, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    prefix = f"model.layers.{block.layer_idx}."

    def read(packed: str) -> Tensor:
        """The weight as it is now, on the device; but for one that goes to the host as it is."""
        now = block.weight(packed)
        if now is not None and not now.is_meta:
            return now.data
        names = tuple(prefix + name for name in PACKED[packed])
        if packed in MATRICES and not plain and want.format == "bf16":
            return weights.read(names, dtype)
        staged = device.type != "cpu" or packed in MATRICES and not plain
        return weights.read(names, dtype, staged=staged).to(device)

    plain = want.trains or (want.format, want.placement) == ("bf16", "device")
    for packed in block.shape.packed_shapes():  # what is small stays on the device, unquantized
        if packed not in MATRICES:
            block.hold(packed, _parameter(read(packed), device, block.weight(packed)))
    if not plain and _kept(block) == (want.format, want.placement):
        return
    old, made = block.frozen, {}
    for packed in MATRICES:
        if plain:
            block.hold(packed, _parameter(read(packed), device, block.weight(packed)))
        else:
            made[packed] = freeze(read(packed), want.format)
            block.hold(packed, None)
    if isinstance(old, Streamed):
        stream.remove(block.layer_idx)
    if plain:
        block.frozen = None
    elif want.placement == "host":
        block.frozen = stream.add(block.layer_idx, made)
    else:
        block.frozen = Resident(made)


def _kept(block: Block) -> tuple[str, str] | None:
    """Format and placement of a layer's matrices; None where they are plain parameters."""
    if block.frozen is None:
        return None
    streamed = isinstance(block.frozen, Streamed)
    some = next(iter(block.frozen.weights.values()))
    return format_of(some), "host" if streamed else "device"


def _parameter(value: Tensor, device: torch.device, now: Any = None) -> nn.Parameter:
    """value as a parameter on the device; the one there is now if it holds just that."""
    if now is not None and not now.is_meta and now.device == device:
        return now
    return nn.Parameter(value.to(device), requires_grad=False)


def _arrange_embedding(
    model: Any, layout: Layout, weights: Weights, dtype: torch.dtype, device: torch.device
) -> None:
    embedding = model.model.embed_tokens
    trains = "embedding" in layout.also or (
        model.config.tie_word_embeddings and "head" in layout.also
    )
    on_host = layout.embedding == "host"
    if on_host and (trains or model.config.tie_word_embeddings):
        raise UserError("embedding on the host: it trains, or is tied to the head, and must stay")
    table = getattr(embedding, "on_host", None)
    if embedding.weight is not None and not embedding.weight.is_meta:
        table = embedding.weight.data
    if table is None:
        table = weights.read((BESIDE["embedding"],), dtype)
    if on_host:
        if embedding.weight is not None:
            embedding.on_host = zeros_on_host(table.shape, dtype, device).copy_(table)
        embedding.weight = None
        embedding.forward = MethodType(partial(_gather_on_host, device), embedding)
    else:
        embedding.weight = _parameter(table, device, embedding.weight)
        embedding.weight.requires_grad_(trains)
        embedding.on_host = None
        embedding.__dict__.pop("forward", None)


def _gather_on_host(device: torch.device, embedding: Any, ids: Tensor) -> Tensor:
    """Rows of a table in host memory, on the device; it waits for ids that are there."""
    return send(torch.nn.functional.embedding(ids.cpu(), embedding.on_host), device)


def _arrange_head(
    model: Any, layout: Layout, weights: Weights, dtype: torch.dtype, device: torch.device
) -> None:
    head, tied = model.lm_head, model.config.tie_word_embeddings
    if tied:
        if layout.head != "bf16":
            raise UserError("head in fp8: it is tied to the embedding, and must stay as it is")
        head.weight = model.model.embed_tokens.weight
        return
    if layout.head == "fp8":
        if "head" in layout.also:
            raise UserError("head in fp8: it trains, and must stay as it is")
        if getattr(head, "rows", None) is None:
            table = weights.read((BESIDE["head"],), dtype) if head.weight.is_meta else head.weight
            head.rows = quantize_rows(table.detach().to(device))
            head.weight = None
            head.forward = MethodType(_fp8_logits, head)
        return
    if head.weight is None or head.weight.is_meta:
        head.weight = _parameter(weights.read((BESIDE["head"],), dtype), device)
        head.rows = None
        head.__dict__.pop("forward", None)
    head.weight.requires_grad_("head" in layout.also)


def _fp8_logits(head: Any, x: Tensor) -> Tensor:
    """Logits of the last hidden states, for `generate()`: a piece of the table at a time."""
    flat = x.reshape(-1, x.shape[-1])
    logits = torch.empty(len(flat), len(head.rows.data), dtype=x.dtype, device=x.device)
    return head_logits(flat, head.rows, logits).view(*x.shape[:-1], -1)
