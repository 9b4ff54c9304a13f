"""Loading into a layout: formats, streams and places change where weights lie, not what they do."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

import xplus_kernels as ops
from tests.tiny import SELECTIONS, gradients, packed_batch, padded_batch, tiny_model
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles, read_header
from xplus_fast.model.families import HELD
from xplus_fast.model.frozen import MATRICES, Resident, Stream, Streamed, tensors_of
from xplus_fast.model.layout import POLICIES, LayerLayout, Layout
from xplus_fast.model.load import Weights, arrange, load_model
from xplus_fast.model.prepare import load_tensors, prepare_model, trained_tensors
from xplus_fast.training.checkpoints import write_checkpoint

CPU = torch.device("cpu")
LENGTHS = [21, 1, 40, 2, 9]
SIZES = dict(hidden_size=96, intermediate_size=160, num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny untied Qwen3 on disk, in several shards."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**SIZES, tie_word_embeddings=False).save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def layout(trained, *, n=6, format="bf16", placement="device", activations="keep", **rest):
    layers = tuple(LayerLayout(i in trained, format, placement, activations) for i in range(n))
    return Layout(layers, **rest)


def load(folder, wanted, dtype=torch.float32):
    config = AutoConfig.from_pretrained(folder)
    weights = Weights(CheckpointFiles.open(folder))
    return load_model(weights, config, wanted, dtype=dtype, device=CPU)


def results(model, batch=None):
    model.zero_grad()
    loss = model(**(batch or packed_batch(LENGTHS))).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(a, b):
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and a[1]
    assert all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def dequantized(weight):
    out = torch.empty(weight.shape)
    if isinstance(weight, ops.Fp8Weight):
        return ops.dequantize_fp8(weight.rows, out=out)
    if isinstance(weight, ops.Int8Weight):
        return ops.dequantize_int8(weight, out=out)
    return ops.dequantize_nf4(weight, out=out)


def stock(folder, layers):
    from transformers import AutoModelForCausalLM

    return prepare_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), layers)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_plain_layout_is_the_stock_model(folder, selection):
    layers = SELECTIONS[selection]
    model, theirs = load(folder, layout(layers)), stock(folder, layers)
    assert_same(results(model), results(theirs))
    assert not model.training
    ids = packed_batch([7])["input_ids"]
    made = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, theirs)]
    assert torch.equal(*made)
    state = theirs.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_tied_and_biased_models_load(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    assert_same(results(load(tmp_path, layout([1, 5]))), results(stock(tmp_path, [1, 5])))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_streamed_layers_compute_what_resident_ones_do(folder, selection, policy):
    layers = SELECTIONS[selection]
    there = results(load(folder, layout(layers)))
    model = load(folder, layout(layers, placement="host", activations=policy))
    assert_same(results(model), there)
    assert_same(results(model), there)  # again, with what the buffers hold now
    names = {name for name, _ in model.model.layers[2].named_parameters()}
    assert bool(names & {HELD[name] for name in MATRICES}) == (2 in layers)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])  # without and with biases
@pytest.mark.parametrize("form", ["bf16", "int8", "fp8", "nf4"])
def test_where_things_lie_changes_no_bit_in_bf16(kind, form, tmp_path):
    """A sum that is rounded once more in one place than in another shows in bf16."""
    sizes = dict(hidden_size=128, num_attention_heads=4, intermediate_size=192)
    tiny_model(kind, **sizes, tie_word_embeddings=False).save_pretrained(tmp_path)
    made = {}
    for placement in ("device", "host"):
        for policy in POLICIES:
            wanted = layout(
                [2, 3], format=form, placement=placement, activations=policy, embedding=placement
            )
            made[placement, policy] = results(load(tmp_path, wanted, torch.bfloat16))
    for found in made.values():
        assert_same(found, made["device", "keep"])
    if form == "bf16":  # nor does it whether the layers beside them train
        trained = load(tmp_path, layout(range(6)), torch.bfloat16)
        loss, grads = results(trained)
        assert torch.equal(loss, made["device", "keep"][0])
        assert all(torch.equal(grads[n], g) for n, g in made["device", "keep"][1].items())


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
def test_a_streamed_format_computes_what_a_resident_one_does(folder, form):
    resident = load(folder, layout([2, 3], format=form))
    streamed = load(folder, layout([2, 3], format=form, placement="host"))
    assert_same(results(streamed), results(resident))
    ids = packed_batch([7])["input_ids"]
    made = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (resident, streamed)]
    assert torch.equal(*made)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_layers_compute_with_what_the_codes_say(folder, form):
    model = load(folder, layout([2], format=form))
    plain = load(folder, layout([2]))
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        if block.frozen is not None:
            for name, weight in block.frozen.weights.items():
                other.weight(name).data.copy_(dequantized(weight))
    mine, theirs = results(model), results(plain)
    assert_same(mine, theirs)
    assert abs(mine[0] - results(stock(folder, [2]))[0]) > 1e-4  # it did quantize


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fp8_layers_come_near_the_unquantized(folder, selection):
    layers = SELECTIONS[selection]
    mine, true = results(load(folder, layout(layers, format="fp8"))), results(stock(folder, layers))
    if len(layers) == 6:
        return assert_same(mine, true)  # nothing is frozen
    assert 0 < abs(mine[0] - true[0]) < 0.02 * true[0]
    a, b = (torch.cat([g.flatten() for g in r[1].values()]) for r in (mine, true))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_policies_are_bit_identical_in_a_format(folder):
    first = results(load(folder, layout([1, 4], format="fp8")))
    for policy in POLICIES[1:]:
        wanted = layout([1, 4], format="fp8", activations=policy)
        assert_same(results(load(folder, wanted)), first)


def test_the_stream_looks_one_layer_ahead(folder, monkeypatch):
    brought = []
    bring = Stream._bring
    monkeypatch.setattr(
        Stream, "_bring", lambda s, index, slot: (brought.append(index), bring(s, index, slot))
    )
    model = load(folder, layout([1], placement="host"))  # 0, 2, 3, 4, 5 stream; lowest is 1
    assert brought == []
    results(model)
    assert brought == [0, 2, 3, 4, 5, 3, 2, 0]  # 5 and 4 are there when the backward begins
    brought.clear()
    results(model)
    assert brought == [3, 4, 5, 3, 2, 0]
    stream = model.model.layers[0].frozen.stream
    assert len(stream._slots) == 2
    assert {len(s.buffer) for s in stream._slots} == {len(stream._host[0][0])}


def test_what_streams_is_never_written(folder):
    model = load(folder, layout([3], format="fp8", placement="host"))
    stream = model.model.layers[0].frozen.stream
    before = {i: flat.clone() for i, (flat, _) in stream._host.items()}
    results(model)
    assert all(torch.equal(flat, before[i]) for i, (flat, _) in stream._host.items())


def test_the_embedding_on_the_host(folder):
    model = load(folder, layout([2], embedding="host"))
    assert model.model.embed_tokens.weight is None
    there = results(load(folder, layout([2])))
    assert_same(results(model), there)
    batch = padded_batch(packed_batch(LENGTHS), LENGTHS)
    assert results(model, batch)[0] == results(stock(folder, [2]), batch)[0]
    ids = packed_batch([7])["input_ids"]
    made = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, stock(folder, []))]
    assert torch.equal(*made)
    arrange(
        model, layout([2], also=("embedding",)), Weights(CheckpointFiles.open(folder)),
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    assert_same(results(model), results(load(folder, layout([2], also=("embedding",)))))


def test_a_head_in_fp8(folder):
    model = load(folder, layout([2], head="fp8"))
    plain = load(folder, layout([2]))
    rows = model.lm_head.rows
    plain.lm_head.weight.data.copy_(rows.data.float() * rows.scale[:, None])
    mine, theirs = results(model), results(plain)
    assert torch.allclose(mine[0], theirs[0], rtol=1e-6)
    assert all(torch.allclose(mine[1][n], g, rtol=1e-4, atol=1e-6) for n, g in theirs[1].items())
    ids = packed_batch([7])["input_ids"]
    made = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*made)


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_between_stages_layers_change_their_part(folder, form, placement, tmp_path):
    """What stage 1 changed is frozen as changed; what stage 2 trains is as the base has it."""
    options = dict(format=form, placement=placement)
    weights = Weights(CheckpointFiles.open(folder))
    model = load(folder, layout([0, 1], **options))
    with torch.no_grad():
        for p in model.model.layers[:2].parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    changed = {n: t.clone() for n, t in trained_tensors(model).items()}
    write_checkpoint(tmp_path / "final", {"trained": changed}, {"selection": {}})
    weights.cover(read_header(tmp_path / "final" / "trained.safetensors"))
    arrange(model, layout([1, 4, 5], **options), weights, dtype=torch.float32, device=CPU)

    after = stock(folder, [1, 4, 5])
    load_tensors(after, changed)
    for i, (block, other) in enumerate(zip(model.model.layers, after.model.layers, strict=True)):
        trains = i in (1, 4, 5)
        assert all(p.requires_grad == trains for p in block.parameters())
        for name in MATRICES:
            right = other.weight(name).data
            if trains or (form, placement) == ("bf16", "device"):
                assert torch.equal(block.weight(name), right)
            else:
                store = Streamed if placement == "host" else Resident
                assert isinstance(block.frozen, store) and block.weight(name) is None
                held = block.frozen.weights[name]
                wanted = {
                    "bf16": ops.Bf16Weight, "int8": ops.quantize_int8, "nf4": ops.quantize_nf4,
                    "fp8": lambda w: ops.Fp8Weight(ops.quantize_fp8(w)),
                }[form](right)  # fmt: skip
                pairs = zip(tensors_of(held), tensors_of(wanted), strict=True)
                assert all(torch.equal(a.float(), b.float()) for a, b in pairs)
    # and back: a layer that was quantized in between is read as the last stage left it
    arrange(model, layout([0, 1], **options), weights, dtype=torch.float32, device=CPU)
    assert all(torch.equal(t, changed[n]) for n, t in trained_tensors(model).items())
    results(model)


def test_a_quantized_model_has_no_state_dict(folder):
    model = load(folder, layout([2], format="fp8"))
    with pytest.raises(UserError, match="layer 0: its frozen matrices are not here as they were"):
        model.state_dict()


def test_layouts_that_cannot_be(folder, tmp_path, monkeypatch):
    tiny_model("qwen3-tied", **SIZES).save_pretrained(tmp_path)
    for wanted, why in (
        (layout([2], embedding="host"), "tied to the head"),
        (layout([2], head="fp8"), "tied to the embedding"),
    ):
        with pytest.raises(UserError, match=why):
            load(tmp_path, wanted)
    for wanted, why in (
        (layout([2], embedding="host", also=("embedding",)), "embedding on the host: it trains"),
        (layout([2], head="fp8", also=("head",)), "head in fp8: it trains"),
    ):
        with pytest.raises(UserError, match=why):
            load(folder, wanted)
    odd = tmp_path / "odd"
    tiny_model(**{**SIZES, "hidden_size": 100}).save_pretrained(odd)
    with pytest.raises(UserError, match="format fp8: .*multiples of 16"):
        load(odd, layout([2], format="fp8"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="format nf4: .*pip install bitsandbytes"):
        load(folder, layout([2], format="nf4"))


PEAK = """
import resource, sys, torch
from transformers import AutoConfig
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.layout import LayerLayout, Layout
from xplus_fast.model.load import Weights, load_model
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
folder, form = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
load = lambda n: load_model(
    Weights(CheckpointFiles.open(folder)), config,
    Layout((LayerLayout(True),) + (LayerLayout(False, form),) * n, head="fp8"),
    dtype=torch.bfloat16, device=torch.device("cpu"))
torch.ops.aten.mm(torch.ones(2, 2), torch.ones(2, 2))
if form == "nf4":
    import bitsandbytes
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
model = load(7)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/status")
@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_loading_holds_what_stays_and_two_layers(form, tmp_path):
    sizes = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    tiny_model(**sizes).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60MB")
    # A real model's matrices are beyond 32 MiB, so malloc gives each one back when it is freed.
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), form],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    layer = 1024 * (16 * 64) + 1024 * 512 + 3 * 1024 * 4096  # weights
    stays = 2 * layer + 7 * layer * {"bf16": 2, "int8": 1.0625, "fp8": 1}[form]
    assert 0.9 * stays < int(ran.stdout) < stays + 2 * (2 * layer) + (4 << 20)  # what Python takes
