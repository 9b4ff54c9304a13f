"""The prepared model against stock Hugging Face: values, gradients, and the rest of its life."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.planning.accounting import computed_pairs
from tests.tiny import (
    KINDS,
    LAYERS,
    SELECTIONS,
    difference,
    gradients,
    packed_batch,
    padded_batch,
    select,
    stock_loss,
    tiny_model,
)
from xplus_fast.errors import UserError
from xplus_fast.model.families import shape_of
from xplus_fast.model.prepare import (
    layer_ids,
    load_tensors,
    prepare_model,
    trained_tensors,
)
from xplus_fast.planning.flops import Work, layer_gemms
from xplus_fast.training.throughput import count_work

LENGTHS = [21, 1, 40, 2, 9]
TOLERANCE = 2e-5  # relative norm of the difference, tensor by tensor


def assert_same_gradients(ours, stock, tolerance=TOLERANCE):
    mine, theirs = gradients(ours), gradients(stock)
    assert mine.keys() == theirs.keys()
    for name, g in theirs.items():
        assert difference(mine[name], g) <= tolerance, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_loss_and_gradients_equal_stock(kind, selection):
    layers = SELECTIONS[selection]
    stock = select(tiny_model(kind), layers)
    ours = prepare_model(copy.deepcopy(stock), layers)
    batch = packed_batch(LENGTHS)
    expected = stock_loss(stock, batch, LENGTHS)
    expected.backward()

    loss = ours(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_gradients(ours, stock)

    for side in ("right", "left"):  # the same sequences, padded
        ours.zero_grad()
        padded = ours(**padded_batch(batch, LENGTHS, side)).loss
        padded.backward()
        assert padded.item() == pytest.approx(expected.item(), rel=2e-6)
        assert_same_gradients(ours, stock)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize(
    "also", [("embedding",), ("final_norm",), ("head",), ("embedding", "head")]
)
@pytest.mark.parametrize("layers", [[4, 5], []])
def test_training_beside_the_blocks_equals_stock(kind, also, layers):
    names = {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "head": "model.embed_tokens.weight" if kind.endswith("tied") else "lm_head.weight",
    }
    stock = select(tiny_model(kind), layers, tuple(names[a] for a in also))
    ours = prepare_model(tiny_model(kind), layers, also=also)
    batch = packed_batch(LENGTHS)
    stock_loss(stock, batch, LENGTHS).backward()
    ours(**batch).loss.backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_stock_with_and_without_a_cache(kind):
    stock, ours = tiny_model(kind).eval(), prepare_model(tiny_model(kind)).eval()
    batch = padded_batch(packed_batch(LENGTHS), LENGTHS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, output_hidden_states=True)
        engine = ours(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        cached = ours(ids, attention_mask=mask, use_cache=True)
    real = mask.bool()
    for out in (engine, cached):
        assert difference(out.logits[real], expected.logits[real]) <= TOLERANCE
    assert cached.past_key_values is not None
    assert len(engine.hidden_states) == LAYERS + 1
    for mine, theirs in zip(engine.hidden_states, expected.hidden_states, strict=True):
        assert difference(mine[real], theirs[real]) <= TOLERANCE


def test_packed_logits_equal_those_of_each_sequence_alone():
    stock, ours = tiny_model(), prepare_model(tiny_model())
    batch = packed_batch(LENGTHS)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        by_position = ours(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        by_cu = ours(
            batch["input_ids"], position_ids=batch["position_ids"], use_cache=False,
            cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=40, max_length_k=40,
        )  # fmt: skip
        alone = [stock(x[None]).logits[0] for x in batch["input_ids"][0].split(LENGTHS)]
    assert difference(by_position.logits[0], torch.cat(alone)) <= TOLERANCE
    assert torch.equal(by_position.logits, by_cu.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_stock_at_any_time(kind):
    stock, ours = tiny_model(kind), prepare_model(tiny_model(kind), [1])
    batch = padded_batch(packed_batch(LENGTHS), LENGTHS, "left")
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask")}
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=True)
    assert torch.equal(ours.generate(**prompt, **options), stock.generate(**prompt, **options))
    ours(**packed_batch(LENGTHS)).loss.backward()  # in the middle of training, too
    assert torch.equal(ours.generate(**prompt, **options), stock.generate(**prompt, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_hugging_face_tensors(kind, tmp_path):
    stock, ours = tiny_model(kind), prepare_model(tiny_model(kind), [0])
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_load_state_dict_takes_hugging_face_names():
    ours, other = prepare_model(tiny_model(seed=0)), tiny_model(seed=1)
    ours.load_state_dict(other.state_dict())
    batch = packed_batch(LENGTHS)
    assert ours(**batch).loss.item() == pytest.approx(
        stock_loss(other, batch, LENGTHS).item(), rel=2e-6
    )
    broken = other.state_dict()
    del broken["model.layers.3.self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(broken)


def test_a_deep_copy_is_a_model_of_its_own():
    ours = prepare_model(tiny_model(), [2])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.model.layers[2].mlp.down_proj.weight.zero_()
    batch = packed_batch(LENGTHS)
    assert ours(**batch).loss.item() != twin(**batch).loss.item()


def test_flags_are_read_per_weight():
    stock = tiny_model().requires_grad_(False)
    stock.model.layers[3].mlp.down_proj.weight.requires_grad_(True)
    stock.model.layers[4].input_layernorm.weight.requires_grad_(True)
    ours = prepare_model(copy.deepcopy(stock))
    assert layer_ids(ours) == [3, 4]
    batch = packed_batch(LENGTHS)
    stock_loss(stock, batch, LENGTHS).backward()
    ours(**batch).loss.backward()
    assert_same_gradients(ours, stock)


def test_flags_that_split_a_packed_weight_are_refused():
    stock = select(tiny_model(), [2])
    stock.model.layers[2].self_attn.k_proj.weight.requires_grad_(False)
    with pytest.raises(
        UserError, match=r"layer 2: .*q_proj.weight trains.*k_proj.weight is frozen"
    ):
        prepare_model(stock)


def test_a_step_in_mixed_precision_comes_near_fp32():
    ours = prepare_model(tiny_model(), [1, 2])
    batch = packed_batch(LENGTHS)
    ours(**batch).loss.backward()
    exact = {n: g.clone() for n, g in gradients(ours).items()}
    ours.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(**batch).loss
    loss.backward()
    for name, g in gradients(ours).items():
        assert g.dtype == torch.float32
        assert 1e-6 < difference(g, exact[name]) < 0.05, name


def test_logits_in_mixed_precision_come_near_fp32():
    ours = prepare_model(tiny_model()).eval()
    ids = packed_batch([20])["input_ids"]
    with torch.no_grad():
        exact = ours(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for cache in (True, False):
                assert difference(ours(ids, use_cache=cache).logits.float(), exact) < 0.03


def test_a_graph_never_reaches_below_the_lowest_trained_layer():
    ours = prepare_model(tiny_model(), [3])
    ours.enable_input_require_grads()  # what Trainer does with gradient checkpointing
    seen = {}
    for i, block in enumerate(ours.model.layers):
        run = block.run
        block.run = lambda *a, i=i, run=run: seen.setdefault(i, run(*a))
    ours(**packed_batch(LENGTHS)).loss.backward()
    assert [seen[i].requires_grad for i in range(LAYERS)] == [False] * 3 + [True] * 3
    assert all(n.startswith("model.layers.3.") for n in gradients(ours))


def test_a_loss_without_gradients_costs_the_forward_alone():
    ours = prepare_model(tiny_model())
    lengths = [21, 1, 30, 2, 9]
    batch = packed_batch(lengths)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = ours(**batch).loss
    shape = shape_of(ours.config)
    work = Work(*count_work(batch).tolist())
    products = (LAYERS - 1) * layer_gemms(shape, work) + layer_gemms(shape, work, last=True)
    products += 2 * work.supervised * shape.hidden * shape.vocabulary
    attention = 4 * shape.heads * shape.head_dim
    every = computed_pairs(lengths)
    assert counter.get_total_flops() > products + attention * (LAYERS - 1) * every
    assert counter.get_total_flops() < products + attention * LAYERS * every
    assert loss.item() == ours(**batch).loss.item()


def test_divisor_and_rows_of_the_caller():
    ours = prepare_model(tiny_model(), [5])
    batch = packed_batch(LENGTHS)
    count = int((batch["labels"] != -100).sum())
    mean = ours(**batch).loss
    half = ours(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    assert half.item() == pytest.approx(mean.item() / 2, rel=1e-6)
    rows = (batch["labels"][0] != -100).nonzero()[:, 0] - 1
    assert torch.equal(ours(**batch, supervised_rows=rows).loss, mean)
    assert torch.equal(ours(**batch, supervised_rows=rows.flip(0)).loss, mean)  # in any order


def test_nothing_supervised_is_loss_zero_and_gradients_zero():
    ours = prepare_model(tiny_model(), [4])
    batch = packed_batch(LENGTHS)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = ours(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(ours).values())


def test_wrong_batches_are_refused():
    ours = prepare_model(tiny_model(), [4])
    batch = padded_batch(packed_batch(LENGTHS), LENGTHS)
    labelled = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 7)}
    with pytest.raises(ValueError, match="padded position carries a label"):
        ours(**labelled)
    with pytest.raises(ValueError, match="attention_mask: shape"):
        ours(**{**batch, "attention_mask": batch["attention_mask"][:, None, None]})


def test_models_that_are_not_supported_are_refused():
    with pytest.raises(UserError, match="Qwen3Model: a ...ForCausalLM model is wanted"):
        prepare_model(tiny_model().model)
    with pytest.raises(UserError, match="attention_bias"):
        prepare_model(tiny_model("llama", attention_bias=True))
    with pytest.raises(UserError, match="layer 6: the model has 0 to 5"):
        prepare_model(tiny_model(), [6])
    with pytest.raises(UserError, match="'norm' is not one of"):
        prepare_model(tiny_model(), [0], also=["norm"])


def test_trained_tensors_are_views_and_load_back():
    ours = prepare_model(tiny_model(), [1], also=["final_norm"])
    tensors = trained_tensors(ours)
    assert "model.layers.1.self_attn.k_proj.weight" in tensors and "model.norm.weight" in tensors
    assert len(tensors) == 11 + 1
    saved = {n: t.clone() for n, t in tensors.items()}
    with torch.no_grad():
        ours.model.layers[1].self_attn.qkv_proj.weight.zero_()
    assert tensors["model.layers.1.self_attn.k_proj.weight"].abs().max() == 0
    load_tensors(ours, saved)
    packed = ours.model.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(packed[:192], saved["model.layers.1.self_attn.q_proj.weight"])
    with pytest.raises(UserError, match="no such tensor"):
        load_tensors(ours, {"model.layers.9.x": torch.zeros(1)})
