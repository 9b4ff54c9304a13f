"""Every attention backend that this machine has, in bf16 and fp16, against the reference.

Needs a GPU; run by `make test-gpu`.
"""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.tiny import difference

# the modules: in the package the first's name is the function
ATTENTION = sys.modules["xplus_kernels.varlen_attention"]
EVEN = sys.modules["xplus_kernels.even_attention"]
CUDA = torch.cuda.is_available() and not common.IR
MAJOR = torch.cuda.get_device_capability()[0] if CUDA else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(CUDA and MAJOR < 8, reason="flash kernels need capability 8.0"),
]
BACKENDS = ("PyTorch flash", *ATTENTION.LIBRARIES)
HEADS = [(16, 8), (32, 8), (40, 8)]  # 0.6B, 8B, 14B
D, SCALE = 128, 128**-0.5
PACKS = {
    "mixed": (1, 300, 129, 1, 2048, 64),
    "one": (1537,),
    "single tokens": (1, 1, 1),
    "empty between": (5, 0, 1, 0, 128),
    "a token": (1,),
    "even": (1024, 1024, 1024),  # where PyTorch's run, cuDNN's do
}


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this backend, whatever would be chosen."""
    if name == "PyTorch flash":
        if not torch.backends.cuda.is_flash_attention_available():
            pytest.skip("this build of PyTorch has no flash kernels")
    elif MAJOR not in ATTENTION.LIBRARIES[name].capabilities:
        pytest.skip(f"{name} is not for capability {MAJOR}.x")
    elif missing := ATTENTION._missing(ATTENTION.LIBRARIES[name]):
        pytest.skip(f"{name}: {missing}")
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)


def pack(lengths, heads, dtype):
    """dout, q, k, v as a block hands them over (v a view of qkv), cu_seqlens, options."""
    (n, k), t = heads, sum(lengths)
    seed = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(t, (n + 2 * k) * D, device="cuda", generator=seed).to(dtype)
    q, key, v = qkv.view(t, -1, D).split((n, k, k), 1)
    dout = torch.randn(t, n, D, device="cuda", generator=seed).to(dtype)
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return dout, q.contiguous(), key.contiguous(), v, cu, {"max_seqlen": max(lengths)}


def reference(dout, q, k, v, cu, dtype, **options):
    """out, lse, dq, dk, dv of the reference, computed in `dtype`."""
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k, v))
    out, lse = ATTENTION.varlen_attention_ref(q, k, v, cu, **options)
    rows = (dout, q, k, v, out, lse, cu)
    return out, lse, *ATTENTION.varlen_attention_backward_ref(*rows, **options)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}-{heads[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_errs_no_more_than_pytorch_in_its_dtype(name, dtype, heads, lengths, monkeypatch):
    use(name, monkeypatch)
    dout, q, k, v, cu, options = pack(lengths, heads, dtype)
    options["scale"] = SCALE
    truth = reference(dout, q, k, v, cu, torch.float64, **options)
    plain = reference(dout, q, k, v, cu, dtype, **options)
    before = [x.clone() for x in (dout, q, k, v)]
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    assert lse.shape == (heads[0], sum(lengths)) and lse.dtype == torch.float32
    rows = (dout, q, k, v, out, lse, cu)
    first = ops.varlen_attention_backward(*rows, **options)
    second = ops.varlen_attention_backward(*rows, **options)
    rounding = torch.finfo(dtype).eps
    assert difference(lse, truth[1]) < 1e-5
    names = ("out", "dq", "dk", "dv")
    for which, mine, again, theirs, true in zip(
        names, (out, *first), (out, *second), (plain[0], *plain[2:]), (truth[0], *truth[2:]),
        strict=True,
    ):  # fmt: skip
        bound = 1.1 * (theirs.double() - true).norm().item() + rounding * (1 + true.norm().item())
        for made in (mine, again):
            assert made.shape == true.shape and made.dtype == dtype, which
            assert (made.double() - true).norm().item() <= bound, which
    assert all(torch.equal(a, b) for a, b in zip(before, (dout, q, k, v), strict=True))


OTHER_KEYS = {  # queries and keys of each sequence, causal
    "tails": ((1, 0, 40, 129, 0), (1, 300, 129, 129, 7), True),
    "tails of one": ((1, 1, 0), (1, 9, 130), True),
    "cross": ((300, 0, 1, 129), (40, 7, 130, 1), False),
    "nobody asks": ((0, 0, 5), (300, 1, 40), False),
}


@pytest.mark.parametrize("pack_of", OTHER_KEYS.values(), ids=OTHER_KEYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_queries_and_keys_of_different_numbers(name, dtype, pack_of, monkeypatch):
    use(name, monkeypatch)
    lengths, lengths_k, causal = pack_of
    dout, q, _, _, cu, options = pack(lengths, (32, 8), dtype)
    _, _, k, v, cu_k, _ = pack(lengths_k, (32, 8), dtype)
    options |= {"scale": SCALE, "cu_seqlens_k": cu_k, "max_seqlen_k": max(lengths_k)}
    options["causal"] = causal
    truth = reference(dout, q, k, v, cu, torch.float64, **options)
    plain = reference(dout, q, k, v, cu, dtype, **options)
    poison = torch.full((64, *k.shape), torch.nan, device="cuda", dtype=dtype)
    del poison  # what a backward does not store is not zero by chance
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    made = ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)
    assert difference(lse, truth[1]) < 1e-5
    rounding = torch.finfo(dtype).eps
    for mine, theirs, true in zip(
        (out, *made), (plain[0], *plain[2:]), (truth[0], *truth[2:]), strict=True
    ):
        bound = 1.1 * (theirs.double() - true).norm().item() + rounding * (1 + true.norm().item())
        assert mine.shape == true.shape and mine.dtype == dtype
        assert (mine.double() - true).norm().item() <= bound
    for gradient in made[1:]:  # nobody asked these keys
        for each, count in zip(gradient.split(lengths_k), lengths, strict=True):
            assert count or not each.any()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_gradient_of_one_stored_number(name, monkeypatch):
    use(name, monkeypatch)
    dout, q, k, v, cu, options = pack((7, 130), (32, 8), torch.bfloat16)
    options["scale"] = SCALE
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    ones = torch.ones((), device="cuda", dtype=q.dtype).expand_as(dout)  # of out.sum()
    made = ops.varlen_attention_backward(ones, q, k, v, out, lse, cu, **options)
    truth = reference(ones, q, k, v, cu, torch.float64, **options)
    assert difference(made[2], truth[4]) < 2**-7


@pytest.mark.parametrize("name", BACKENDS)
def test_any_backward_takes_any_forwards_lse(name, monkeypatch):
    dout, q, k, v, cu, options = pack((7, 130), (32, 8), torch.bfloat16)
    options["scale"] = SCALE
    out, lse = ATTENTION.varlen_attention_ref(q, k, v, cu, **options)
    use(name, monkeypatch)
    made = ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)
    truth = reference(dout, q, k, v, cu, torch.float64, **options)
    for mine, true in zip(made, truth[2:], strict=True):
        assert difference(mine, true) < 2**-6


@pytest.mark.parametrize("name", BACKENDS)
def test_the_forward_and_backward_wait_for_nothing(name, monkeypatch):
    use(name, monkeypatch)
    dout, q, k, v, cu, options = pack((7, 130), (32, 8), torch.bfloat16)
    options["scale"] = SCALE
    ops.varlen_attention(q, k, v, cu, **options)  # a library may compile on its first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = ops.varlen_attention(q, k, v, cu, **options)
        ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cudnn_takes_what_is_even(monkeypatch):
    use("PyTorch flash", monkeypatch)
    _, q, k, _, cu, _ = pack((1024, 1024), (32, 8), torch.bfloat16)
    there = MAJOR in EVEN.CAPABILITIES and torch.backends.cudnn.is_available()
    assert EVEN.is_even(q, k, cu, cu, 1024) == there
    assert not EVEN.is_even(q, k, cu, cu, 1025) and not EVEN.is_even(q, k, cu, cu.clone(), 1024)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", None)  # nobody calls it
    if there:
        ops.varlen_attention(q, k, k, cu, max_seqlen=1024, scale=SCALE)


@pytest.mark.parametrize("lengths", [(2048, 700), (2048, 2048)], ids=["mixed", "even"])
def test_deterministic_gradients_repeat(lengths, monkeypatch):
    use("PyTorch flash", monkeypatch)
    dout, q, k, v, cu, options = pack(lengths, (32, 8), torch.bfloat16)
    options["scale"] = SCALE
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    rows = (dout, q, k, v, out, lse, cu)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [ops.varlen_attention_backward(*rows, **options) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_the_choice_on_this_machine_is_a_flash_backend():
    dout, q, *_ = pack((4,), (32, 8), torch.bfloat16)
    assert ATTENTION.attention_backend(q) in BACKENDS
    assert ATTENTION.attention_backend(q.float()) == "reference"
