"""Before and after: loss and chrF++ on held-out pairs, loss on text that should not move.

Everything is deterministic (no sampling, no random state touched), so that two figures differ
only by what was trained in between.
"""

import itertools
import re
from collections.abc import Sequence
from string import Formatter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xplus_fast.config import DataConfig, EvaluationConfig
from xplus_fast.data.chat import prompt_text
from xplus_fast.data.corpus import PackCollator, pack_examples, pack_texts
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError
from xplus_fast.measuring.answers import answers, greedy, without_thought
from xplus_fast.model.prepare import is_prepared
from xplus_fast.progress import WorkLine

# "en-fr", "eng_Latn-zho_Hans", "pt-BR-en": a tag that names two languages
_DIRECTION = re.compile(r"[a-z]{2,3}([-_][A-Z]\w+)?-[a-z]{2,3}([-_][A-Z]\w+)?")


_LOSS, _TRANSLATION = "loss", "translation"  # kinds of work


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: dict[str, list[Example]],
    retention: Sequence[str],
    *,
    data: DataConfig,
    config: EvaluationConfig,
    show: bool,
) -> dict[str, Any]:
    """Measure held-out loss, chrF++ and retention; the model comes back as it went in.

    heldout: tag -> examples; tags that name a translation direction ("en-fr") are also translated
    (the first `config.translate` sentences, greedily). retention: plain texts. Returns, ready for
    JSON: `loss` {tag: nats per supervised token}, `chrf` {tag: chrF++, 0 to 100}, `samples`
    {tag: [{source, reference, output}]}, `signature` of sacrebleu or None, `retention`
    {loss, tokens} or None, `off_length` {tag: {empty, truncated}} counts of translated sentences,
    and `thoughts` where some had a think block, which is left out of what is scored.
    show: how far it is, and the time left.

    Raises `UserError` where a tag or the retention texts hold nothing supervised.
    """
    tags = sorted(tag for tag, examples in heldout.items() if examples)
    rows = {tag: pack_examples(heldout[tag], tokenizer, data) for tag in tags}
    vocabulary = model.config.vocab_size
    texts = pack_texts(retention, tokenizer, data.pack_tokens, vocabulary) if retention else []
    directions = [tag for tag in tags if config.translate and is_direction(tag, heldout[tag])]
    chosen = {tag: heldout[tag][: config.translate] for tag in directions}
    work = {_LOSS: sum(map(len, rows.values())) + len(texts),
            _TRANSLATION: sum(map(len, chosen.values()))}  # fmt: skip
    result: dict[str, Any] = {
        "loss": {},
        "chrf": {},
        "samples": {},
        "signature": None,
        "retention": None,
        "off_length": {},
    }
    with greedy(model, tokenizer, config.max_new_tokens), WorkLine(work, show=show) as line:
        for tag in tags:
            result["loss"][tag], _ = _loss(
                model, rows[tag], line, f"held-out {tag}", data.shared_prompts
            )
        if retention:
            loss, tokens = _loss(model, texts, line, "retention", data.shared_prompts)
            result["retention"] = {"loss": loss, "tokens": tokens}
        # Thinking is off whatever data.think says: a base Qwen3 would think through its budget of
        # tokens, score near zero, and every gain over it would be an artefact.
        prompts = [prompt_text(e, tokenizer, "masked") for part in chosen.values() for e in part]
        translated = iter(_translate(model, tokenizer, prompts, config.batch_size, line))
        for tag, examples in chosen.items():
            made = list(itertools.islice(translated, len(examples)))
            sources = [_sentence(e, data.prompt) for e in examples]
            read = [without_thought(text, s) for (text, _), s in zip(made, sources, strict=True)]
            outputs = [text.strip() for text, _ in read]
            truncated = sum(cut for _, cut in made)
            references = [e.messages[-1]["content"].strip() for e in examples]
            result["chrf"][tag], result["signature"] = _chrf(outputs, references)
            result["off_length"][tag] = {"empty": outputs.count(""), "truncated": truncated}
            if thoughts := sum(thought for _, thought in read):
                result["off_length"][tag]["thoughts"] = thoughts
            shown = list(zip(sources, references, outputs, strict=True))[: config.samples]
            result["samples"][tag] = [
                {"source": s, "reference": r, "output": o} for s, r, o in shown
            ]
    return result


def is_direction(tag: str, examples: Sequence[Example]) -> bool:
    """Whether examples of this tag are translations, and not text in a file of such a name."""
    return bool(_DIRECTION.fullmatch(tag)) and not any(e.is_text for e in examples)


def _loss(
    model: Any, rows: list[dict[str, Any]], line: WorkLine, what: str, shared: bool
) -> tuple[float, int]:
    """Mean loss over all supervised tokens of some packed rows, in nats; and their number."""
    line.begin(what, _LOSS)
    # With a cache Hugging Face's models no longer see where one packed sequence ends
    model.config.use_cache = False
    # a stock model knows no shared prefixes
    collate = PackCollator(shared_prefixes=shared and is_prepared(model))
    total, count = 0.0, 0
    for row in rows:
        batch = {
            k: v.to(model.device) if isinstance(v, torch.Tensor) else v
            for k, v in collate([row]).items()
        }
        n = int((batch["labels"][:, 1:] != -100).sum())  # position t predicts label t+1
        if n:  # a mean over nothing is NaN
            total += float(model(**batch).loss) * n
            count += n
        line.update()
    if not count:
        raise UserError(f"{what}: no token is supervised; nothing can be measured on it")
    return total / count, count


def _translate(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int, line: WorkLine
) -> list[tuple[str, bool]]:
    """Greedy answers in the order of the prompts, and whether each stopped at the token limit.

    Directions are mixed: sentences of about one length make a batch.
    """
    if prompts:
        line.begin("translating", _TRANSLATION)
    outputs = [("", False)] * len(prompts)
    for batch in answers(model, tokenizer, prompts, batch_size):
        for i, text, cut in batch:
            outputs[i] = text, cut
        line.update(len(batch))
    return outputs


def _chrf(outputs: list[str], references: list[str]) -> tuple[float, str]:
    """Corpus chrF++ (0 to 100) and sacrebleu's signature, which says what was computed."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=2)
    return metric.corpus_score(outputs, [references]).score, str(metric.get_signature())


def _sentence(example: Example, prompt: str) -> str:
    """The source sentence: the last user message, without the words of `data.prompt` around it."""
    asked = [m["content"] for m in example.messages if m["role"] == "user"]
    content = asked[-1] if asked else ""
    pattern, seen = "", False
    for literal, name, _, _ in Formatter().parse(prompt):
        pattern += re.escape(literal)
        if name == "text":
            pattern += "(?P=text)" if seen else "(?P<text>.*)"
            seen = True
        elif name is not None:
            pattern += ".*?"
    match = re.fullmatch(pattern, content, re.DOTALL)
    return (match["text"] if match else content).strip()
