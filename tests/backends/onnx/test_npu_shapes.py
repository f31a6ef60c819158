"""Models of several kinds on the NPU's simulator, none of their nodes elsewhere; forms that it needs, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from branch_networks import resnet

import graphopt
from graphopt.backends.onnx.qnn import run
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.running.recurrent_state import begun, in_steps
from graphopt.ir.schema import arguments, is_operator
from graphopt.targets.partition import host_nodes

NPU = "qnn-htp-v75"
FIT = "fold-norms{allow_no_match=true}, fit-target{allow_no_match=true}"
KINDS = {
    "bert": "", "vit": "", "convnext": "", "resnet": "fuse-branches{allow_no_match=true}", "skipped": "skip-layers{remove=1}",
    "nested": "split-ffn{widths=[1/2 1]}, freeze-dial{value=0.5}", "heads": "attach-multi-token-heads{heads=2}",
}  # fmt: skip
needs_compiler = pytest.mark.skipif(not run.available(), reason="onnxruntime-qnn is not installed")


def made(
    kind: str, captured: Callable[[str], Program]
) -> tuple[Program, dict[str, int], list[dict[str, torch.Tensor]]]:
    if kind == "resnet":
        torch.manual_seed(0)
        program = graphopt.capture(resnet().eval(), torch.randn(2, 3, 32, 32))
    else:
        program = captured(kind if kind in ("bert", "vit", "convnext") else "llama")
    sizes = {n: 1 if "batch" in n else min(16, r.high or 16) for n, r in program.signature.sizes.items()}
    if kind == "resnet":
        sizes = {n: 1 if "batch" in n else 32 for n in sizes}
    wide = {n: 4 if "batch" in n else s for n, s in sizes.items()}
    data = [example_inputs(program, wide, seed=s) for s in range(8)]
    return graphopt.optimize(program, ", ".join(p for p in (KINDS[kind], FIT) if p), data=data), sizes, data


@needs_compiler
@pytest.mark.parametrize("form", ["float16", "w8a16", "w8a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_simulated(
    kind: str, form: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Strictly: one node on the CPU, or a value that the simulator gets wrong, is a failure."""
    program, sizes, data = made(kind, captured)
    if form != "float16":
        program = graphopt.optimize(program, f"quantize{{activations={form[3:]}}}", data=data)
    report = program.lower("onnx", tmp_path / "out", target=NPU, check=True, sizes=sizes)
    assert report.checked is not None
    assert min(report.checked.against_float.values()) > (24 if form != "w8a16" else 30)


@needs_compiler
@pytest.mark.parametrize("count", [1, 5])
def test_caches_in_few_bits(count: int, captured: Callable[[str], Program], tmp_path: Path) -> None:
    data = [
        {"input_ids": torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(s))}
        for s in range(8)
    ]
    program = graphopt.optimize(
        captured("llama"), "insert-cache{max_length=16}, fit-target, quantize{activations=16}", data=data
    )
    report = program.lower(
        "onnx", tmp_path / "out", target=NPU, check=True, sizes={"batch": 1, "sequence": count}
    )
    assert report.checked is not None
    assert "ScatterElements" not in report.nodes, "quantised scatters are imprecise on this target"
    assert report.checked.against_runtime["logits"] > 35


@pytest.mark.parametrize("delta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("widths", ["[1/2 1]", "[1/4 1/2 1]"])
def test_widths_become_a_mask(widths: str, delta: float, captured: Callable[[str], Program]) -> None:
    llama = captured("llama")
    data = [example_inputs(llama, {"batch": 4, "sequence": 8})]
    nested = graphopt.optimize(
        llama, f"split-ffn{{widths={widths}}}, freeze-dial{{value={delta}}}", data=data
    )
    done = graphopt.optimize(nested, "fit-target")
    assert not done.operators["graphopt.nested_ffn"]
    assert not done.operators["graphopt.choose_width"]
    for batch, length in ((2, 9), (1, 3)):
        inputs = example_inputs(nested, {"batch": batch, "sequence": length}, padding="right")
        seen = inputs["attention_mask"].bool()
        assert torch.allclose(done(**inputs)["logits"][seen], nested(**inputs)["logits"][seen], atol=1e-5)


def test_a_dial_that_turns_is_refused(captured: Callable[[str], Program]) -> None:
    llama = captured("llama")
    data = [example_inputs(llama, {"batch": 4, "sequence": 8})]
    done = graphopt.optimize(llama, "split-ffn{widths=[1/2 1]}, fit-target", data=data)
    reasons = [r.reason for r in done.report.passes[-1].refused]
    assert any("freeze-dial" in reason for reason in reasons)
    assert done.operators["graphopt.nested_ffn"] == 2


def test_caches_are_stored_by_a_product_that_the_host_prepares(captured: Callable[[str], Program]) -> None:
    cached = graphopt.optimize(captured("llama"), "insert-cache{max_length=12}")
    done = graphopt.optimize(cached, "fit-target")
    assert not done.operators["graphopt.cache_store"]
    inputs = example_inputs(cached, {"batch": 2, "sequence": 5})
    expected, found = cached(**inputs), done(**inputs)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
    products = [n for n in done.nodes if str(n.target) == "aten.matmul.default"]
    host = host_nodes(done)
    assert len(products) == 4
    assert all(p.args[0] in host for p in products), "a comparison of integers is left to the device"


def test_calibration_runs_a_prompt_and_then_tokens(captured: Callable[[str], Program]) -> None:
    """What a step is given must be what the step before made, or ranges of caches are those of zeros."""
    cached = graphopt.optimize(captured("llama"), "insert-cache{max_length=12}")
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = begun(cached, {"input_ids": ids})
    assert batch["input_ids"].shape == (2, 12), "rows are longer than the cache"
    logits: list[torch.Tensor] = []

    def step(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = cached(**given)
        logits.append(found["logits"])
        return found

    in_steps(cached, batch, step)
    assert [part.shape[1] for part in logits] == [8, 1, 1, 1, 1]
    whole = captured("llama")(input_ids=ids[:, :12])["logits"]
    assert torch.allclose(torch.cat(logits, 1), whole, atol=1e-5)


class Spread(torch.nn.Module):
    """A depthwise convolution of nine entries with a dilation of 2, in one dimension or two, and others beside it."""

    def __init__(self, dims: int, kernel: int, dilation: int, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = torch.nn.Conv1d if dims == 1 else torch.nn.Conv2d
        self.first = kind(8, 8, kernel, padding="same", dilation=dilation, groups=groups)
        self.second = kind(8, 8, kernel, padding=2, stride=2, dilation=dilation, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_that_are_computed_wrongly_lose_their_dilation(dims: int) -> None:
    """Exact, site by site, and whole; others are left alone."""
    x = torch.randn(2, 8, *([40] * dims), dtype=torch.float64)
    module = Spread(dims, 9, 2, 8).double().eval()
    program = graphopt.capture(module, x)
    done = graphopt.optimize(program, "fit-target", verify="full", inputs=x)
    assert torch.allclose(done(x=x), module(x), atol=1e-12)
    name = f"aten.conv{dims}d"
    found = [n for n in done.nodes if is_operator(n, name)]
    assert len(found) == 2
    assert all(max(arguments(n)["dilation"]) == 1 for n in found)
    for kernel, dilation, groups in ((7, 2, 8), (9, 3, 8), (9, 2, 2)):
        other = graphopt.capture(Spread(dims, kernel, dilation, groups).eval(), x.float())
        assert graphopt.optimize(other, "fit-target{allow_no_match=true}").operators == other.operators


def test_those_that_are_left_are_refused_by_name(tmp_path: Path) -> None:
    """Without fit-target the file would be written, compiled and wrong, and only a check would know."""
    program = graphopt.capture(Spread(1, 9, 2, 8).eval(), torch.randn(1, 8, 40))
    with pytest.raises(LoweringError, match="2 nodes cannot go to") as told:
        program.lower("onnx", tmp_path / "out", target=NPU, sizes={})
    assert "fit-target writes them otherwise" in told.value.message
    assert "test_npu_shapes.py" in told.value.message


@needs_compiler
@pytest.mark.parametrize("dims", [1, 2])
def test_they_come_out_right_on_the_npu(dims: int, tmp_path: Path) -> None:
    x = torch.randn(1, 8, *([40] * dims))
    program = graphopt.capture(Spread(dims, 9, 2, 8).eval(), x)
    report = graphopt.optimize(program, "fit-target").lower(
        "onnx", tmp_path / "out", target=NPU, check=True, sizes={}
    )
    assert min(report.checked.against_float.values()) > 40
