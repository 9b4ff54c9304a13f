"""What is on a module that the engine does not call is honoured, or refused: never just not run."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.tiny import packed_batch, padded_batch, select, tiny_model
from xplus_fast import prepare_model
from xplus_fast.errors import UserError

LENGTHS = [7, 12, 5]


def batch() -> dict[str, torch.Tensor]:
    return padded_batch(packed_batch(LENGTHS), LENGTHS)


# Where -> a module of the model that the engine reads the weights of and does not call.
MODULES = {
    "model.layers.2": lambda m: m.model.layers[2],
    "model.layers.0.self_attn": lambda m: m.model.layers[0].self_attn,
    "model.layers.0.self_attn.q_proj": lambda m: m.model.layers[0].self_attn.q_proj,
    "model.layers.5.mlp.act_fn": lambda m: m.model.layers[5].mlp.act_fn,
    "model.layers.1.input_layernorm": lambda m: m.model.layers[1].input_layernorm,
    "model.norm": lambda m: m.model.norm,
    "lm_head": lambda m: m.lm_head,
}
HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *a: None),
    "before": lambda module: module.register_forward_pre_hook(lambda *a: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *a: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", MODULES)
def test_hooks_are_refused_by_name(where: str, hook: str) -> None:
    model = tiny_model()
    HOOKS[hook](MODULES[where](model))
    with pytest.raises(UserError, match=f"^{where}: has a hook"):
        prepare_model(model, [1])


BELOW = (
    "self_attn", "self_attn.qkv_proj", "self_attn.q_norm", "mlp.down_proj", "input_layernorm",
)  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("find", "where"),
    [(lambda m: m.model.layers[3], "layer 3"), (lambda m: m.model.norm, "Qwen3RMSNorm"),
     (lambda m: m.lm_head, "Linear")]
    + [(lambda m, at=at: m.get_submodule(f"model.layers.3.{at}"), f"layer 3: {at}")
       for at in BELOW],
)  # fmt: skip
def test_hooks_that_come_later_are_refused_when_it_runs(find: Any, where: str, hook: str) -> None:
    model = prepare_model(tiny_model(), [1])
    handle = HOOKS[hook](find(model))
    with pytest.raises(UserError, match=f"^{where}: has a hook"):
        model(**batch())
    handle.remove()
    model(**batch())


@pytest.mark.parametrize("prepared", [False, True])
def test_hooks_on_the_embedding_run(prepared: bool) -> None:
    """As NEFTune's, which wants [B, S, H]."""
    stock, ours = tiny_model(), tiny_model()
    seen = []

    def double(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(out.shape))
        return out * 2

    stock.model.embed_tokens.register_forward_hook(double)
    if prepared:
        prepare_model(ours, [1])
    ours.model.embed_tokens.register_forward_hook(double)
    if not prepared:
        prepare_model(ours, [1])
    assert ours(**batch()).loss.item() == pytest.approx(stock(**batch()).loss.item(), abs=2e-5)
    assert seen == [(3, 12, 96)] * 2


class Bent(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("where", ["model.layers.4.mlp.down_proj", "lm_head"])
def test_foreign_modules_are_refused(where: str) -> None:
    model = tiny_model()
    parent, _, name = where.rpartition(".")
    old = model.get_submodule(where)
    made = Bent(old.in_features, old.out_features, bias=False)
    setattr(model.get_submodule(parent), name, made)
    with pytest.raises(UserError, match=f"^{where}: a .*Bent; the engine computes what"):
        prepare_model(model, [1])


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    """As accelerate's `device_map` does it."""
    model = tiny_model()
    module = model.model.layers[1].mlp
    module.forward = lambda x: x
    with pytest.raises(UserError, match="^model.layers.1.mlp: its forward was replaced"):
        prepare_model(model, [1])


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(UserError, match="^model.embed_tokens.weight: on the device 'meta'"):
        prepare_model(model, [1])
    model = tiny_model()
    model.model.layers[2].to("meta")
    with pytest.raises(UserError, match=r"^model.layers.2.\S+: on the device 'meta'"):
        prepare_model(model, [1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_narrow_weights_are_refused(dtype: torch.dtype) -> None:
    model = select(tiny_model(), [])
    linear = model.model.layers[2].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        UserError, match=f"^model.layers.2.self_attn.o_proj.weight: stored as {name}"
    ):
        prepare_model(model)


def test_bitsandbytes_layers_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = bitsandbytes.nn.Linear4bit(96, 160, bias=False)
    with pytest.raises(UserError, match="^model.layers.1.mlp.up_proj: a bitsandbytes"):
        prepare_model(model, [0])


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def replace(model: Any, where: str, made: Any) -> None:
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, made)


DOWN = "model.layers.3.mlp.down_proj"
# what is done to a prepared model -> how the refusal goes on after "layer 3"
LATER = {
    "another module": (
        lambda m: replace(m, DOWN, Bent(160, 96, bias=False)), ": mlp.down_proj: a .*Bent; the",
    ),
    "another mlp": (
        lambda m: replace(m, "model.layers.3.mlp", tiny_model().model.layers[3].mlp),
        ": mlp.gate_up_proj.weight is not there any more",
    ),
    "no module": (
        lambda m: delattr(m.model.layers[3].self_attn, "o_proj"),
        ": self_attn.o_proj.weight is not there any more",
    ),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(
            m.get_submodule(DOWN), "weight", Twice()
        ),
        ": mlp.down_proj: a torch.nn.utils.parametrize.Parametrized",
    ),
    "pruning": (
        lambda m: prune.random_unstructured(m.get_submodule(DOWN), "weight", 0.5),
        ": mlp.down_proj: has a hook",
    ),
    "another forward": (
        lambda m: setattr(m.get_submodule(DOWN), "forward", lambda x: x),
        ": mlp.down_proj: its forward was replaced",
    ),
    "another forward of the layer": (
        lambda m: setattr(m.model.layers[3], "forward", lambda x, **_: x),
        ": its forward was replaced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_what_is_put_below_a_layer_later_is_refused_when_it_runs(what: str) -> None:
    change, said = LATER[what]
    model = prepare_model(tiny_model(), [1]).eval()
    change(model)
    with pytest.raises(UserError, match=f"^layer 3{said}"):
        model(**batch())
    if not what.endswith("of the layer"):  # the library calls that one
        with pytest.raises(UserError, match=f"^layer 3{said}"):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


# --- PEFT


def adapters(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)


@pytest.mark.parametrize("whole", [True, False])
def test_adapted_models_are_refused(whole: bool) -> None:
    config = adapters(target_modules=["q_proj", "v_proj"])
    model = tiny_model()
    if whole:
        model = pytest.importorskip("peft").get_peft_model(model, config)
        said = "^PeftModelForCausalLM: a PEFT model; merge"
    else:
        try:
            model.add_adapter(config)
        except ValueError as e:
            pytest.skip(f"transformers refuses the PEFT that is here: {e}")
        said = "^model.layers.0.self_attn.q_proj: an adapter"
    with pytest.raises(UserError, match=said):
        prepare_model(model)


def test_merged_adapters_are_weights_like_others() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), adapters(target_modules=["q_proj"]))
    merged = model.merge_and_unload()
    with torch.no_grad():
        before = merged(**batch()).loss.item()
    assert prepare_model(merged, [1])(**batch()).loss.item() == pytest.approx(before, abs=2e-5)


@pytest.mark.parametrize("name", ["down_proj", "qkv_proj"])
def test_an_adapter_below_a_layer_is_refused_when_it_runs(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(prepare_model(tiny_model(), [1]), adapters(target_modules=[name]))
    for given in (batch(), {"input_ids": torch.tensor([[5, 6, 7]])}):
        with pytest.raises(UserError, match=rf"^layer 0: \w+.{name}: an adapter \(peft"):
            model(**given)


@pytest.mark.parametrize("also", [[], ["embed_tokens"]])
def test_an_adapter_on_the_head_is_refused_when_it_runs(also: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = adapters(target_modules=["lm_head"], modules_to_save=also or None)
    model = peft.get_peft_model(prepare_model(tiny_model(), [1]), config)
    with pytest.raises(UserError, match="^Linear: an adapter"):
        model(**batch())


@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_adapters_on_the_embedding_train_as_in_stock(kind: str) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for prepared in (False, True):
        model = select(tiny_model(), [])
        if prepared:
            prepare_model(model)
        config = adapters(target_modules=["embed_tokens"])
        if kind == "tokens":
            config = peft.TrainableTokensConfig(
                token_indices=[5, 6, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
            )
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        loss = model(**batch()).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads))
    (a, stock), (b, ours) = found
    assert b == pytest.approx(a, abs=2e-5) and stock.keys() == ours.keys() and stock
    for name, grad in stock.items():
        assert (ours[name] - grad).abs().max() <= 2e-5 * max(1.0, grad.abs().max()), name


# --- what a call is given


def test_a_layer_swallows_no_unknown_argument() -> None:
    model = prepare_model(tiny_model(), [1])
    x = torch.zeros(1, 3, 96)
    positions = torch.arange(3)[None]
    with pytest.raises(TypeError, match="layer 0: unknown argument 'kv_store'"):
        model.model.layers[0](
            x, position_embeddings=model.model.rotary_emb(x, positions), kv_store=object()
        )


@pytest.mark.parametrize("by_name", [True, False])
def test_generate_is_the_stock_models(by_name: bool) -> None:
    """With a cache, whatever this version of transformers calls it."""
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 8, 7]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False}
    call = {"input_ids": ids} if by_name else {"inputs": ids}
    stock = tiny_model().eval()
    ours = prepare_model(tiny_model(), [1]).eval()
    assert torch.equal(ours.generate(**call, **given), stock.generate(**call, **given))
    out = ours.generate(**call, **given, return_dict_in_generate=True, output_logits=True)
    want = stock.generate(**call, **given, return_dict_in_generate=True, output_logits=True)
    for a, b in zip(out.logits, want.logits, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize(
    "asked",
    [{"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}, {}],
    ids=lambda a: next(iter(a), "logits"),
)
def test_what_the_engine_does_not_make_comes_the_librarys_way(asked: dict) -> None:
    stock, ours = tiny_model().eval(), prepare_model(tiny_model(), [1]).eval()
    given = {k: v for k, v in batch().items() if asked or k != "labels"}
    with torch.no_grad():
        a, b = stock(**given, **asked), ours(**given, **asked)
    if asked.get("return_dict") is False:
        assert len(a) == len(b) and (a[0] - b[0]).abs() < 2e-5 and (a[1] - b[1]).shape == a[1].shape
        return
    if asked.get("output_hidden_states"):
        assert len(a.hidden_states) == len(b.hidden_states) == 7
        kept = given["attention_mask"].bool()
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
            assert (x[kept] - y[kept]).abs().max() < 1e-4
    if not asked:
        kept = given["attention_mask"].bool()
        assert (a.logits[kept] - b.logits[kept]).abs().max() < 1e-4
    else:
        assert b.loss.item() == pytest.approx(a.loss.item(), abs=2e-5)


def test_hidden_states_are_all_or_refused() -> None:
    """The library records them with hooks on its own layers, which are gone."""
    ours, given = prepare_model(tiny_model(), [1]).eval(), {"input_ids": torch.arange(1, 5)[None]}
    assert len(ours(**given, output_hidden_states=True).hidden_states) == 7
    for more in ({"use_cache": True}, {"output_hidden_states": [1, 2]}):
        with pytest.raises(UserError, match="^output_hidden_states: a prepared model has"):
            ours(**{**given, "output_hidden_states": True, **more})
    with pytest.raises(UserError, match="^output_attentions: a prepared model does not make them"):
        ours(**given, output_attentions=True)


def test_a_model_whose_states_were_recorded_can_be_prepared() -> None:
    model = tiny_model().eval()
    given = {"input_ids": torch.arange(1, 5)[None]}
    want = model(**given, output_hidden_states=True).hidden_states
    got = prepare_model(model, [1])(**given, output_hidden_states=True).hidden_states
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(want, got, strict=True))
