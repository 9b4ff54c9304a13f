"""Held-out figures against a direct computation, one sentence at a time, in stock Hugging Face."""

import io
import json

import pytest
import torch
from sacrebleu.metrics import CHRF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.tiny import tiny_model
from xplus_fast.config import DataConfig, EvaluationConfig
from xplus_fast.data.chat import Encoded, encode, prompt_text
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError
from xplus_fast.measuring import heldout
from xplus_fast.measuring.heldout import measure
from xplus_fast.model.prepare import prepare_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DATA = DataConfig(prompt="From {src} to {tgt}: {text} =>", pack_tokens=160)
CONFIG = EvaluationConfig(samples=99, translate=99, max_new_tokens=12, batch_size=3)
SENTENCES = ["open", "a {brace}", "two\nlines", "the longest of all of them by far", "x", "no | go"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(params=["stock", "prepared"])
def model(request):
    made = tiny_model()
    return prepare_model(made, [0, 1]) if request.param == "prepared" else made


def pairs(tag, sentences=SENTENCES):
    src, tgt = tag.split("-")
    examples = []
    for i, text in enumerate(sentences):
        content = DATA.prompt.format(src=src, tgt=tgt, text=text)
        messages = (
            {"role": "user", "content": content},
            {
                "role": "assistant",
                "content": f"answer {i} to {text}",
            },
        )
        examples.append(Example(messages, f"pairs:{i}", tag, f"{tag}\0{text}"))
    return examples


def run(model, tokenizer, heldout, retention=(), *, data=DATA, config=CONFIG, show=False):
    return measure(model, tokenizer, heldout, list(retention), data=data, config=config, show=show)


def direct_loss(sequences):
    """Stock model, one sequence at a time: mean over supervised tokens, and their number."""
    stock, total, count = tiny_model().double(), 0.0, 0
    for ids, supervised in sequences:
        x = torch.as_tensor(ids, dtype=torch.int64)[None]
        with torch.no_grad():
            log_p = stock(input_ids=x).logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(1, x[0, 1:, None])[:, 0]
        mask = torch.as_tensor(supervised)[1:]
        total, count = total + nll[mask].sum().item(), count + int(mask.sum())
    return total / count, count


def direct_outputs(tokenizer, examples, **options):
    """Stock `generate`, one sentence at a time."""
    stock, outputs = tiny_model(), []
    for example in examples:
        prompt = prompt_text(example, tokenizer, "masked")
        batch = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = stock.generate(
            **batch, do_sample=False, max_new_tokens=CONFIG.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, **options,
        )  # fmt: skip
        outputs.append(ids[0, batch["input_ids"].shape[1] :].tolist())
    return outputs


def test_loss_is_that_of_single_sequences(model, tokenizer):
    heldout = {"en-fr": pairs("en-fr"), "fr-en": pairs("fr-en", SENTENCES[:2])}
    texts = ["A text to be kept.", "Another.", "z" * 400]
    result = run(model, tokenizer, heldout, texts)
    for tag, examples in heldout.items():
        encoded = encode(examples, tokenizer, DATA.think, DATA.pack_tokens)
        assert all(isinstance(e, Encoded) for e in encoded)
        # more than one row, with unequal numbers of supervised tokens: the weights matter
        expected, _ = direct_loss([(e.input_ids, e.supervised) for e in encoded])
        assert result["loss"][tag] == pytest.approx(expected, rel=1e-5)
    ids = [tokenizer(t)["input_ids"][: DATA.pack_tokens] for t in texts]
    loss, count = direct_loss([(i, [True] * len(i)) for i in ids])
    assert result["retention"]["tokens"] == count == 17 + 7 + 159
    assert result["retention"]["loss"] == pytest.approx(loss, rel=1e-5)
    json.dumps(result)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_translations_are_those_of_single_sentences(model, tokenizer, batch_size):
    examples = pairs("en-fr")
    config = EvaluationConfig(99, 99, CONFIG.max_new_tokens, batch_size)
    result = run(model, tokenizer, {"en-fr": examples}, config=config)
    samples = result["samples"]["en-fr"]
    expected = [
        tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in direct_outputs(tokenizer, examples, eos_token_id=tokenizer.eos_token_id)
    ]
    assert len(set(expected)) > 1
    assert [s["output"] for s in samples] == expected
    assert [s["source"] for s in samples] == SENTENCES
    assert [s["reference"] for s in samples] == [e.messages[-1]["content"] for e in examples]
    metric = CHRF(word_order=2)
    score = metric.corpus_score(expected, [[s["reference"] for s in samples]]).score
    assert result["chrf"]["en-fr"] == pytest.approx(score, abs=1e-9)
    assert result["signature"] == str(metric.get_signature()) and "nw:2" in result["signature"]


@pytest.mark.parametrize("batch_size", [2, 16])
def test_directions_in_one_batch_keep_to_themselves(model, tokenizer, batch_size):
    parts = {"en-fr": pairs("en-fr"), "en-sw": pairs("en-sw", SENTENCES[1:])}
    config = EvaluationConfig(99, 99, CONFIG.max_new_tokens, batch_size)
    together = run(model, tokenizer, parts, config=config)
    for tag, examples in parts.items():
        alone = run(model, tokenizer, {tag: examples}, config=config)
        for kind in ("samples", "chrf", "off_length"):
            assert together[kind][tag] == alone[kind][tag]
    outputs = [[s["output"] for s in together["samples"][tag]] for tag in parts]
    assert outputs[0][1:] != outputs[1] and len(outputs[1]) == len(SENTENCES) - 1


def test_ends_of_an_answer_are_counted(model, tokenizer):
    examples = pairs("en-fr")
    answers = direct_outputs(tokenizer, examples, eos_token_id=None)
    # If this token ends an answer, at least one is empty and at least one never ends
    first = next(t for t, *_ in answers if any(t not in ids for ids in answers))
    model.generation_config.eos_token_id = first  # beside the tokenizer's own
    result = run(model, tokenizer, {"en-fr": examples})
    ends = {first, tokenizer.eos_token_id}
    cut = []
    for ids in answers:
        at = next((i for i, t in enumerate(ids) if t in ends), len(ids))
        cut.append((tokenizer.decode(ids[:at], skip_special_tokens=True).strip(), at == len(ids)))
    empty, truncated = sum(not text for text, _ in cut), sum(open_ for _, open_ in cut)
    assert empty >= 1 and truncated >= 1 and empty + truncated <= len(cut)
    assert [s["output"] for s in result["samples"]["en-fr"]] == [text for text, _ in cut]
    assert result["off_length"]["en-fr"] == {"empty": empty, "truncated": truncated}


def test_model_comes_back_as_it_went_in(model, tokenizer, capfd):
    heldout = {"en-fr": pairs("en-fr")}
    plain = run(model, tokenizer, heldout)
    sampling = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=3.0,
        max_new_tokens=2,
    )  # fmt: skip
    model.generation_config = sampling
    model.config.use_cache = False
    tokenizer.padding_side = "right"
    rng = torch.get_rng_state()
    model.train()
    modes = set()
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda *_: modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    capfd.readouterr()
    assert run(model, tokenizer, heldout, ["Some text."])["samples"] == plain["samples"]
    assert capfd.readouterr().err == ""  # no bar, no warning
    assert modes == {(False, False)}
    hook.remove()
    assert model.config.use_cache is False
    model.config.use_cache = True
    with pytest.raises(UserError, match="^retention: no token is supervised"):
        run(model, tokenizer, {}, ["a"])
    assert model.training and all(m.training for m in model.modules())
    assert model.config.use_cache is True and tokenizer.padding_side == "right"
    assert model.generation_config is sampling and sampling.repetition_penalty == 3.0
    assert torch.equal(rng, torch.get_rng_state())
    ids = torch.arange(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # what was measured can still be trained
    assert model.model.norm.weight.grad is not None or not model.model.norm.weight.requires_grad


def test_only_directions_are_translated(tokenizer):
    heldout = {
        "chats": pairs("en-fr"), "pt_BR-en": pairs("en-fr"), "my-notes": pairs("en-fr"),
        "eng_Latn-zho_Hans": pairs("en-fr"), "fr-en": [],
    }  # fmt: skip
    config = EvaluationConfig(samples=1, translate=3, max_new_tokens=2)
    result = run(tiny_model(), tokenizer, heldout, config=config)
    assert sorted(result["loss"]) == ["chats", "eng_Latn-zho_Hans", "my-notes", "pt_BR-en"]
    for part in ("chrf", "samples", "off_length"):
        assert sorted(result[part]) == ["eng_Latn-zho_Hans", "pt_BR-en"]
    assert [s["source"] for s in result["samples"]["pt_BR-en"]] == SENTENCES[:1]
    config = EvaluationConfig(samples=99, translate=3, max_new_tokens=2)
    first = run(tiny_model(), tokenizer, {"en-fr": pairs("en-fr")}, config=config)
    assert [s["source"] for s in first["samples"]["en-fr"]] == SENTENCES[:3]
    none = run(tiny_model(), tokenizer, heldout, config=EvaluationConfig(translate=0))
    assert none["loss"] == result["loss"]
    assert none["chrf"] == none["samples"] == {} and none["signature"] is None


def test_nothing_held_out(tokenizer):
    assert run(tiny_model(), tokenizer, {}) == {
        "loss": {}, "chrf": {}, "samples": {}, "signature": None, "retention": None,
        "off_length": {},
    }  # fmt: skip


def test_source_of_a_foreign_prompt_is_the_whole_message(tokenizer):
    messages = (
        {"role": "user", "content": " Say it in French: hi "},
        {
            "role": "assistant",
            "content": "salut",
        },
    )
    example = Example(messages, "chats:1", "en-fr", "k")
    result = run(tiny_model(), tokenizer, {"en-fr": [example]})
    assert result["samples"]["en-fr"][0]["source"] == "Say it in French: hi"


def test_thinking_is_off_whatever_was_trained(tokenizer):
    outputs = [
        run(
            tiny_model(), tokenizer, {"en-fr": pairs("en-fr")},
            data=DataConfig(prompt=DATA.prompt, think=think),
        )["samples"]
        for think in ("masked", "absent", "loss")
    ]  # fmt: skip
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_think_block_is_left_out_of_what_is_scored(tokenizer, monkeypatch):
    references = [e.messages[-1]["content"].strip() for e in pairs("en-fr")][:2]
    said = [f"<think>hm</think>\n\n{references[0]}", references[1]]
    monkeypatch.setattr(heldout, "_translate", lambda *a: [(text, False) for text in said])
    result = run(tiny_model(), tokenizer, {"en-fr": pairs("en-fr")[:2]})
    assert result["chrf"]["en-fr"] == 100
    assert [s["output"] for s in result["samples"]["en-fr"]] == references
    assert result["off_length"]["en-fr"] == {"empty": 0, "truncated": 0, "thoughts": 1}


@pytest.mark.parametrize("tty", [True, False])
def test_bar_on_a_terminal_only(tokenizer, monkeypatch, tty):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    monkeypatch.setattr("sys.stderr", stream)
    run(tiny_model(), tokenizer, {"en-fr": pairs("en-fr")}, show=True)
    said = stream.getvalue()
    assert said.isascii()
    assert ("held-out en-fr" in said) == ("translating" in said) == tty
