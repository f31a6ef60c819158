"""Kernels without a GPU: by an interpreter against references, compiled within limits, traced; and the ways to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Shape, Transformer, tokens

import graphopt
from graphopt.backends.triton import run
from graphopt.ir.errors import LoweringError, UsageError
from graphopt.ir.operators import KERNELS
from graphopt.ir.program import Program

triton = pytest.mark.skipif(not run.available(), reason="Triton is not installed")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def program(captured: Callable[[str], Program]) -> Program:
    return graphopt.optimize(captured("llama"), "fuse-kernels")


@triton
def test_every_kernel_computes_what_its_operator_says() -> None:
    from graphopt.backends.triton.wiring import TABLE

    rows = run.interpret()
    assert {row["operator"] for row in rows} == set(TABLE), "a kernel was not tried"
    wrong = [row for row in rows if not row["holds"]]
    assert not wrong, f"kernels differ from their references: {wrong[:3]}"
    assert {row["dtype"] for row in rows} == {"float32", "float16"}


@triton
@pytest.mark.parametrize(
    ("dtype", "architectures", "every"),
    [
        (torch.bfloat16, ["sm_90"], True),
        (torch.bfloat16, ["sm_80", "gfx942"], False),
        (torch.float32, ["sm_90"], False),
        (torch.bfloat16, ["sm_90"], False),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(
    dtype: torch.dtype, architectures: list[str], every: bool
) -> None:
    """Each call where ``every`` is set, else the first call of each operator, which takes a third of the time."""
    from graphopt.backends.triton.cases import Tensors, cases
    from graphopt.backends.triton.wiring import TABLE

    calls = []
    for case in cases("large"):
        if not every and case.operator in {c["operator"] for c in calls}:
            continue
        args, options = case.args(Tensors(dtype, "meta"))
        assert TABLE[case.operator].takes(*args, **options)
        calls.append(run.call_of(case.operator, case.what, args, options))
    # torch.compile hands numbers over in double precision, where Triton alone has them in single
    rows = run.compile_ahead(calls, architectures, doubles=every)
    assert {(r["operator"], r["architecture"]) for r in rows} == {
        (n, a) for n in TABLE for a in architectures
    }
    refused = [row for row in rows if row["reason"]]
    assert not refused, f"a kernel needs more than the GPU has: {refused[:2]}"
    spilling = [row for row in rows if row["spilled"]]
    assert not spilling, f"registers are kept in memory: {spilling[:2]}"


@triton
def test_what_starts_kernels_is_traced_with_sizes_that_vary() -> None:
    silent = [row for row in run.trace() if not row["kernels"]]
    assert not silent, f"torch.compile would not see these kernels: {silent}"


@triton
def test_a_program_goes_through_the_kernels_operators_only_where_asked(program: Program) -> None:
    from graphopt.backends.triton import wiring

    ids = {"input_ids": torch.randint(3, 100, (2, 7))}
    expected = program(**ids)["logits"]
    asked: list[str] = []
    operator = wiring.operator

    def recording(name: str) -> Any:
        asked.append(name)
        return operator(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "operator", recording)
        with wiring.kernels_in_use():
            assert torch.equal(program(**ids)["logits"], expected)
        assert not asked, "there is no GPU, and a kernel's operator was asked all the same"
        with wiring.kernels_in_use(["gated_product"], everywhere=True), torch.no_grad():
            program(**ids)
        assert set(asked) == {"gated_product"}, "another kernel than the one asked for is in use"
        with wiring.kernels_in_use(everywhere=True), torch.no_grad():
            assert torch.equal(program(**ids)["logits"], expected)
            assert set(asked) == {"add_rms_norm", "gated_product", "rms_norm"}, "a kernel is passed by"
            asked.clear()
            compiled = torch.compile(program.module(), dynamic=True, backend="aot_eager")
            assert torch.allclose(compiled(**ids)["logits"], expected, atol=1e-6)
            assert asked, "what torch.compile sees goes by the references"
    assert not KERNELS, "kernels stay in use behind the context"
    with pytest.raises(UsageError, match="no kernel for 'softmax'"), wiring.kernels_in_use(["softmax"]):
        pass


@triton
def test_every_operator_comes_to_an_end_where_there_is_no_gpu() -> None:
    """Through the function that programs call: a reference that asked for its own kernel would ask for ever."""
    from graphopt.backends.triton.cases import Tensors, cases
    from graphopt.backends.triton.wiring import TABLE, kernels_in_use
    from graphopt.ir.operators import quantized

    points = {"quantize_pack": quantized.quantize_pack, "unpack_sum": quantized.unpack_sum}
    for case in {c.operator: c for c in cases()}.values():
        args, options = case.args(Tensors(torch.float32))
        public = points.get(case.operator) or getattr(torch.ops.graphopt, case.operator)
        with kernels_in_use(everywhere=True), torch.no_grad():
            made = public(*args, **options)
        expected = TABLE[case.operator].reference(*args, **options)
        pairs = zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]
        assert all(torch.equal(a, b) for a, b in pairs), case.operator


@triton
def test_training_goes_by_references() -> None:
    from graphopt.backends.triton import wiring

    gate, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    with wiring.kernels_in_use(everywhere=True):
        torch.ops.graphopt.gated_product(gate, up).sum().backward()
    assert gate.grad is not None
    assert gate.grad.abs().sum() > 0, "a kernel without a gradient took the place of an operator that has one"


@triton
def test_a_program_is_lowered_to_kernels_with_a_report(program: Program, tmp_path: Path) -> None:
    report = program.lower(
        "triton", tmp_path / "out", sizes={"batch": 2, "sequence": 64}, architectures=["sm_90"]
    )
    named = {k.operator: k.nodes for k in report.kernels}
    counted = program.operators
    assert named == {
        name: counted[f"graphopt.{name}"] for name in ("add_rms_norm", "gated_product", "rms_norm")
    }, "a kernel is missing, or counted at the wrong number of nodes"
    for kernel in report.kernels:
        assert (tmp_path / "out" / "kernels" / f"{kernel.file}.cubin").stat().st_size > 1000
    held = json.loads((tmp_path / "out" / "report.json").read_text())
    assert held["sizes"] == {"batch": 2, "sequence": 64}
    assert len(held["kernels"]) == len(report.kernels)
    assert report.package is None


@triton
def test_kernels_of_sums_in_few_bits_and_of_steps_over_a_cache(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    cached = graphopt.optimize(captured("llama"), "insert-cache")
    step = cached.lower(
        "triton", tmp_path / "step", sizes={"batch": 1, "sequence": 4}, architectures=["sm_90"]
    )
    assert "share_kernel" in {k.kernel for k in step.kernels}, "a step over a cache has no kernel"
    sharded = graphopt.optimize(
        captured("llama"), "shard-tensor-parallel{size=2}, quantize-communication{group=16 outliers=none}"
    )
    report = sharded.lower("triton", tmp_path / "sharded", architectures=["sm_90"])
    assert {"quantize_pack", "unpack_sum"} <= {k.operator for k in report.kernels}
    with pytest.raises(LoweringError, match="several ranks"):
        sharded.lower("triton", tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()


@triton
@pytest.mark.parametrize("model", ["falcon_h1", "qwen3_next"])
def test_mixers_with_states_have_kernels(
    model: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Of a step over states: convolutions, scans or delta rules, and the states after them."""
    cached = graphopt.optimize(captured(model), "insert-cache")
    report = cached.lower(
        "triton", tmp_path / "step", sizes={"batch": 2, "sequence": 1}, architectures=["sm_90"]
    )
    named = {k.operator for k in report.kernels}
    assert {"causal_conv1d", "linear_attention", "linear_attention_state"} <= named, report.without
    counted = cached.operators
    for operator in ("causal_conv1d", "linear_attention", "linear_attention_state"):
        nodes = sum(k.nodes for k in report.kernels if k.operator == operator)
        assert nodes == counted[f"graphopt.{operator}"]


@triton
def test_what_cannot_be_lowered_is_refused_and_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoweringError, match="no architecture 'sm_91'"):
        program.lower("triton", tmp_path / "out", architectures=["sm_91"])
    plain = graphopt.capture(torch.nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(LoweringError, match="no operator of this program has a kernel"):
        plain.lower("triton", tmp_path / "out")
    wide = graphopt.capture(Transformer(Shape()), tokens(3, 13))
    with pytest.raises(LoweringError, match=r"does not support this call \(float64\)"):
        graphopt.optimize(wide, "fuse-kernels").lower("triton", tmp_path / "out")
    with pytest.raises(UsageError, match="no size named 'length'"):
        program.lower("triton", tmp_path / "out", sizes={"length": 3})
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(LoweringError, match="ended with status 1"):
        program.lower("triton", tmp_path / "out")
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton is not installed"):
        program.lower("triton", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@triton
def test_more_shared_memory_than_a_gpu_has_is_noticed() -> None:
    from graphopt.backends.triton.resources import Resources
    from graphopt.backends.triton.stub_driver import ARCHITECTURES

    much = Resources(registers=200, spilled=0, shared=96 * 1024, warps=8)
    assert not much.too_much(ARCHITECTURES["sm_90"])
    assert "shared memory" in much.too_much(ARCHITECTURES["gfx942"]), "it would fail when it is loaded"


@triton
def test_a_package_for_this_machine_computes_what_the_program_does(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "saved")
    # sizes read from a file have to have names that the compiler takes for sizes
    report = graphopt.load(tmp_path / "saved").lower(
        "triton", tmp_path / "out", architectures=["sm_90"], device="cpu"
    )
    assert report.package is not None
    assert report.package.stat().st_size > 10_000
    assert max(report.errors.values()) < 1e-5


@triton
def test_attention_takes_what_fits_into_registers() -> None:
    """What spills would be slower than torch's own; what it asks for in shared memory might not start at all."""
    from graphopt.backends.triton.wiring import TABLE

    def taken(dtype: torch.dtype, queries: int, group: int, size: int) -> bool:
        q, k = (torch.empty(1, heads, n, size, dtype=dtype) for heads, n in ((2 * group, queries), (2, 512)))
        seen = torch.ones(1, 1, queries, 512, dtype=torch.bool)
        return TABLE["attention"].takes(q, k, k, None, None, None, None, seen, scale=1.0)

    half, single = torch.bfloat16, torch.float32
    assert taken(half, 1, 4, 256) and taken(half, 16, 8, 128) and taken(half, 16, 4, 256)
    assert not taken(half, 32, 4, 256), "128 rows of 256 features"
    assert not taken(half, 64, 4, 64), "256 rows"
    assert taken(single, 16, 4, 64) and not taken(single, 16, 2, 128) and not taken(single, 32, 4, 64)
    assert not taken(half, 0, 4, 64)


@triton
def test_a_package_says_which_kernels_it_goes_without(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Steps of a number of tokens that varies are attention by its reference, whatever was compiled ahead.

    Of one layer, since a compiler of C++ takes most of the time.
    """
    passes = "skip-layers{layers=[1]}, insert-cache{max_length=32}, fuse-kernels"
    cached = graphopt.optimize(captured("llama"), passes)
    sizes = {"batch": 1, "sequence": 4}
    report = cached.lower("triton", tmp_path / "out", sizes=sizes, architectures=["sm_90"], device="cpu")
    assert any(k.operator == "attention" for k in report.kernels)
    assert any("accepts dynamic sizes" in reason for reason in report.without.values())


@gpu
@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    from graphopt.backends.triton.cases import Tensors, cases
    from graphopt.backends.triton.comparing import compare
    from graphopt.backends.triton.wiring import TABLE

    every = [
        compare(case, dtype, "cuda")
        for case in [*cases(), *cases("even"), *cases("large")]
        if (case.typed or dtype == torch.float32) and _taken(TABLE, case, Tensors(dtype, "meta"))
    ]
    assert not [found for found in every if not found.holds]


def _taken(table: Any, case: Any, made: Any) -> bool:
    # small calls are all taken; of a model's, what would spill registers is not
    if case.what in ("NaN", "NaN, and few finite values"):
        return True
    args, options = case.args(made)
    return table[case.operator].takes(*args, **options)


@gpu
@triton
def test_operators_on_a_gpu_under_the_compiler() -> None:
    """Inductor starts kernels with its own types of numbers."""
    from graphopt.backends.triton.cases import Tensors, cases
    from graphopt.backends.triton.wiring import TABLE, kernels_in_use, operator

    for case in cases("even"):
        torch._dynamo.reset()
        args, options = case.args(Tensors(torch.float32, "cuda"))
        with torch.no_grad(), kernels_in_use():
            made = torch.compile(operator(case.operator))(*args, **options)
        plain = TABLE[case.operator].launch(*args, **options)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (made, plain)), strict=True):
            assert torch.equal(a, b), f"{case.operator}, {case.what}"


@gpu
@triton
def test_a_package_on_a_gpu(program: Program, tmp_path: Path) -> None:
    report = program.lower("triton", tmp_path / "out", device="cuda")
    assert max(report.errors.values()) < 1e-4
