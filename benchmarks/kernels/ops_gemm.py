"""The loss head, attention and AdamW: the ops whose limit is a GEMM, or the optimizer's bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import (
    Case,
    Inputs,
    Maker,
    Outputs,
    Provider,
    Size,
    by_autograd,
    eager_and_compiled,
)

BOUND = 0.01  # as of the ops on rows
TRANSLATION = (16, 160)  # tokens of a sequence in a pack of translations: drawn evenly between


def linear_cross_entropy(size: Size, T: int, way: str) -> Case:
    """Frozen head, all T rows supervised. full: the loss and dX, which ours makes together."""
    from xplus_kernels import linear_cross_entropy as ours
    from xplus_kernels.linear_cross_entropy import LOGITS_BYTES, row_chunks

    def make(m: Maker) -> Inputs:
        return {
            "x": m.randn(T, size.H), "weight": m.randn(size.V, size.H, scale=size.H**-0.5),
            "target": m.ints(size.V, T), "one": torch.ones((), device=m.device), "leaves": ("x",),
        }  # fmt: skip

    def hf(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(x, weight).float()
        return torch.nn.functional.cross_entropy(logits, target)

    def fused(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        function = torch.nn.functional.linear_cross_entropy
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # in chunks, where it can
        return function(x, weight, target, **({"options": options()} if options else {}))

    def torch_own(i: Inputs) -> Callable[[], Outputs]:
        if not hasattr(torch.nn.functional, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return by_autograd(way, fused, take, ("one",))(i)

    def liger(i: Inputs) -> Callable[[], Outputs]:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            fused_linear_cross_entropy_forward as forward,
        )

        x = i["x"].detach().requires_grad_(way == "full")

        def run() -> Outputs:
            with torch.no_grad():  # as in its autograd function
                out = forward(x, i["weight"], i["target"], reduction="mean")
            return (out[0], out[4]) if way == "full" else (out[0],)

        return run

    def ours_bind(i: Inputs) -> Callable[[], Outputs]:
        def run() -> Outputs:
            loss, dx, _ = ours(
                i["x"], i["weight"], i["target"], divisor=float(T), need_dx=way == "full"
            )
            return (loss,) if dx is None else (loss, dx)

        return run

    def gemms(i: Inputs) -> Callable[[], Outputs]:
        chunks = row_chunks(T, size.V, 2, LOGITS_BYTES)
        rows = max(b - a for a, b in chunks)

        def run() -> Outputs:
            logits, dx = i["x"].new_empty(rows, size.V), torch.empty_like(i["x"])
            for a, b in chunks:
                part = torch.mm(i["x"][a:b], i["weight"].T, out=logits[: b - a])
                if way == "full":
                    torch.mm(part, i["weight"], out=dx[a:b])
            return (dx,)

        return run

    def take(i: Inputs) -> Inputs:
        return {name: i[name] for name in ("x", "weight", "target")}

    def truth(i: Inputs, rows: Tensor) -> Outputs:
        weight, total = i["weight"].float(), torch.zeros((), device=rows.device)
        for a in range(0, T, 1024):
            logits = i["x"][a : a + 1024].float() @ weight.T
            total += torch.nn.functional.cross_entropy(
                logits, i["target"][a : a + 1024], reduction="sum"
            )
        if way == "forward":
            return (total / T,)
        grad = (i["x"][rows].float() @ weight.T).softmax(-1)
        grad[torch.arange(len(rows), device=rows.device), i["target"][rows]] -= 1
        return total / T, grad / T @ weight

    return Case(
        "linear_cross_entropy", way, size.name, T, make,
        {
            "ours": Provider(ours_bind),
            **eager_and_compiled(way, hf, take, ("one",)),
            "Liger": Provider(liger, cuda_only=True),
            "F.linear_cross_entropy": Provider(torch_own),
            "bare GEMMs": Provider(gemms, gated=False),
        },
        truth, "bare GEMMs", T, BOUND,
        flops=(4 if way == "full" else 2) * T * size.V * size.H,
    )  # fmt: skip


def _lengths(pack: str, size: Size, T: int) -> list[int]:
    if pack == "full":
        return [size.copies] * (T // size.copies) + ([T % size.copies] if T % size.copies else [])
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < T:
        low, high = TRANSLATION
        drawn = int(torch.randint(low, high, (), generator=generator))
        lengths.append(min(drawn, T - sum(lengths)))
    return lengths


def _attention(pack: str) -> Callable[[Size, int, str], Case]:
    def case(size: Size, T: int, way: str) -> Case:
        """ours: what a block of our model calls for such a pack; varlen: the flash kernels that are
        there; eager: PyTorch's scaled_dot_product_attention, a sequence at a time."""
        import xplus_kernels as ops

        lengths = _lengths(pack, size, T)
        known: dict[str, Any] = {"max_seqlen": max(lengths), "scale": size.D**-0.5}
        last = T - lengths[-1]

        def make(m: Maker) -> Inputs:
            bounds = torch.tensor([0, *lengths], device=m.device).cumsum(0).int()
            q, k, v, dout = (m.randn(T, n, size.D) for n in (size.N, size.K, size.K, size.N))
            return {
                "q": q, "k": k, "v": v, "dout": dout, "cu": bounds, "leaves": ("q", "k", "v")
            }  # fmt: skip

        def bind_of(short: bool) -> Callable[[Inputs], Callable[[], Outputs]]:
            def bind(i: Inputs) -> Callable[[], Outputs]:
                q, k, v, dout, cu = (i[name] for name in ("q", "k", "v", "dout", "cu"))
                if short:
                    sees = ops.sees_causally(cu, cu, T, T)
                    options: tuple[Any, dict[str, Any]] = (sees, {"scale": known["scale"]})
                    run, run_back = ops.short_attention, ops.short_attention_backward
                else:
                    options = (cu, known)
                    run, run_back = ops.varlen_attention, ops.varlen_attention_backward
                of, more = options

                def back(out: Tensor, lse: Tensor) -> Outputs:
                    return run_back(dout, q, k, v, out, lse, of, **more)

                def full() -> Outputs:
                    out, lse = run(q, k, v, of, **more)
                    return out, *back(out, lse)

                if way == "forward":
                    return lambda: run(q, k, v, of, **more)[:1]
                if way == "full":
                    return full
                saved = run(q, k, v, of, **more)
                return lambda: back(*saved)

            return bind

        mean = sum(n * n for n in lengths) / T
        short = ops.wants_sees(torch.device("cuda"), mean)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = [
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in one), is_causal=True, enable_gqa=True
                )[0].transpose(0, 1)
                for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
            ]
            return torch.cat(parts)

        def take(i: Inputs) -> Inputs:
            return {name: i[name] for name in ("q", "k", "v")}

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """One sequence [t, heads, D] in fp32, a key/value head at a time."""
            t, group, outs = len(q), size.N // size.K, []
            future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
            for h in range(size.K):
                mine = q[:, h * group : (h + 1) * group].transpose(0, 1)  # [G, t, D]
                s = (mine @ k[:, h].T * known["scale"]).masked_fill(future, -torch.inf)
                outs.append(s.softmax(-1) @ v[:, h])
            return torch.cat(outs).transpose(0, 1)

        def truth(i: Inputs, rows: Tensor) -> Outputs:
            few: Inputs = {name: i[name][rows].float() for name in ("q", "k", "v", "dout")}
            return by_autograd(way, plain, take, ("dout",))({**few, "leaves": i["leaves"]})()

        pairs = sum(n * (n + 1) // 2 for n in lengths)
        products = {"forward": 2, "backward": 5, "full": 7}[way]
        # one element of dk adds up thousands of rounded terms: of PyTorch's own one passed 8 bounds
        element = 8 if way == "forward" or short else 16
        return Case(
            f"varlen_attention {pack}", way, size.name, T, make,
            {
                "ours": Provider(bind_of(short)),
                **({"varlen": Provider(bind_of(False))} if short else {}),
                "eager": Provider(by_autograd(way, sdpa, take, ("dout",))),
            },
            truth, "bf16_flops", T, BOUND, flops=products * 2 * size.N * size.D * pairs,
            sample=(last, T), element=element,
        )  # fmt: skip

    return case


attention_full, attention_translation = _attention("full"), _attention("translation")

ADAM: dict[str, Any] = {
    "step": 1000, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01
}  # fmt: skip
# lr: steps as large as the parameters, else the gate would not see them in bf16
ADAM_BOUND_8BIT = 0.06  # the maps' cells are a few percent wide


def _adamw(size: Size, bits: int) -> Case:
    """One weight of gate_up's shape. eager: the states in fp32 by PyTorch's fused AdamW on the
    master, then the copy to bf16; 8-bit by bitsandbytes, which rounds to nearest, as it comes."""
    from xplus_kernels import adamw_update as ours
    from xplus_kernels.blockwise import (
        QUANTUM,
        dequantize_blockwise,
        dynamic_map,
        quantize_blockwise,
    )

    shape = size.linears["gate_up"]
    states = ("exp_avg", "exp_avg_sq")

    def make(m: Maker) -> Inputs:
        wide = m.randn(*shape, dtype=torch.float32, scale=0.02)
        exp_avg = m.randn(*shape, dtype=torch.float32, scale=1e-3)
        exp_avg_sq = m.randn(*shape, dtype=torch.float32, scale=1e-3).square_().add_(1e-6)
        i: Inputs = {"param": wide.bfloat16(), "grad": m.randn(*shape, scale=1e-3)}
        if bits == 32:
            return {**i, "master": wide, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            parts = [quantize_blockwise(p, signed=name == "exp_avg") for p in x.chunk(16)]
            i[name] = torch.cat([codes for codes, _ in parts])
            i[f"{name}_absmax"] = torch.cat([absmax for _, absmax in parts])
        return i

    def outputs(i: Inputs) -> Outputs:
        return [i[name] for name in ("param", *states, *extra)]

    def ours_bind(i: Inputs) -> Callable[[], Outputs]:
        given = {k: i[k] for k in extra}

        def run() -> Outputs:
            ours(
                i["param"], i["grad"], i["exp_avg"], i["exp_avg_sq"], **ADAM, **given,
                seed=None if bits == 32 else 1,
            )  # fmt: skip
            return outputs(i)

        return run

    def torch_fused(i: Inputs) -> Callable[[], Outputs]:
        master = i["master"]
        options: dict[str, Any] = {
            "lr": ADAM["lr"], "betas": (ADAM["beta1"], ADAM["beta2"]), "eps": ADAM["eps"],
            "weight_decay": ADAM["weight_decay"], "fused": master.is_cuda,
        }  # fmt: skip
        optimizer = torch.optim.AdamW([master], **options)
        step = torch.tensor(ADAM["step"] - 1.0, device=master.device if master.is_cuda else None)
        optimizer.state[master] = {"step": step, **{name: i[name] for name in states}}

        def run() -> Outputs:
            master.grad = i["grad"].float()
            optimizer.step()
            i["param"].copy_(master)
            master.grad = None
            return outputs(i)

        return run

    def bitsandbytes(i: Inputs) -> Callable[[], Outputs]:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise as update

        of_m, of_v = (dynamic_map(signed=s, device=i["param"].device) for s in (True, False))

        def run() -> Outputs:
            update(
                "adam", i["grad"], i["param"], i["exp_avg"], i["exp_avg_sq"], ADAM["beta1"],
                ADAM["beta2"], 0.0, 0.0, ADAM["eps"], ADAM["step"], ADAM["lr"], of_m, of_v,
                i["exp_avg_absmax"], i["exp_avg_sq_absmax"], ADAM["weight_decay"],
            )  # fmt: skip
            return outputs(i)

        return run

    def wide_states(i: Outputs | Inputs, rows: Tensor) -> list[Tensor]:
        """Both states of these rows in fp32; i holds them in `outputs`' order, or by name."""
        if not isinstance(i, dict):
            i = dict(zip(("param", *states, *extra), i, strict=True))
        if bits == 32:
            return [i[name][rows] for name in states]
        made = []
        for name in states:
            absmax = i[f"{name}_absmax"].view(shape[0], -1)[rows]  # a row is whole blocks
            codes = i[name][rows]
            made.append(dequantize_blockwise(codes, absmax.reshape(-1), signed=name == "exp_avg"))
        return made

    def view(out: Outputs, rows: Tensor) -> Outputs:
        return [out[0][rows], *wide_states(out, rows), *([out[3][rows]] if bits == 32 else [])]

    def truth(i: Inputs, rows: Tensor) -> Outputs:
        p, g = i["master" if bits == 32 else "param"][rows].float(), i["grad"][rows].float()
        m, v = wide_states(i, rows)
        m = m + (1 - ADAM["beta1"]) * (g - m)
        v = v + (1 - ADAM["beta2"]) * (g * g - v)
        mean = m / (1 - ADAM["beta1"] ** ADAM["step"])
        root = (v / (1 - ADAM["beta2"] ** ADAM["step"])).sqrt() + ADAM["eps"]
        p = p * (1 - ADAM["lr"] * ADAM["weight_decay"]) - ADAM["lr"] * mean / root
        return [p, m, v, *([p] if bits == 32 else [])]

    n = shape[0] * shape[1]
    assert shape[1] % QUANTUM == 0
    extra = ("master",) if bits == 32 else ("exp_avg_absmax", "exp_avg_sq_absmax")
    peer = {"eager": Provider(torch_fused, mutates=True)}
    if bits == 8:
        peer = {"bitsandbytes": Provider(bitsandbytes, cuda_only=True, mutates=True)}
    return Case(
        f"adamw_update {bits}-bit", "full", size.name, None, make,
        {"ours": Provider(ours_bind, mutates=True), **peer}, truth, "copy_bytes", shape[0],
        BOUND if bits == 32 else ADAM_BOUND_8BIT,
        bytes=28 * n if bits == 32 else 10 * n + 16 * n // QUANTUM, view=view,
    )  # fmt: skip


def adamw_32bit(size: Size, T: int, way: str) -> Case:
    return _adamw(size, 32)


def adamw_8bit(size: Size, T: int, way: str) -> Case:
    return _adamw(size, 8)
