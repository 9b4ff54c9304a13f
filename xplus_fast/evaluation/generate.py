"""Greedy answers, each made once: what was generated is kept, and found again.

Thinking is off whatever the model was trained with: a base Qwen3 would think through its budget of
tokens, score near zero, and every gain over it would be an artefact. The full answer is kept.
"""

import gc
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xplus_fast.errors import UserError
from xplus_fast.files import append_lines, make_folder, whole_lines
from xplus_fast.measuring.answers import answers, greedy
from xplus_fast.model.checkpoint_files import RECORD, CheckpointFiles, check_against
from xplus_fast.model.families import FAMILIES, shape_of
from xplus_fast.model.headers import read_range
from xplus_fast.model.pretrained import load_tokenizer, refused


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    folder: of its configuration and tokenizer, and, where `harness` is None, of its weights.
    digest: of all of it (`model_digest`). load: it, to answer with. harness: lm-evaluation-harness
    with it, given options and an environment: its exit code and the end of what it said.
    """

    folder: Path
    digest: str
    load: Callable[[], Any]
    harness: Callable[[Sequence[str], Mapping[str, str]], tuple[int, str]] | None = None


def subject_of(folder: Path, dtype: str, device: str) -> Subject:
    """A model's folder, read when its first answer is missing."""
    return Subject(folder, model_digest(folder), lambda: load(folder, dtype, device))


def pick_engine(wanted: str) -> str:
    """ "vllm" or "generate", as a recipe's `engine` says. Raises `UserError` if it is missing."""
    found = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not found:
        raise UserError("engine: vllm is not installed: pip install vllm, or engine=generate")
    return "vllm" if wanted != "generate" and found else "generate"


def check_device(device: str) -> None:
    """See that a recipe's `device` is there. Raises `UserError`."""
    if device == "auto":
        return
    try:
        usable = torch.device(device).type != "meta" and torch.zeros(1, device=device).sum() == 0
        why = "" if usable else "it computes nothing"
    except (RuntimeError, AssertionError) as e:  # of PyTorch built without it
        why = str(e).partition("\n")[0]
    if why:
        raise UserError(
            f"device: {device!r:.40} is not there ({why:.200}): auto, cpu, cuda, cuda:0"
        )


class Generator:
    """A model's answers, out of a cache where they have been made before.

    cache: a folder; an answer is known by the model's bytes, the prompt, the token limit and the
    engine. The model is loaded when the first answer is missing, and let go by `close`.
    """

    def __init__(
        self, subject: Subject, cache: Path, *, engine: str, batch_size: int, max_new_tokens: int,
        dtype: str, show: bool,
    ) -> None:  # fmt: skip
        self.subject, self.show = subject, show
        self.engine = pick_engine(engine) if subject.harness is None else "generate"
        self.batch_size, self.max_new_tokens, self.dtype = batch_size, max_new_tokens, dtype
        self.made = 0  # answers that were not in the cache
        identity = f"{subject.digest}|{self.engine}|{max_new_tokens}|{dtype}"
        self._file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        self._known: dict[str, tuple[str, bool]] = {}
        for line in whole_lines(self._file):
            try:
                key, text, cut = json.loads(line)
                self._known[key] = (text, cut)
            except (ValueError, TypeError):  # the disk's fault: that answer is made again
                continue
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.subject.folder)
        return self._tokenizer

    def answer(self, prompts: Sequence[str], what: str) -> list[tuple[str, bool]]:
        """(answer, cut off at the token limit) of each prompt, in order."""
        keys = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
        missing = [i for i, k in enumerate(dict.fromkeys(keys)) if k not in self._known]
        wanted = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self._known}
        if wanted:
            self._make(list(wanted), list(wanted.values()), what)
        self.made += len(missing)
        return [self._known[k] for k in keys]

    def close(self) -> None:
        """Let the model go: another one, or the harness with its own, needs its memory."""
        model, self._model = self._model, None
        if model is None:
            return
        if self.engine == "vllm":  # its processes would stay as long as ours
            model.llm_engine.engine_core.shutdown()
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _make(self, keys: list[str], prompts: list[str], what: str) -> None:
        make_folder(self._file.parent)
        bar = tqdm(total=len(keys), desc=what, unit="sentences", ascii=True, leave=False,
                   dynamic_ncols=True, disable=None if self.show else True)  # fmt: skip
        with bar:
            for batch in self._batches(prompts):
                made = {keys[i]: (text, cut) for i, text, cut in batch}
                lines = (json.dumps([key, *m], ensure_ascii=False) for key, m in made.items())
                append_lines(self._file, lines)
                self._known |= made
                bar.update(len(batch))

    def _batches(self, prompts: list[str]) -> Iterator[list[tuple[int, str, bool]]]:
        if self.engine == "vllm":
            yield self._vllm(prompts)
            return
        if self._model is None:
            self._model = self.subject.load()
        with greedy(self._model, self.tokenizer, self.max_new_tokens):
            yield from answers(self._model, self.tokenizer, prompts, self.batch_size)

    def _vllm(self, prompts: list[str]) -> list[tuple[int, str, bool]]:
        from vllm import LLM, SamplingParams

        folder = str(self.subject.folder)
        if self._model is None:
            try:
                self._model = LLM(folder, dtype=self.dtype, trust_remote_code=False)
            except (RuntimeError, ValueError, OSError) as e:  # no memory, no kernel for the model
                said = " ".join(str(e).split())[:200]
                raise UserError(
                    f"engine: vllm does not start with {folder} ({said}): engine=generate"
                ) from None
        options = SamplingParams(temperature=0, max_tokens=self.max_new_tokens)
        ids = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        asked = [{"prompt_token_ids": i} for i in ids]
        try:
            made = self._model.generate(asked, options, use_tqdm=False)
        except ValueError as e:  # a prompt beyond what the model has positions for
            said = " ".join(str(e).split())[:200]
            raise UserError(f"engine: vllm refuses a prompt ({said})") from None
        found = []
        for i, request in enumerate(made):
            output = request.outputs[0]
            # its own text lacks a character that the token limit cut in two
            text = self.tokenizer.decode(list(output.token_ids), skip_special_tokens=True).strip()
            found.append((i, text, output.finish_reason == "length"))
        return found


def load_kind(dtype: str, device: str) -> tuple[str, str]:
    """Dtype and device in which a model answers. "auto": the GPU if there is one, bf16 on it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return dtype, device


def load(folder: Path, dtype: str, device: str) -> Any:
    """A model's folder, to answer with."""
    from transformers import AutoModelForCausalLM

    dtype, device = load_kind(dtype, device)
    wanted: Any = getattr(torch, dtype)
    files = CheckpointFiles.open(folder)
    if any(entry.scale is not None for entry in files.entries.values()):
        return _load_codes(files, wanted, device)
    with refused(f"{folder}: no model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, trust_remote_code=False, local_files_only=True,
            use_safetensors=True, attn_implementation="sdpa",
        )  # fmt: skip
    return model.to(device)


def _load_codes(files: CheckpointFiles, dtype: torch.dtype, device: str) -> Any:
    """A model in FP8, as it is trained: transformers mistakes the size of blocks that are cut off
    at a matrix's edge, and on a GPU wants a kernel from the hub."""
    from xplus_fast.model.layout import LayerLayout, Layout
    from xplus_fast.model.load import Weights, load_model

    config = _config(files.folder)
    layout = Layout((LayerLayout(),) * shape_of(config).layers)
    return load_model(Weights(files), config, layout, dtype=dtype, device=torch.device(device))


def check_model(folder: Path, *, stock: bool) -> None:
    """Refuse a model whose weights would not be read as they are meant, before it is loaded.

    stock: transformers will read it itself. Raises `UserError`.
    """
    from transformers import AutoModelForCausalLM

    files = CheckpointFiles.open(folder)
    if files.config.get("model_type") in FAMILIES:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(_config(folder))
        check_against(files, {name: tuple(p.shape) for name, p in model.named_parameters()})
    for name, entry in files.entries.items() if stock else ():
        cut = any(n % b for n, b in zip(entry.shape, entry.block, strict=False))
        if entry.scale is not None and cut:
            raise UserError(
                f"{entry.file}: {name!r}, {list(entry.shape)}, is in FP8 blocks of"
                f" {list(entry.block)}, the last of them cut off, which transformers does not read"
                " as it is meant: reasoning needs engine=vllm, or a model that is not in FP8"
            )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    with refused(f"{folder}/config.json: not a model configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def model_digest(folder: Path) -> str:
    """A hash of a model's weights, configuration and tokenizer."""
    files = [p for p in folder.iterdir() if p.is_file() and p.name != RECORD]  # which says when
    if not any(p.suffix == ".safetensors" for p in files):
        raise UserError(f"{folder}: no safetensors in it; a model folder or a run's is wanted")
    return digest_of((p.name, read_range(p, 0, p.stat().st_size)) for p in files if _counts(p.name))


def digest_of(files: Iterable[tuple[str, Iterable[bytes | memoryview]]]) -> str:
    """The same of a model's files, (name, bytes), of which not all may be there."""
    digest = hashlib.sha256()
    for name, pieces in sorted(files, key=lambda file: file[0]):
        if _counts(name):
            digest.update(name.encode())
            for piece in pieces:
                digest.update(piece)
    return digest.hexdigest()


def _counts(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".json", ".jinja") and "/" not in name
