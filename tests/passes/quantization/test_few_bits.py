"""Weights in four bits: integers fitted to data, scales for blocks, matrices that bear it, what a target takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.backends.onnx.qnn import run as compiler
from graphopt.ir.errors import ContractError, PipelineError
from graphopt.ir.facts import Quantized
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator
from graphopt.measure.context import Context
from graphopt.passes.quantization.quantize import Quantize
from graphopt.passes.quantization.rounding import _rows, fitted, matrix_scales, nearest

NPU = "qnn-htp-v75"
needs_compiler = pytest.mark.skipif(not compiler.available(), reason="onnxruntime-qnn is not installed")


class Mixer(nn.Module):
    """Features that go together, so that the rounding of one can make up for that of another; the last layer does little."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.inner, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 6)
        nn.init.normal_(self.wide.bias, std=0.5)
        self.little = nn.Linear(6, 6)
        nn.init.normal_(self.little.weight, std=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(torch.tanh(self.inner(torch.tanh(self.wide(x)))))
        return y + self.little(y)


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(16, 5, 8, generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def mixer() -> Program:
    return graphopt.optimize(graphopt.capture(Mixer().eval(), rows()[0]), "fit-target{allow_no_match=true}")


def quantized(program: Program, data: Any, **options: Any) -> Program:
    given = " ".join(f"{k}={str(v).lower()}" for k, v in options.items())
    return graphopt.optimize(program, f"quantize{{{given}}}", data=data)


def loss(program: Program, other: Program) -> float:
    inputs = rows()[-1]
    expected = program(**inputs)
    return float((other(**inputs) - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 24), st.sampled_from([7, 127]), st.integers(0, 10_000))
def test_inputs_that_do_not_go_together_leave_the_nearest_integers(
    outputs: int, inputs: int, high: int, seed: int
) -> None:
    """Where no input says anything of another there is nothing to make up for; wrong if the order of columns were lost."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    scale = matrix_scales(weight, high, 0)
    moments = torch.rand(inputs, generator=generator).diag() * 10
    assert torch.equal(fitted(weight, scale, moments, high), nearest(weight, scale, high))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 8]))
def test_fitted_integers_change_the_product_less(seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 32, generator=generator)
    mixing = torch.randn(32, 6, generator=generator)
    inputs = (
        torch.randn(400, 6, generator=generator) @ mixing.T + 0.1 * torch.randn(400, 32, generator=generator)
    ).double()
    scale = matrix_scales(weight, 7, block)
    wide = scale[:, None].expand(-1, 32) if not block else scale.repeat_interleave(block, 1)
    found, near = (
        float(((whole.double() * wide - weight) @ inputs.T).norm())
        for whole in (fitted(weight, scale, inputs.T @ inputs, 7), nearest(weight, scale, 7))
    )
    assert found < 0.7 * near
    assert int(fitted(weight, scale, inputs.T @ inputs, 7).abs().max()) <= 7


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 2),
)
def test_a_convolution_is_a_product_with_its_rows(
    dims: int, kernel: int, stride: int, padding: int, groups: int, dilation: int
) -> None:
    """Second moments are those of what a convolution multiplies; wrong if a stride, a side or a group were misread."""
    torch.manual_seed(0)
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    module = kind(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=False).double()
    x = torch.randn(2, 2 * groups, *([9] * dims), dtype=torch.float64)
    program = graphopt.capture(module, {"input": x})
    node = next(n for n in program.nodes if is_operator(n, "aten.conv1d", "aten.conv2d"))
    weight = module.weight.detach().flatten(1).reshape(groups, 3, -1)
    made = _rows(node, x) @ weight.transpose(1, 2)
    expected = module(x).detach()
    assert torch.allclose(
        made.reshape(groups, 2, -1, 3).permute(1, 0, 3, 2).reshape(expected.shape), expected
    )


@pytest.mark.parametrize("block", [0, 8])
def test_four_bits_fitted_lose_less_than_the_nearest(block: int, mixer: Program, tmp_path: Path) -> None:
    data = rows()
    near, best = (
        quantized(mixer, data, weights=4, block=block, rounding=how) for how in ("nearest", "fitted")
    )
    assert loss(mixer, best) < 0.8 * loss(mixer, near)
    assert torch.equal(quantized(mixer, data, weights=4, block=block)(**data[-1]), best(**data[-1])), (
        "fitted is the default"
    )
    again = graphopt.load(best.save(tmp_path / "saved"))
    assert torch.equal(again(**data[-1]), best(**data[-1])), "fitted integers are lost in a folder"
    report = best.lower("onnx", tmp_path / "few.onnx", opset=21)
    assert max(report.errors.values()) < 0.01
    kept = onnx.load(tmp_path / "few.onnx").graph
    blocks = [a.i for n in kept.node for a in n.attribute if a.name == "block_size" and a.i]
    assert blocks == ([8] * 3 if block else []), "the matrix of 6 inputs has no blocks of 8"
    read = {name for node in kept.node for name in node.input} | {o.name for o in kept.output}
    assert {t.name for t in kept.initializer} <= read, "a tensor is stored that nothing reads"
    if block:
        assert loss(mixer, best) < loss(mixer, quantized(mixer, data, weights=4)), "finer scales lose more"
        assert "has a scale for each channel" in str(best.report)


def test_matrices_that_bear_few_bits_are_found_by_measuring(mixer: Program, tmp_path: Path) -> None:
    data = rows()
    few, many = (loss(mixer, quantized(mixer, data, weights=w)) for w in (4, 8))
    budget = (few**2 + many**2) / 4  # cosine distance is about half of the square
    mixed = graphopt.optimize(
        mixer, f"quantize{{weights=4 mixed=true metric=cosine budget={budget}}}", data=data, work_dir=tmp_path
    )
    kinds = {s["block"]: s["dtype"] for s in mixed.history[-1]["plan"]["sites"] if s["what"] == "matrix"}
    assert set(kinds.values()) == {"int4", "int8"}
    least = next(n for n in kinds if "little" in n)
    assert kinds[least] == "int4", "the matrix that matters least has eight bits"
    assert many < loss(mixer, mixed) < few
    assert mixed.facts[Quantized].kind == "w4or8a16"
    assert list(tmp_path.glob("scores-*.json")), "an interrupted run would measure again"
    every = quantized(mixer, data, weights=4, mixed=True, budget=0.5, metric="cosine")
    assert every.facts[Quantized].four_bits == 4
    with pytest.raises(ContractError, match="its budget is 1e-09"):
        quantized(mixer, data, weights=4, mixed=True, budget=1e-9, metric="cosine")
    with pytest.raises(PipelineError, match="by a budget"):
        quantized(mixer, data, weights=4, mixed=True)


def test_a_target_decides_what_is_stored_in_few_bits(mixer: Program) -> None:
    data = rows()
    done = quantized(mixer, data, weights=4, activations=8, block=32, target=NPU)
    assert "supports no blocks of inputs for it in w4a8" in str(done.report)
    sites = done.history[-1]["plan"]["sites"]
    assert all(s["block_size"] == 0 for s in sites if s["what"] == "matrix")
    wide = quantized(mixer, data, weights=4, activations=16, block=32, target=NPU)
    assert {s["block_size"] for s in wide.history[-1]["plan"]["sites"] if s["what"] == "matrix"} == {0, 32}
    with pytest.raises(PipelineError, match="did you mean 'qnn-htp-v75'"):
        quantized(mixer, data, target="qnn-htp-v7")


def test_a_plan_with_other_bits_than_its_integers_is_refused(mixer: Program) -> None:
    """Integers of four bits with steps of eight would make a weight a twentieth of what it was, silently."""
    context, step = Context(rows()), Quantize(weights=4)
    plan = step.plan(mixer, context)
    site = next(s for s in plan.sites if s["what"] == "matrix")
    site.choices["dtype"] = "int8"
    with pytest.raises(PipelineError, match="were fitted to other steps than int8"):
        step.rewrite(mixer.copy(), plan)
    del site.choices["integers"]
    step.rewrite(mixer.copy(), plan)


def test_inputs_that_calibration_never_excites_are_told() -> None:
    """Nothing is known of their range: the message names matrix and channels; wrong were it silent, or wrong ones named."""
    data = rows()
    for batch in data[:4]:
        batch["x"][..., [2, 5]] = 0
    program = graphopt.optimize(graphopt.capture(Mixer().eval(), data[0]), "fit-target{allow_no_match=true}")
    done = quantized(program, data, weights=4)
    text = str(done.report)
    assert "wide" in text and "2 of 8 input channels (2, 5) are zero on all calibration data" in text
    plain = next(w for w in done.weights.values() if w.name == "wide.weight").source.load()
    scale = next(w for w in done.weights.values() if w.name == "wide.weight_quantize_scale").source.load()
    whole = next(w for w in done.weights.values() if w.name == "wide.weight_quantize_integers").source.load()
    near = (plain / scale[:, None]).round()
    assert torch.equal(whole[:, [2, 5]].float(), near[:, [2, 5]]), (
        "weights of unknown inputs were used to make up for others"
    )
    still = [{"x": torch.zeros_like(b["x"])} for b in data]
    silent = quantized(program, still)
    assert "x is zero on all calibration data, and will be zero on all other" in str(silent.report)


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (8, 16)])
def test_no_worse_than_the_runtimes_own_quantiser(
    weights: int, activations: int, mixer: Program, tmp_path: Path
) -> None:
    """The same data, the same bits: scales agree to rounding, and the loss is no larger by more than a tenth."""
    import numpy
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    data = rows()
    mixer.lower("onnx", tmp_path / "plain.onnx", opset=21)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"x": b["x"].numpy()} for b in data[:4]])

        def get_next(self) -> Any:
            return next(self.left, None)

    kind = QuantType.QUInt8 if activations == 8 else QuantType.QUInt16
    quantize_static(
        tmp_path / "plain.onnx", tmp_path / "theirs.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=kind, weight_type=QuantType.QInt8,
    )  # fmt: skip
    ours = quantized(mixer, data, weights=weights, activations=activations)
    session = onnxruntime.InferenceSession(tmp_path / "theirs.onnx", providers=["CPUExecutionProvider"])
    feed = data[-1]["x"]
    theirs = torch.from_numpy(session.run(None, {"x": feed.numpy()})[0])
    expected = mixer(x=feed)
    their_loss = float((theirs - expected).norm() / expected.norm())
    assert loss(mixer, ours) < 1.1 * their_loss
    held = onnx.load(tmp_path / "theirs.onnx").graph.initializer
    scale = next(onnx.numpy_helper.to_array(t) for t in held if t.name == "x_scale")
    site = next(s for s in ours.history[-1]["plan"]["sites"] if s["block"] == "x")
    assert numpy.isclose(site["scale"], float(scale), rtol=1e-3)


@needs_compiler
@pytest.mark.parametrize("block", [0, 32])
def test_four_bits_on_the_npu(block: int, captured: Callable[[str], Program], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(3, 100, (2, 8), generator=generator)} for _ in range(6)]
    program = graphopt.optimize(captured("llama"), "fit-target")
    done = quantized(program, data, weights=4, activations=16, block=block, target=NPU)
    report = done.lower("onnx", tmp_path / "out", target=NPU, check=True, sizes={"batch": 1, "sequence": 8})
    assert report.checked is not None
    assert report.checked.against_runtime["logits"] > 35
