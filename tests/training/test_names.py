"""What a script says of a model's parts by name, path or type, before or after Trainer is made."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.tiny import packed_batch, select, tiny_model
from tests.training.test_trainer import arguments, pad, sentences, train
from xplus_fast import XPlusTrainer, prepare_model
from xplus_fast.errors import UserError
from xplus_fast.model.layer import Block
from xplus_fast.model.prepare import named_tensors, trained_tensors


def by_name(*patterns, flag=True):
    def change(model):
        for name, p in model.named_parameters():
            if all(pattern in name for pattern in patterns):
                p.requires_grad_(flag)

    return change


def by_type(kind):
    def change(model):
        for name, module in model.named_modules():
            if name.startswith("model.layers.4.") and kind in type(module).__name__:
                module.requires_grad_(True)

    return change


# What a script does to a model of which layers 1 and 2 train.
CHANGES = {
    "a layer": by_name("layers.4."),
    "an mlp": by_name("layers.4", "mlp"),
    "an attention": by_name("layers.4", "self_attn"),
    "all down_proj": by_name("down_proj"),
    "all o_proj": by_name("self_attn.o_proj.weight"),
    "all _proj of a layer": by_name("layers.3.", "_proj"),
    "all layernorms": by_name("layernorm"),
    "all norms": by_name("norm"),
    "q_norm": by_name("q_norm"),
    "all biases": by_name("bias"),
    "no mlp": by_name("mlp", flag=False),
    "no attention of a layer": by_name("layers.1.self_attn", flag=False),
    "no norm": by_name("norm", flag=False),
    "linear layers": by_type("Linear"),
    "norms by type": by_type("RMSNorm"),
    "the mlp's module": lambda m: m.model.layers[4].mlp.requires_grad_(True),
    "a norm's module": lambda m: m.model.layers[0].input_layernorm.requires_grad_(True),
    "a submodule": lambda m: m.get_submodule("model.layers.3.self_attn").requires_grad_(True),
    "a parameter": lambda m: m.get_parameter(
        "model.layers.5.mlp.down_proj.weight"
    ).requires_grad_(True),
    "an attribute": lambda m: setattr(
        m.model.layers[2].self_attn.o_proj.weight, "requires_grad", False
    ),
    "a layer's last two": lambda m: [
        p.requires_grad_(True) for p in list(m.model.layers[0].parameters())[-2:]
    ],
    "an mlp's last": lambda m: list(m.model.layers[0].mlp.parameters())[-1].requires_grad_(True),
    "values": lambda m: m.get_parameter("model.layers.2.mlp.down_proj.weight").data.mul_(0.5),
}  # fmt: skip


def after_training(cls, kind, folder, change, when):
    model = select(tiny_model(kind), [1, 2])
    if when == "before":
        change(model)
    trainer = cls(
        model, arguments(folder, max_steps=2, learning_rate=0.05, optim="sgd"),
        train_dataset=sentences(), data_collator=pad,
    )  # fmt: skip
    if when == "after":
        change(model)
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_by_name_is_the_stock_trainers(what, tmp_path):
    kind = "qwen2" if what == "all biases" else "qwen3"
    untouched = tiny_model(kind).state_dict()

    def run(cls, when):
        after = after_training(cls, kind, tmp_path, CHANGES[what], when)
        return after, {n for n, t in after.items() if not torch.equal(t, untouched[n])}

    stock, changed = run(Trainer, "after")
    assert changed
    for when in ("before", "after"):
        ours, which = run(XPlusTrainer, when)
        assert which == changed, when
        for name, value in stock.items():
            assert (ours[name] - value).abs().max() <= 2e-5, (when, name)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_weight_decay_spares_the_tensors_that_trainer_spares(kind, optim, tmp_path):
    def decays(trainer):
        found = {}
        for group in trainer.create_optimizer().param_groups:
            held = {id(p) for p in group["params"]}
            packed = getattr(trainer, "_unpacked", None)
            whole = {} if packed is None else packed.packed()
            held |= {id(whole[i]) for i in held if i in whole}
            mine = [p for p in trainer.model.parameters() if id(p) in held]
            if isinstance(trainer, XPlusTrainer):
                names = named_tensors(trainer.model, mine)
            else:
                names = [n for n, p in trainer.model.named_parameters() if id(p) in held]
            found |= dict.fromkeys(names, group["weight_decay"])
        return found

    made = [
        decays(cls(tiny_model(kind), arguments(tmp_path, optim=optim)))
        for cls in (Trainer, XPlusTrainer)
    ]
    assert made[0] == made[1]
    assert made[0]["model.layers.0.mlp.down_proj.weight"] == 0.1
    assert made[0]["model.layers.0.input_layernorm.weight"] == 0


def test_what_is_packed_has_no_module_of_its_own():
    model = prepare_model(tiny_model(), [1])
    layer = model.model.layers[3]
    said = "q_proj, k_proj, v_proj are one packed weight in a prepared model, qkv_proj"
    for name in ("q_proj", "k_proj", "v_proj"):
        with pytest.raises(AttributeError, match=f"^{name}: {said}: they train together"):
            getattr(layer.self_attn, name)
    with pytest.raises(AttributeError, match="^up_proj: gate_proj, up_proj are one .*gate_up_proj"):
        _ = layer.mlp.up_proj
    with pytest.raises(AttributeError, match="'Parts' object has no attribute 'gates'"):
        _ = layer.mlp.gates
    assert not hasattr(layer.self_attn, "q_proj")
    with pytest.raises(UserError, match="^self_attn and mlp of a prepared model hold the weights"):
        layer.mlp(torch.zeros(1, 3, 96))


def test_modules_that_are_not_packed_compute_as_ever():
    stock, ours = tiny_model(), prepare_model(tiny_model(), [1])
    g = torch.Generator().manual_seed(0)
    for name, size in (("input_layernorm", 96), ("mlp.down_proj", 160), ("self_attn.o_proj", 192)):
        x = torch.randn(2, size, generator=g)
        ours_y, stock_y = (m.model.layers[2].get_submodule(name)(x) for m in (ours, stock))
        assert torch.equal(ours_y, stock_y)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_a_layer_says_what_trains(kind):
    model = prepare_model(tiny_model(kind), [1])
    layers = model.model.layers
    layers[2].mlp.requires_grad_(True)
    assert [layer.extra_repr() for layer in layers[:3]] == [
        "layer 0, frozen", "layer 1, trains",
        "layer 2, trains mlp.gate_up_proj.weight, mlp.down_proj.weight",
    ]  # fmt: skip


# --- what was taken from the model before it was prepared


def test_parameters_that_were_taken_before_count_or_are_refused():
    """A callback that unfreezes by a list that it made of the stock model."""
    model = select(tiny_model(), [1])
    taken = [dict(layer.named_parameters()) for layer in model.model.layers]
    prepare_model(model)
    for name in ("mlp.down_proj.weight", "self_attn.q_norm.weight", "input_layernorm.weight"):
        taken[4][name].requires_grad_(True)
    model(**packed_batch([9, 5])).loss.backward()
    assert {n for n in trained_tensors(model) if "layers.4" in n} == {
        f"model.layers.4.{name}" for name, p in taken[4].items() if p.grad is not None
    }
    taken[4]["mlp.gate_proj.weight"].requires_grad_(True)
    said = "^layer 4: mlp.gate_proj.weight: a parameter that was taken from the model before .*True"
    with pytest.raises(UserError, match=said):
        model(**packed_batch([9, 5]))
    taken[4]["mlp.gate_proj.weight"].requires_grad_(False)
    model(**packed_batch([9, 5]))
    taken[1]["self_attn.k_proj.weight"].requires_grad_(False)
    with pytest.raises(UserError, match="^layer 1: self_attn.k_proj.weight: .*requires_grad=False"):
        model(**packed_batch([9, 5]))


def test_parameters_that_were_taken_before_show_the_weights(tmp_path):
    model = select(tiny_model(), [1])
    taken = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in taken.items()}
    trainer = train(XPlusTrainer, model, tmp_path, max_steps=2)
    now = trainer.model.state_dict()
    for name, p in taken.items():
        assert torch.equal(p, now[name]), name
        assert torch.equal(p, before[name]) == (".layers.1." not in name)


@pytest.mark.parametrize("packed", [True, False])
def test_a_hook_on_a_gradient_runs_or_is_refused(packed):
    model, seen = select(tiny_model(), [1]), []
    mlp = model.model.layers[1].mlp
    linear = mlp.up_proj if packed else mlp.down_proj
    linear.weight.register_hook(lambda g: seen.append(g.shape))
    if packed:
        with pytest.raises(UserError, match="^layer 1: mlp.up_proj.weight: has a hook on its grad"):
            prepare_model(model)
        return
    prepare_model(model)(**packed_batch([9, 5])).loss.backward()
    assert seen == [(96, 160)]


def test_a_model_that_is_refused_is_as_it_was():
    model = tiny_model()
    model.model.layers[4].self_attn.k_proj.weight.requires_grad_(False)
    with pytest.raises(UserError, match="^layer 4: .*k_proj.weight is frozen"):
        prepare_model(model)
    assert not any(isinstance(module, Block) for module in model.modules())
    assert model(**packed_batch([9])).logits is not None


# --- copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved(m),
    "to": lambda m: copy.deepcopy(m).to(torch.float64).to(torch.float32),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_prepared_model(how):
    model = prepare_model(tiny_model(), [2])
    taken = [p for p in model.parameters() if p.requires_grad]
    twin = prepare_model(COPIES[how](model))
    assert [n for n, p in twin.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    with torch.no_grad():
        model.model.layers[0].mlp.gate_up_proj.weight.zero_()  # the copy has its own
    fresh = prepare_model(tiny_model(), [2])
    batch = packed_batch([7, 12])
    loss, want = twin(**batch).loss, fresh(**batch).loss
    assert loss.item() == want.item()
    loss.backward()
    assert all(p.grad is None for p in taken)
    grads = {n: p.grad is not None for n, p in twin.named_parameters()}
    assert {n for n, has in grads.items() if has} == {
        n for n, p in twin.named_parameters() if p.requires_grad
    }
    assert isinstance(twin.model.layers[2].mlp.down_proj, nn.Linear)
