"""Values in few bits: forms that keep what a program computes, scales by calibration, files of integers, and the NPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.backends.onnx.host_partition import split
from graphopt.backends.onnx.qnn import run as compiler
from graphopt.backends.onnx.quantized import pairs_in, without_rounding
from graphopt.backends.onnx.sizes import fixed_sizes, with_sizes
from graphopt.ir.errors import ContractError, LoweringError, PassRefusedError, PipelineError
from graphopt.ir.facts import Quantized
from graphopt.ir.operators.quantize import INTEGERS
from graphopt.ir.program import Program
from graphopt.ir.running.execute import run
from graphopt.ir.schema import is_operator
from graphopt.passes.framework.manager import run_totals
from graphopt.passes.framework.plan import Plan
from graphopt.passes.quantization import values
from graphopt.passes.quantization.quantize import Quantize

NPU = "qnn-htp-v75"
needs_compiler = pytest.mark.skipif(not compiler.available(), reason="onnxruntime-qnn is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dense, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        for tensor in (self.norm.running_mean, self.norm.bias):
            nn.init.normal_(tensor, std=0.3)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.nn.functional.gelu(self.dense(y)))


def images(count: int = 6, batch: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(batch, 3, 8, 8, generator=generator)} for _ in range(count)]


def tokens(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 100, (2, 8), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def net() -> Program:
    return graphopt.optimize(
        graphopt.capture(Net().eval(), images()[0]), "fold-norms, fit-target{allow_no_match=true}"
    )


def quantized(program: Program, data: Any, **options: Any) -> Program:
    given = " ".join(f"{k}={v}" for k, v in options.items())
    return graphopt.optimize(program, f"quantize{{{given}}}", data=data)


def decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise.clamp(min=1e-30)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=20),
    st.floats(1e-3, 2),
    st.sampled_from(sorted(INTEGERS)),
    st.data(),
)
def test_rounding_is_that_of_integers(values: list[float], scale: float, dtype: str, data: Any) -> None:
    """Every result is a whole number of steps within the type's range, the nearest one; done twice it changes nothing."""
    low, high = INTEGERS[dtype]
    zero = data.draw(st.integers(low, high))
    x = torch.tensor(values, dtype=torch.float64)
    found = torch.ops.graphopt.fake_quantize(x, scale, zero, dtype=dtype)
    whole = found / scale + zero
    assert torch.allclose(whole, whole.round(), atol=1e-6)
    assert whole.min() >= low - 1e-6 and whole.max() <= high + 1e-6
    inside = (x / scale + zero > low) & (x / scale + zero < high)
    assert ((found - x).abs()[inside] <= scale / 2 + 1e-9).all()
    assert torch.allclose(torch.ops.graphopt.fake_quantize(found, scale, zero, dtype=dtype), found, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_fitted_programs_compute_the_same(name: str, captured: Callable[[str], Program]) -> None:
    """Padding included, where a row sees something; wrong if a window, a cap or a grouped head were lost."""
    from graphopt.ir.running.examples import example_inputs

    program = captured(name)
    made = graphopt.optimize(program, "fit-target{allow_no_match=true}")
    for padding in ("none", "right"):
        inputs = example_inputs(program, padding=padding)
        mask = inputs.get("attention_mask")
        for key, value in run(program, inputs).items():
            other = run(made, inputs)[key]
            if mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape:
                value, other = value[mask.bool()], other[mask.bool()]
            assert torch.allclose(other, value, atol=1e-4), f"{key}, padded {padding}"


@pytest.mark.parametrize(("bits", "least"), [(8, 25.0), (16, 35.0)])
def test_more_bits_are_nearer(bits: int, least: float, net: Program) -> None:
    data = images()
    done = quantized(net, data, activations=bits)
    expected = net(**data[-1])
    assert decibels(done(**data[-1]), expected) > least
    assert decibels(done(**data[-1]), expected) > decibels(
        quantized(net, data, weights=4, activations=bits)(**data[-1]), expected
    )
    few = quantized(net, data, weights=4, activations=bits)
    assert torch.equal(without_rounding(few)(**data[-1]), expected), "what was quantised is lost"
    assert torch.equal(without_rounding(done)(**data[-1]), expected), (
        "something else than rounding was changed"
    )
    cost, before = run_totals(done), run_totals(net)
    assert cost["parameter_bytes"] < 0.27 * before["parameter_bytes"] + 100, "weights are counted as floats"
    assert cost["flops"] == before["flops"], "rounding is counted as work"
    assert cost["bytes"] < 0.6 * before["bytes"]
    assert done.facts[Quantized].kind == f"w8a{bits}"
    assert "quantize" in str(done.report)


def test_scales_come_from_calibration_alone(net: Program) -> None:
    """Half of the data calibrates; a value that is only moved has the scale of what it was."""
    plan = _plan(net, images())
    again = _plan(net, [*images()[:3], *[{"x": 100 * b["x"]} for b in images()[3:]]])
    assert plan.sites == again.sites, "data for judging was calibrated on"
    wider = _plan(net, [{"x": 2 * b["x"]} for b in images()])
    first = next(s for s in plan.sites if s.block == "x")
    assert next(s for s in wider.sites if s.block == "x")["scale"] == pytest.approx(2 * first["scale"])
    kinds = Counter(s["what"] for s in plan.sites)
    assert kinds["matrix"] == 3
    scales = {s.block: (s["scale"], s["zero_point"]) for s in plan.sites if "scale" in s.choices}
    before = {n.name: values.moved(n) for n in net.nodes if n.name in scales}
    same = [scales[name] == scales[source.name] for name, source in before.items() if source is not None]
    assert all(same)
    with pytest.raises(PipelineError, match="needs data"):
        graphopt.optimize(net, "quantize")
    with pytest.raises(PipelineError, match="requires a program that is legal on a target"):
        graphopt.optimize(graphopt.capture(Net().eval(), images()[0]), "quantize", data=images())
    with pytest.raises(ContractError, match="its budget is 1e-09"):
        graphopt.optimize(net, "quantize{weights=4 activations=8 budget=1e-9}", data=images())


def test_moved_values_keep_their_steps_and_padding_has_its_own() -> None:
    """Wrong if a reshape were rounded anew, or what is put beside a value were cut off by the value's range."""

    class Padded(nn.Module):
        def __init__(self, beside: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.beside = nn.Linear(8, 8), nn.Linear(10, 4), beside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sigmoid(self.a(x)).reshape(-1, 2, 8).flatten(0, 1)
            return self.b(torch.constant_pad_nd(y, (1, 1), self.beside))

    data = [{"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(s))} for s in range(4)]
    for beside, kept in ((0.0, True), (5.0, False)):
        program = graphopt.capture(Padded(beside).eval(), data[0])
        program = graphopt.optimize(program, "fit-target{allow_no_match=true}")
        done = quantized(program, data, activations=16)
        scales = {s["block"]: s["scale"] for s in done.history[-1]["plan"]["sites"] if "scale" in s}
        source = next(n for n in program.nodes if is_operator(n, "aten.sigmoid")).name
        shaped = [n.name for n in program.nodes if is_operator(n, "aten.reshape", "aten.flatten")]
        padded = next(n for n in program.nodes if is_operator(n, "aten.constant_pad_nd", "aten.pad")).name
        assert shaped
        assert all(scales[name] == scales[source] for name in shaped)
        assert (scales[padded] == scales[source]) == kept
        assert decibels(done(**data[0]), program(**data[0])) > 40


@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_masks_hide_whatever_the_scores(scale: float, tmp_path: Path) -> None:
    """Scores of hundreds lie far apart: a mask of -100 hides nothing there, and one of -30000 leaves no steps."""
    import zoo

    model = zoo.make("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= scale
    model.save_pretrained(tmp_path / "model")
    program = graphopt.capture(tmp_path / "model")
    fitted = graphopt.optimize(program, "fit-target")
    ids = tokens(1)[0]["input_ids"]
    expected = program(input_ids=ids)["logits"]
    assert torch.allclose(fitted(input_ids=ids)["logits"], expected, atol=1e-5)
    done = quantized(fitted, tokens(), activations=16)
    (mask,) = [s for s in done.history[-1]["plan"]["sites"] if s["what"] == "mask"]
    assert -30000 < mask["hidden"] < -20
    assert (mask["hidden"] < -100) == (scale > 1)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 90 + 3
    first, second = (done(input_ids=i)["logits"][:, :-1] for i in (ids, other))
    assert torch.allclose(first, second, atol=1e-5), "what comes later is seen"
    near = graphopt.optimize(program, "fit-target{hidden=-100}, quantize{activations=16}", data=tokens())
    assert bool(near.history[-1]["plan"]["notes"]) == (scale > 1), "nobody is told that a mask is too near"


class Infinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.softmax(torch.where(y > 0.2, y, float("-inf")), -1))


def test_what_has_no_steps_is_refused_by_its_line(captured: Callable[[str], Program]) -> None:
    """Infinite values, and mixtures whose matrices tokens choose."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(4, 8) + 1} for _ in range(4)]
    program = graphopt.capture(Infinite().eval(), data[0])
    with pytest.raises(PassRefusedError, match="infinite or NaN") as told:
        graphopt.optimize(program, "fit-target{allow_no_match=true}, quantize", data=data)
    assert "test_quantize.py" in str(told.value)
    with pytest.raises(PassRefusedError, match="selected per token"):
        graphopt.optimize(captured("mixtral"), "fit-target, quantize", data=tokens())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.softmax(y.masked_fill(y < -0.5, torch.finfo(torch.float32).min), -1))


def test_a_value_that_loses_all_its_steps_to_a_mask_is_told() -> None:
    """Nothing is refused, and the loss may be within a budget: the report says where it comes from."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(4, 8)} for _ in range(4)]
    program = graphopt.capture(Masked().eval(), data[0])
    done = graphopt.optimize(program, "fit-target{allow_no_match=true}, quantize", data=data)
    (note,) = [n for n in done.history[-1]["plan"]["notes"] if "less than a step" in n]
    assert "masked_fill" in note and "test_quantize.py" in note


def test_a_matrix_that_is_looked_up_too_is_told(captured: Callable[[str], Program]) -> None:
    done = graphopt.optimize(captured("llama_tied"), "fit-target, quantize{weights=4}", data=tokens())
    (note,) = [n for n in done.history[-1]["plan"]["notes"] if "looked up as well as multiplied" in n]
    assert "16 bits with one scale" in note


def test_a_plan_without_roundings_of_inputs_and_matrices_is_refused(net: Program, tmp_path: Path) -> None:
    """What is read, too, must be stored: a file with matrices in floats would be refused by the device."""
    plan = _plan(net, images())
    plan.sites = [s for s in plan.sites if s.block != "x" and s["what"] != "matrix"]
    step = Quantize()
    done = net.copy()
    step.rewrite(done, plan)
    with pytest.raises(LoweringError, match="these values have no quantisation: x, which Conv"):
        done.lower("onnx", tmp_path / "a.onnx", sizes={})


def _plan(program: Program, data: Any) -> Plan:
    from graphopt.measure.context import Context
    from graphopt.passes.quantization.quantize import Quantize

    return Quantize().plan(program, Context(data))


@pytest.mark.parametrize(("bits", "weights"), [(8, 8), (16, 8), (16, 4)])
def test_files_hold_integers_and_every_pair(bits: int, weights: int, net: Program, tmp_path: Path) -> None:
    """What ONNX Runtime computes from the integers is what the program computes; wrong if a zero point or axis were off."""
    import onnx
    from onnx import numpy_helper

    done = quantized(net, images(), activations=bits, weights=weights)
    report = done.lower("onnx", tmp_path / "q.onnx", opset=21)
    assert report.nodes["DequantizeLinear"] >= pairs_in(done)
    model = onnx.load(tmp_path / "q.onnx")
    kinds = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer)
    assert kinds["INT8" if weights == 8 else "INT4"] >= 3
    known = {w.name: w.source.load() for w in done.weights.values()}
    scale = known["dense.weight_quantize_scale"]
    whole = known.get(
        "dense.weight_quantize_integers", (known["dense.weight"] / scale[:, None]).round()
    ).numpy()
    stored = [
        numpy_helper.to_array(t).astype(float)
        for t in model.graph.initializer
        if "dense_weight" in t.name or "dense.weight" in t.name
    ]
    assert any(numpy.array_equal(held, w) for held in stored for w in (whole, whole.T)), (
        "other integers are stored"
    )
    with pytest.raises(LoweringError, match="opset 21 or later"):
        done.lower("onnx", tmp_path / "old.onnx", opset=20)
    assert done.lower("onnx", tmp_path / "default.onnx").opset == 23


def test_a_quantised_decoder_is_one_file_for_any_runtime(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Masks and angles, which a device's host would compute, stay numbers in it; a rounding that is lost is noticed."""
    done = quantized(graphopt.optimize(captured("llama"), "fit-target"), tokens(), activations=8)
    report = done.lower("onnx", tmp_path / "q.onnx", opset=23)
    assert report.nodes["DequantizeLinear"] == pairs_in(done)
    bare = done.copy()
    table = next(n for n in bare.nodes if is_operator(n, "aten.embedding"))
    rounding = next(iter(table.users))
    rounding.replace_all_uses_with(table)
    bare.graph.erase_node(rounding)
    bare.changed()
    with pytest.raises(LoweringError, match="these values have no quantisation: Gather"):
        bare.lower("onnx", tmp_path / "no.onnx", opset=23)


def test_a_table_that_is_a_head_as_well_is_stored_once(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Wrong if a tied decoder, which most small ones are, were refused, or its largest matrix written twice."""
    import onnx

    done = quantized(graphopt.optimize(captured("llama_tied"), "fit-target"), tokens(), activations=8)
    report = done.lower("onnx", tmp_path / "q.onnx")
    assert max(report.errors.values()) < 1e-5
    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    assert [list(t.dims) for t in graph.initializer].count([101, 32]) == 1
    assert not any(sorted(t.dims) == [32, 101] and list(t.dims) != [101, 32] for t in graph.initializer)


def test_roundings_by_their_shapes_write_the_same_file(
    captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if what only saves the exporter's time left something out of the file."""
    import contextlib

    from graphopt.backends.onnx import graph as onnx_graph
    from graphopt.ir.operators.library import KERNELS

    done = quantized(graphopt.optimize(captured("llama"), "fit-target"), tokens(), activations=8)
    before = dict(KERNELS)
    done.lower("onnx", tmp_path / "quick.onnx", opset=23)
    assert before == KERNELS, "a stand-in stayed behind"
    monkeypatch.setattr(onnx_graph, "_roundings_by_shape", contextlib.nullcontext)
    done.lower("onnx", tmp_path / "slow.onnx", opset=23)
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()


def test_host_and_device_together_are_the_program(captured: Callable[[str], Program]) -> None:
    program = graphopt.optimize(captured("llama"), "fit-target")
    fixed = with_sizes(program, fixed_sizes(program, {"batch": 2, "sequence": 8}, everything=True))
    parts = split(fixed)
    assert parts.host is not None
    assert not any(w.kind == "parameter" for w in parts.host.weights.values())
    assert "attention_mask" not in parts.device.signature.inputs
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 6:] = 0
    inputs = {
        "input_ids": tokens()[0]["input_ids"],
        "attention_mask": mask,
        "position_ids": torch.arange(8).expand(2, -1),
    }
    given_to = {n: v for n, v in inputs.items() if n in parts.host.signature.inputs}
    made = run(parts.host, given_to)
    taken = {n: v for n, v in {**inputs, **made}.items() if n in parts.device.signature.inputs}
    assert torch.allclose(run(parts.device, taken)["logits"], run(fixed, inputs)["logits"], atol=1e-6)


@needs_compiler
@pytest.mark.parametrize(("bits", "least"), [(8, 20.0), (16, 35.0)])
def test_a_quantised_decoder_on_the_npu(
    bits: int, least: float, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Every node is taken, and the simulator computes what ONNX Runtime does from the same integers."""
    done = quantized(graphopt.optimize(captured("llama"), "fit-target"), tokens(), activations=bits)
    report = done.lower("onnx", tmp_path / "out", target=NPU, check=True, sizes={"batch": 1, "sequence": 8})
    assert report.checked is not None
    assert report.checked.against_runtime["logits"] > least
    assert report.checked.against_float["logits"] > least - 10
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {
        "model.onnx",
        "model_host.onnx",
        "model_ctx.onnx",
    }


@needs_compiler
def test_prompt_and_step_with_caches_on_the_npu(captured: Callable[[str], Program], tmp_path: Path) -> None:
    """One program with fixed slots; the host makes masks, so that no cache is read for its length."""
    cached = graphopt.optimize(captured("llama"), "insert-cache{max_length=12}, fit-target")
    for count in (1, 6):
        sizes = {"batch": 1, "sequence": count}
        report = cached.lower("onnx", tmp_path / f"out{count}", target=NPU, check=True, sizes=sizes)
        assert report.checked is not None
        assert report.checked.against_float["logits"] > 40
        taken = {n for n in report.inputs if n.startswith("host_")}
        assert any("mask" in n for n in taken), "the mask is computed on the device"


@needs_compiler
@pytest.mark.parametrize("weights", [8, 4])
def test_a_quantised_network_on_the_npu(weights: int, net: Program, tmp_path: Path) -> None:
    done = quantized(net, images(batch=1), activations=8, weights=weights)
    report = done.lower(
        "onnx", tmp_path / "out", target=NPU, check=True, sizes=dict.fromkeys(net.signature.sizes, 1)
    )
    assert report.checked is not None
    assert min(report.checked.against_runtime.values()) > 20


def test_random_inputs_stay_within_the_ranges_of_calibration() -> None:
    """Wrong if a check gave a device numbers that its ranges cut off: it need not cut them off where ONNX Runtime does."""
    from graphopt.backends.checking.calibrated import within_ranges

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    batches = [{"input": 0.1 * torch.randn(32, 6)} for _ in range(4)]
    program = graphopt.capture(network, batches[0])
    made = graphopt.optimize(
        program, "fit-target{allow_no_match=true}, quantize{weights=8 activations=8}", data=batches
    )
    drawn = {"input": 50 * torch.randn(8, 6)}
    kept = within_ranges(made, drawn)["input"]
    ratio = drawn["input"] / kept
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)), "the pattern of the numbers changed"
    assert float(ratio[0, 0]) >= 64
    inside = {"input": 0.01 * torch.randn(8, 6)}
    assert torch.equal(within_ranges(made, inside)["input"], inside["input"])
