"""Weights alone in few bits: how numbers are rounded, what programs then compute, save and cost, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphopt
from graphopt.ir.cost.summary import cost
from graphopt.ir.errors import CheckpointError, PassRefusedError, PipelineError
from graphopt.ir.program import Program
from graphopt.ir.quantised.codes import RANGES, STORED
from graphopt.ir.quantised.stored import packed, quantised_form, stored_bytes
from graphopt.ir.quantised.tensor import QuantisedTensor
from graphopt.ir.running.fold import fold
from graphopt.ir.schema import argument, is_operator
from graphopt.measure.context import Context
from graphopt.passes.framework.pipeline import parse_pipeline
from graphopt.passes.quantization import rounding
from graphopt.passes.quantization.expert_moments import expert_moments
from graphopt.passes.quantization.few_bits import (
    channel_scales,
    fitted,
    half_quadratic,
    nearest,
    output_error,
)
from graphopt.passes.quantization.quantize import Quantize
from graphopt.passes.quantization.ranges import watch


def matrix(seed: int, rows: int = 6, columns: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(seed: int, columns: int, rows: int = 400) -> Tensor:
    """Return the second moments of inputs that depend on one another, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64).pow(4) * 5 + 0.05
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixing * sizes
    return x.T @ x


@given(
    st.integers(0, 999), st.sampled_from([2, 4, 8]), st.sampled_from([8, 32, 64]), st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_nearest_codes_are_within_half_a_step(
    seed: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = matrix(seed, dtype=dtype)
    form = nearest(weight, bits, group, symmetric)
    low, high = RANGES[form.code]
    assert int(form.codes.min()) >= low
    assert int(form.codes.max()) <= high
    assert (form.zero is None) == symmetric
    assert form.scale.dtype == dtype
    exact = replace(form, dtype=torch.float64, scale=form.scale.double())
    step = exact.spread(form.scale.double()).abs()
    # a symmetric code has a number less on one side, and zeros are rounded as well
    allowed = torch.where(exact.codes == high, 1.0 if symmetric else 0.5, 0.5) + (0 if symmetric else 0.5)
    slack = 1e-2 if dtype != torch.float32 else 1e-4
    assert bool(((exact.dequantise() - weight.double()).abs() <= step * (allowed + slack * 2**bits)).all())


@given(st.integers(0, 999), st.sampled_from([4, 8]), st.booleans())
def test_numbers_on_a_grid_are_kept(seed: int, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = RANGES[f"{'int' if symmetric else 'uint'}{bits}"]
    codes = torch.randint(low, high + 1, (5, 64), generator=generator)
    # every group reaches the ends of the range
    codes[:, ::16], codes[:, 1::16] = low, high
    zero = None if symmetric else torch.randint(low, high + 1, (5, 4), generator=generator).to(torch.uint8)
    scale = torch.rand(5, 4, generator=generator) + 0.1
    code = f"{'int' if symmetric else 'uint'}{bits}"
    value = QuantisedTensor(codes.to(STORED[code]), scale, code, (1, 16), torch.float32, zero).dequantise()
    again = nearest(value, bits, 16, symmetric).dequantise()
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 999))
def test_moved_zeros_lose_less_of_most_numbers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 128, generator=generator)
    weight[:, ::29] *= 6
    errors = [
        float((form.dequantise() - weight).abs().mean())
        for form in (nearest(weight, 4, 32, False), half_quadratic(weight, 4, 32))
    ]
    assert errors[1] <= errors[0] * 1.001


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 48])
def test_fitted_codes_lose_less_of_the_products(symmetric: bool, group: int) -> None:
    gained = []
    for seed in range(6):
        weight, moments = matrix(seed, 12, 48), inputs_of(seed, 48)
        plain = output_error(weight, nearest(weight, 4, group, symmetric).dequantise(), moments)
        for ordered in (True, False):
            form = fitted(weight, moments, 4, group, symmetric, ordered)
            gained.append(output_error(weight, form.dequantise(), moments) / plain)
    assert max(gained) < 0.95
    weight = matrix(0, 12, 48)
    alone = fitted(weight, torch.eye(48, dtype=torch.float64), 4, group, symmetric)
    # but for ties, which float64 sees otherwise
    assert (alone.codes != nearest(weight, 4, group, symmetric).codes).float().mean() < 0.01


@pytest.mark.parametrize(("symmetric", "ordered"), [(True, True), (False, True), (False, False)])
def test_rows_are_rounded_in_parts(symmetric: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a head in float64 would take most of the memory; its rows have nothing to do with one another."""
    weight, moments = matrix(1, 11, 48), inputs_of(1, 48)
    found: list[tuple[QuantisedTensor, QuantisedTensor, float]] = []
    for rows in (1024, 3):
        monkeypatch.setattr(rounding, "_LEAST_ROWS", rows)
        monkeypatch.setattr(rounding, "_AT_ONCE", 1)
        form = fitted(weight, moments, 4, 16, symmetric, ordered)
        close = nearest(weight.reshape(1, 11, 48), 4, 16, symmetric)
        found.append((form, close, output_error(weight, form.dequantise(), moments)))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert symmetric or torch.equal(one.zero, other.zero)  # type: ignore[arg-type]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-9)


def test_calibration_computes_no_logits(captured: Callable[[str], Program]) -> None:
    """Logits of all tokens are the largest value of a run, and no matrix within a layer reads them."""
    program = captured("llama")
    context = Context(data=[{"input_ids": torch.randint(0, 100, (2, 7))}])
    linears = [n for n in program.nodes if is_operator(n, "aten.linear")]
    seen: list[str] = []
    watch(program, context, lambda node, _: seen.append(node.name), "", [argument(linears[3], "input")])
    assert argument(linears[3], "input").name in seen
    assert linears[3].name not in seen
    assert program.outputs["logits"].name not in seen


def test_inputs_that_are_never_there_cost_nothing() -> None:
    weight, moments = matrix(3, 6, 32), inputs_of(3, 32)
    moments[5], moments[:, 5] = 0, 0
    weight[:, 5] = 100
    form = fitted(weight, moments, 4, 32, True)
    assert output_error(weight, form.dequantise(), moments) < 0.2


def test_factors_of_channels_lessen_the_error() -> None:
    for seed in range(4):
        weight, moments = matrix(seed, 16, 64), inputs_of(seed, 64)
        factors = channel_scales([weight], moments, 400, 4, 32, False)
        scaled = nearest(weight * factors, 4, 32, False).dequantise() / factors
        plain = nearest(weight, 4, 32, False).dequantise()
        assert output_error(weight, scaled, moments) < output_error(weight, plain, moments)


def data(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 100, (2, 12), generator=generator)} for _ in range(count)]


def coded(program: Program) -> dict[str, QuantisedTensor]:
    forms = {n: quantised_form(w.source) for n, w in program.weights.items()}
    return {n: form for n, form in forms.items() if form is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_matrices_of_all_kinds_hold_their_nearest_codes(
    name: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    small = graphopt.optimize(program, passes=["quantize-weights{group=16 head=8}"], data=data())
    assert small.history[-1]["plan"]["sites"]
    forms = coded(small)
    assert len(forms) == len(small.history[-1]["plan"]["sites"])
    for form in forms.values():
        (axis,) = (d for d, block in enumerate(form.block) if block == 16)
        value = form.dequantise().movedim(axis, -1)
        assert torch.equal(nearest(value, int(form.code[3:]), 16, True).dequantise(), value)
    # the checkpoint's tensors are those of the program, and what was not a matrix stayed
    values = {**program.checkpoint}
    assert set(values) == set(small.checkpoint)
    assert torch.isfinite(small(**data()[0])["logits"]).all()


@pytest.mark.parametrize(
    "text",
    ["quantize-weights{method=gptq group=16}", "quantize-weights{method=awq symmetric=false group=16}",
     "quantize-weights{method=hqq symmetric=false group=16}", "quantize-weights{bits=4 sensitive=0.4 group=16}"],
)  # fmt: skip
def test_methods_save_programs_that_read_the_same(
    text: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = captured("llama")
    small = graphopt.optimize(program, passes=[text], data=data())
    small.save(tmp_path / "saved")
    again = graphopt.load(tmp_path / "saved")
    assert coded(small).keys() == coded(again).keys() != set()
    for name in coded(small):
        assert torch.equal(small.weights[name].source.load(), again.weights[name].source.load())
        assert stored_bytes(small.weights[name].source) == stored_bytes(again.weights[name].source)
    stored = sum(p.stat().st_size for p in (tmp_path / "saved" / "weights").iterdir())
    plain = sum(w.bytes for w in program.weights.values())
    assert stored < 0.8 * plain
    before, after = cost(program), cost(again)
    assert after.parameters == before.parameters
    assert after.parameter_bytes < 0.8 * before.parameter_bytes
    assert after.bytes < before.bytes
    assert after.flops == before.flops
    if "sensitive" in text:
        assert {form.code for form in coded(again).values()} == {"int4", "int8"}
    plain_again = graphopt.optimize(again, passes=["dequantize-weights"])
    assert not coded(plain_again)
    a, b = (p(**data()[0])["logits"] for p in (again, plain_again))
    assert torch.equal(a, b)
    assert torch.equal(small(**data()[0])["logits"], a)
    assert cost(plain_again).parameter_bytes == before.parameter_bytes


def test_better_methods_lose_less_on_the_output(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    wanted = program(**data()[0])["logits"].double()

    def loss(text: str) -> float:
        small = graphopt.optimize(program, passes=[text], data=data(8))
        return float((small(**data()[0])["logits"].double() - wanted).norm() / wanted.norm())

    eight, four = loss("quantize-weights{bits=8 group=16}"), loss("quantize-weights{group=16}")
    assert eight < 0.2 * four
    assert loss("quantize-weights{group=16 method=gptq}") < four


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_fitted_to_the_tokens_that_reach_them(
    name: str, captured: Callable[[str], Program]
) -> None:
    program = fold(captured(name))
    rows = data(6)
    done = graphopt.optimize(program, passes=["quantize-weights{group=8 method=gptq}"], data=rows)
    scores = done.history[-1]["plan"]["scores"]
    context = Context(data=rows)
    plain = graphopt.optimize(program, passes=["quantize-weights{group=8}"], data=rows)
    stacks = [n for n in program.weight_nodes if n.name in scores and n.meta["val"].dim() == 3]
    assert len(stacks) == 2 * len(program.anatomy.experts)
    gained, nodes = [], {n.name: i for i, n in enumerate(stacks)}
    axes = {}
    for layer in (n for n in program.nodes if is_operator(n, "graphopt.routed_ffn")):
        for which in ("up", "down"):
            axes[argument(layer, which).name] = 1 if argument(layer, "transposed") else 2
    values = {k: program.weights[k].source.load() for k in nodes}
    names = {program.weights[k].name: k for k in nodes}
    both = [{w.name: w.source.load() for w in p.weights.values()} for p in (done, plain)]
    first, again = (list(expert_moments(program, context, stacks, memory)) for memory in (1 << 30, 1))
    assert len(first) > len(stacks)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, again, strict=True))
    for node, expert, moments, _ in first:
        name_ = next(n for n, k in names.items() if k == node.name)
        errors = []
        for changed in both:
            old, new = values[node.name][expert], changed[name_][expert]
            old, new = (v.mT if axes[node.name] == 1 else v for v in (old, new))
            errors.append(output_error(old, new, moments))
        assert errors[1] > 0.01
        gained.append(errors[0] / errors[1])
    assert sum(gained) / len(gained) < 0.95


def test_what_is_coded_already_is_not_rounded_again(captured: Callable[[str], Program]) -> None:
    small = graphopt.optimize(captured("llama"), passes=["quantize-weights{group=16}"], data=data())
    for text in ("quantize-weights{group=16}", "quantize-weights{bits=8 group=0}"):
        with pytest.raises(PassRefusedError, match="few bits already"):
            graphopt.optimize(small, passes=[text], data=data())
    refused = Quantize().plan(small, Context(data=data())).refused
    assert {r.block for r in refused} == set(coded(small)) and all(
        "few bits already" in r.reason for r in refused
    )
    with pytest.raises(PassRefusedError, match="do not divide"):
        graphopt.optimize(captured("llama"), passes=["quantize-weights{group=7}"], data=data())


@pytest.mark.parametrize(
    ("text", "match"),
    [("{method=hqq}", "hqq chooses zeros"), ("{ordered=false}", "method=gptq alone"), ("{bits=8 sensitive=0.1}", "8 bits"),
     ("{bits=3}", "bits"), ("{method=best}", "method")],
)  # fmt: skip
def test_options_that_do_not_go_together(text: str, match: str) -> None:
    with pytest.raises(PipelineError, match=match):
        parse_pipeline(f"quantize-weights{text}")


def test_passes_that_move_whole_blocks_keep_codes(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    small = graphopt.optimize(program, passes=["quantize-weights{group=8}"], data=data())
    joined = graphopt.optimize(small, passes=["fuse-projections"])
    kept = fold(joined)
    assert len(coded(kept)) < len(coded(small))
    assert sum(f.stored_bytes for f in coded(kept).values()) == sum(
        f.stored_bytes for f in coded(small).values()
    )


@pytest.mark.parametrize("part", ["codes", "scale", "block", "code", "shape", "group_dim"])
def test_damaged_codes_are_refused(part: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    small = graphopt.optimize(captured("llama"), passes=["quantize-weights{group=8}"], data=data())
    small.save(tmp_path / "saved")
    path = tmp_path / "saved" / "program.json"
    document = json.loads(path.read_text())
    entry = next(e for e in document["weights"].values() if "quantised" in e)["quantised"]
    changes: dict[str, Any] = {
        "codes": {"shape": [entry["shape"][0] * 2, entry["shape"][1]]}, "scale": {"block": [2, 8]},
        "block": {"block": [0, 0]}, "code": {"code": "int5000"}, "shape": {"shape": [-1, 2**60]},
        "group_dim": {"shape": "large"},
    }  # fmt: skip
    entry.update(changes[part])
    path.write_text(json.dumps(document))
    manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
    manifest["files"]["program.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "saved" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged|described as"):
        graphopt.load(tmp_path / "saved")


def test_packed_codes_take_what_they_say() -> None:
    weight = matrix(0, 64, 128)
    for bits in (2, 4, 8):
        form = nearest(weight, bits, 32, True)
        kept = packed(form)
        assert kept.words.numel() * kept.words.dtype.itemsize == 64 * 128 * bits // 8
        assert kept.stored_bytes == 64 * 128 * bits // 8 + form.scale.numel() * 4
        assert torch.equal(kept.load(), form.dequantise())
