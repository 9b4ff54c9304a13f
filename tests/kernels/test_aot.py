"""Every kernel compiles for every card it is for: no spills, memory that fits, wide loads."""

import pytest

from xplus_kernels.aot import (
    SHARED_LIMIT,
    AotCase,
    Compiled,
    compile_all,
    compile_case,
    load_bits,
    main,
    problems,
    registered_cases,
)
from xplus_kernels.backend import INTERPRET, jit, tl, triton

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRET, reason="compiling needs Triton, without TRITON_INTERPRET=1"
)


@jit
def _scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: "tl.constexpr"):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x_ptr + o, mask=o < n).to(tl.float32) * factor
    tl.store(y_ptr + o, b.to(y_ptr.dtype.element_ty), mask=o < n)


@jit
def _product_kernel(x_ptr, y_ptr, M: "tl.constexpr", K: "tl.constexpr", STEPS: "tl.constexpr"):
    """Holds [M, M] sums in registers and [M, K] operands in shared memory."""
    rows, columns = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for step in range(STEPS):
        a = tl.load(x_ptr + step * K + rows[:, None] * K + columns)
        b = tl.load(x_ptr + step * K + columns[:, None] * M + rows)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + rows[:, None] * M + rows, total)


def _scale(**changes: object) -> AotCase:
    settings = {
        "kernel": _scale_kernel,
        "name": "scale",
        "signature": {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "factor": "fp32"},
        "constexprs": {"BLOCK": 1024},
        "aligned": ("x_ptr", "y_ptr", "n"),
    }
    return AotCase(**{**settings, **changes})  # type: ignore[arg-type]


def _product(m: int, k: int, *, num_stages: int = 1) -> AotCase:
    return AotCase(
        _product_kernel,
        "product",
        {"x_ptr": "*bf16", "y_ptr": "*fp32"},
        {"M": m, "K": k, "STEPS": 8},
        num_warps=4,
        num_stages=num_stages,
        aligned=("x_ptr", "y_ptr"),
    )


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_a_good_kernel_passes(capability: int) -> None:
    made = compile_case(_scale(), capability)
    assert 0 < made.registers < 64 and made.spills == 0 and made.load_bits == (128, 128)
    assert problems(_scale(), capability, made) == []


def test_without_alignment_loads_are_told_to_be_narrow() -> None:
    made = compile_case(_scale(aligned=()), 90)
    assert made.load_bits == (16, 16)
    assert problems(_scale(), 90, made) == ["no load is wider than 16 bits"]
    assert problems(_scale(aligned=()), 90, made) == []  # nothing was promised


def test_spills_are_counted() -> None:
    case = _product(256, 16)  # 256 x 256 sums over 128 threads: 512 registers a thread
    made = compile_case(case, 80)
    assert made.spills > 100
    assert any("spills" in problem for problem in problems(case, 80, made))


def test_shared_memory_is_held_to_each_card() -> None:
    case = _product(64, 512)  # two operands of 64 KiB
    made = compile_case(case, 80)
    assert 99 << 10 < made.shared_bytes <= 163 << 10
    assert not any("shared" in problem for problem in problems(case, 80, made))
    assert any("sm_89 has 101376" in problem for problem in problems(case, 89, made))


def test_what_does_not_compile_is_told() -> None:
    made = compile_case(_scale(constexprs={"BLOCK": 1000}), 90)
    assert "power of 2" in made.error and problems(_scale(), 90, made) == [made.error]
    fp8 = {"x_ptr": "*fp8e4nv", "y_ptr": "*bf16", "n": "i32", "factor": "fp32"}
    assert compile_case(_scale(signature=fp8), 80).error != ""
    assert compile_case(_scale(signature=fp8), 90).error == ""


def test_a_case_names_the_kernels_arguments() -> None:
    assert "'STEPS'" in compile_case(_scale(constexprs={"BLOCK": 64, "STEPS": 1}), 90).error
    assert "'BLOCK'" in compile_case(_scale(constexprs={}), 90).error
    assert "'z_ptr'" in compile_case(_scale(aligned=("z_ptr",)), 90).error


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 128),
        ("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 64),
        ("ld.global.nc.v8.b32 { %r1 }, [ %rd1 + 0 ];", 256),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 16),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128),
        ("ld.shared.b32 %r1, [%r2];", 0),
    ],
)
def test_load_widths_in_ptx(line: str, bits: int) -> None:
    assert load_bits(line) == (bits, bits)


def test_command_prints_the_table_and_fails_on_a_wrong_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {"scale": [_scale()]}
    made = {("scale", 0, 90): Compiled(20, 0, 1024, (128, 16))}
    monkeypatch.setattr("xplus_kernels.aot.registered_cases", lambda: cases)
    monkeypatch.setattr("xplus_kernels.aot.compile_all", lambda *_, **__: made)
    assert main(["--arch", "90"]) == 0
    assert "scale  sm_90     20       0    1024  128..16" in capsys.readouterr().out
    made["scale", 0, 90] = Compiled(255, 8, 1024, (128, 16))
    assert main([]) == 1
    assert "WRONG: spills 8 words a thread" in capsys.readouterr().out


def _registered() -> list[object]:
    return [
        pytest.param((module, index, capability), case, id=f"{case.name}-sm_{capability}")
        for module, cases in (registered_cases().items() if triton and not INTERPRET else ())
        for index, case in enumerate(cases)
        for capability in SHARED_LIMIT
        if capability >= case.least
    ]


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, int, int], Compiled]:
    return compile_all()


@pytest.mark.parametrize(("key", "case"), _registered())
def test_registered_kernel(
    key: tuple[str, int, int], case: AotCase, everything: dict[tuple[str, int, int], Compiled]
) -> None:
    assert problems(case, key[2], everything[key]) == []


def test_a_row_quantized_alone_stays_in_the_layout_it_was_loaded_in(
    everything: dict[tuple[str, int, int], Compiled],
) -> None:
    # Its maximum takes a word a warp of shared memory. More would be its elements, moved into
    # another layout: registers, and with them programs an SM, before anything spills.
    cases = registered_cases()
    rows = [
        (cases[key[0]][key[1]], made)
        for key, made in everything.items()
        if key[0] in ("fp8", "swiglu_fp8")
    ]
    alone = [(c, m) for c, m in rows if "MAIN" in c.constexprs and c.constexprs.get("ROWS", 1) == 1]
    assert {"quantize_fp8 weight 14B bf16", "swiglu_fp8 14B bf16"} <= {c.name for c, _ in alone}
    moved = {c.name: m.shared_bytes for c, m in alone if m.shared_bytes > 4 * c.num_warps}
    assert moved == {}


# Of a batch, not of a model: rows, chunks, where keys begin and end
OF_A_BATCH = {"T", "S", "C", "begin_k", "end_k", "prefixes", "lse_head", "other_lse_head"}


def test_no_kernel_is_compiled_for_what_a_batch_decides() -> None:
    kernels = {case.kernel for cases in registered_cases().values() for case in cases}
    given = {p.name: p for k in kernels for p in k.params if p.name in OF_A_BATCH}
    assert given.keys() == OF_A_BATCH
    special = [
        f"{k.__name__} {p.name}" for k in kernels for p in k.params
        if p.name in OF_A_BATCH and not p.do_not_specialize
    ]  # fmt: skip
    assert special == []
