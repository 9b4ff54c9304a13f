"""The whole stack on the GPU: the CPU's numbers in fp32, Hugging Face's accuracy in bf16."""

import copy
import functools

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU
from tests.tiny import (
    SELECTIONS,
    difference,
    gradients,
    packed_batch,
    select,
    stock_loss,
    tiny_model,
)
from xplus_fast.data.collate import PackCollator
from xplus_fast.model.block import KEEP
from xplus_fast.model.prepare import prepare_model
from xplus_fast.training.optimizer import AdamW

pytestmark = GPU
LENGTHS = [21, 1, 64, 2, 130]
# flash kernels want a head of at least 8; Qwen3's is 128
HEADS = dict(head_dim=128, num_attention_heads=5, num_key_value_heads=1)


def batch(device):
    return {name: t.to(device) for name, t in packed_batch(LENGTHS).items()}


@functools.cache
def stock():
    """A Qwen3 whose weights are bf16 numbers, in fp32 on the CPU."""
    return tiny_model(**HEADS).bfloat16().float()


def model(dtype, device):
    """The same in dtype, but for RoPE's frequencies, which stay fp32 as they load."""
    made = copy.deepcopy(stock())
    frequencies = made.model.rotary_emb.inv_freq.clone()
    made.to(device=device, dtype=dtype).model.rotary_emb.inv_freq = frequencies.to(device)
    return made


@functools.cache
def truth(selection):
    """Loss and gradients of stock Hugging Face in fp32 on the CPU."""
    made = select(model(torch.float32, "cpu"), SELECTIONS[selection])
    loss = stock_loss(made, batch("cpu"), LENGTHS)
    loss.backward()
    return loss.item(), gradients(made)


def trained(dtype, selection, policy="keep"):
    made = prepare_model(model(dtype, DEVICE), SELECTIONS[selection], activations=policy)
    loss = made(**batch(DEVICE)).loss
    loss.backward()
    return loss.item(), gradients(made)


@pytest.mark.parametrize("policy", KEEP)
@pytest.mark.parametrize("selection", ["bottom", "top", "all"])
def test_fp32_equals_the_cpu(selection, policy):
    loss, mine = trained(torch.float32, selection, policy)
    expected, theirs = truth(selection)
    assert loss == pytest.approx(expected, rel=5e-6)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert difference(mine[name].cpu(), gradient) <= 5e-5, name


@pytest.mark.parametrize("selection", ["bottom", "top", "all"])
def test_bf16_errs_no_more_than_hugging_face(selection):
    if common.backend.INTERPRET:
        pytest.skip("needs hardware: the interpreter's bf16 is wrong")
    expected, true = truth(selection)
    eager = select(model(torch.bfloat16, DEVICE), SELECTIONS[selection])
    total = torch.zeros((), device=DEVICE)
    count = 0
    part = batch(DEVICE)
    for x, y in zip(*(part[k][0].split(LENGTHS) for k in ("input_ids", "labels")), strict=True):
        logits = eager(input_ids=x[None], use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, y[1:], reduction="sum")
        count += int((y[1:] != -100).sum())
    (total / count).backward()
    theirs = gradients(eager)
    loss, mine = trained(torch.bfloat16, selection)
    assert abs(loss - expected) <= 1.1 * abs((total / count).item() - expected) + 2**-9 * expected
    assert mine.keys() == theirs.keys() == true.keys()
    errors = {
        name: tuple(difference(g[name].cpu(), true[name]) for g in (mine, theirs)) for name in true
    }
    ours, eagers = (sum(e[i] for e in errors.values()) / len(errors) for i in (0, 1))
    assert ours <= 1.1 * eagers + 2**-10, (ours, eagers)
    for name, (our, eager_error) in errors.items():  # one tensor: roundings that are others
        assert our <= 1.2 * eager_error + 2**-9, name


@pytest.mark.parametrize("selection", ["bottom", "top"])
@pytest.mark.parametrize("policy", [policy for policy in KEEP if policy != "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_gives_the_same_bits(dtype, policy, selection, deterministic):
    if common.backend.INTERPRET and dtype == torch.bfloat16:
        pytest.skip("needs hardware: the interpreter's bf16 is wrong")
    kept, again = (trained(dtype, selection, p) for p in ("keep", policy))
    assert kept[0] == again[0] and kept[1].keys() == again[1].keys()
    for name, gradient in kept[1].items():
        assert torch.equal(again[1][name], gradient), name


@pytest.mark.parametrize("selection", ["bottom", "top", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_lower_the_loss_and_leave_the_frozen_layers(dtype, selection):
    if common.backend.INTERPRET or common.IR:
        pytest.skip("needs hardware: minutes where kernels are interpreted")
    made = prepare_model(model(dtype, DEVICE), SELECTIONS[selection])
    frozen = {n: p.clone() for n, p in made.named_parameters() if not p.requires_grad}
    optimizer = AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    losses, inputs = [], batch(DEVICE)
    for _ in range(20):
        loss = made(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(later < first for first, later in zip(losses, losses[5:], strict=False)), losses
    assert losses[-1] < 0.8 * losses[0]
    parameters = dict(made.named_parameters())
    assert all(torch.equal(parameters[name], t) for name, t in frozen.items())


def shared_batches():
    """The same sequences with their common first tokens once, and apart."""
    g = torch.Generator().manual_seed(1)
    heads = [torch.randint(0, 320, (n,), generator=g) for n in (40, 17)]
    rows = []
    for i, n in enumerate((30, 5, 130, 64, 2)):
        ids = torch.cat((heads[i % 2], torch.tensor([i]), torch.randint(0, 320, (n,), generator=g)))
        labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - (n + 1) // 2, -100)
        rows.append({"input_ids": ids, "labels": labels})
    return [
        {
            k: v.to(DEVICE) if torch.is_tensor(v) else v
            for k, v in PackCollator(shared_prefixes=on)(rows).items()
        }
        for on in (True, False)
    ]


def shared_run(dtype, policy, one):
    made = prepare_model(model(dtype, DEVICE), SELECTIONS["joint"], activations=policy)
    loss = made(**one).loss
    loss.backward()
    return loss.item(), gradients(made)


@pytest.mark.parametrize("policy", KEEP)
def test_shared_prompts_give_what_they_give_apart(policy):
    shared, apart = shared_batches()
    assert len(shared["layout"].members) == 2
    loss, mine = shared_run(torch.float32, policy, shared)
    expected, theirs = shared_run(torch.float32, policy, apart)
    assert loss == pytest.approx(expected, rel=5e-6)
    for name, gradient in theirs.items():
        assert difference(mine[name], gradient) <= 5e-5, name


def test_shared_prompts_err_no_more_in_bf16():
    if common.backend.INTERPRET:
        pytest.skip("needs hardware: the interpreter's bf16 is wrong")
    shared, apart = shared_batches()
    _, true = shared_run(torch.float32, "keep", apart)
    (_, mine), (_, theirs) = (shared_run(torch.bfloat16, "keep", one) for one in (shared, apart))
    errors = [
        [difference(found[name].float(), gradient) for name, gradient in true.items()]
        for found in (mine, theirs)
    ]
    assert sum(errors[0]) <= 1.1 * sum(errors[1])
