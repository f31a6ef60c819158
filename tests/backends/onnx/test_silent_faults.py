"""What an NPU's compiler takes and computes wrongly without a word: each is refused beforehand, or never written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphopt
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Program

NPU = "qnn-htp-v75"


class Through(nn.Module):
    """A layer, one operator, a layer."""

    def __init__(self, operator: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.operator = nn.Linear(8, 8), nn.Linear(8, 4), operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.operator(torch.sigmoid(self.first(x)) + 0.2))


def quantized(
    module: nn.Module, activations: int, weights: int = 8, shape: tuple[int, ...] = (1, 8)
) -> Program:
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(*shape, generator=generator)} for _ in range(4)]
    program = graphopt.capture(module.eval(), data[0])
    return graphopt.optimize(
        program,
        f"fit-target{{allow_no_match=true}}, quantize{{weights={weights} activations={activations}}}",
        data=data,
    )


@pytest.mark.parametrize(
    ("operator", "activations", "said"),
    [
        (torch.reciprocal, 8, "computes Reciprocal wrongly in w8a8"),
        (torch.reciprocal, 16, "computes Reciprocal wrongly in w8a16"),
        (torch.log, 16, "computes Log wrongly in w8a16"),
        (lambda x: x.cumsum(-1), 8, "computes CumSum wrongly in w8a8"),
    ],
)
def test_operators_that_come_out_wrong_are_refused(
    operator: Any, activations: int, said: str, tmp_path: Path
) -> None:
    """For ONNX Runtime the file is right; for the device it is refused by the line of the model."""
    program = quantized(Through(operator), activations)
    program.lower("onnx", tmp_path / "plain.onnx", opset=23)
    with pytest.raises(LoweringError, match=said) as told:
        program.lower("onnx", tmp_path / "out", target=NPU, sizes={})
    assert "test_silent_faults.py" in told.value.message


def test_a_norm_of_its_own_is_no_reciprocal(captured: Callable[[str], Program], tmp_path: Path) -> None:
    """RMS norms are one node, whatever the model spelled: a product with a reciprocal root would be lost."""
    program = graphopt.optimize(captured("llama"), "fit-target")
    report = program.lower("onnx", tmp_path / "out", target=NPU, sizes={"batch": 1, "sequence": 8})
    assert report.nodes["RMSNormalization"] == 5
    assert not {"Reciprocal", "Sqrt", "Pow"} & set(report.nodes)


def test_caches_are_stored_without_scattering(captured: Callable[[str], Program], tmp_path: Path) -> None:
    """Quantised scatters lose half of sixteen bits; a product with ones and zeros loses nothing."""
    program = graphopt.optimize(captured("llama"), "insert-cache{max_length=12}, fit-target")
    report = program.lower("onnx", tmp_path / "out", target=NPU, sizes={"batch": 1, "sequence": 4})
    assert not [name for name in report.nodes if name.startswith("Scatter")]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(torch.relu(x))).mean((2, 3)))


def test_four_bits_have_no_zero_point_and_are_no_norms(tmp_path: Path) -> None:
    """Zero points in four bits cost 10 dB and more, parameters of batch norms everything."""
    program = quantized(Normed(), 16, weights=4, shape=(1, 3, 8, 8))
    program.lower("onnx", tmp_path / "q.onnx", opset=23, sizes={})
    graph = onnx.load(tmp_path / "q.onnx").graph
    few = {
        t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT4
    }
    assert few
    restored = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in few}
    assert len(restored) == 2
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in few:
            zero = [few[name] for name in node.input[2:] if name in few]
            constants = [
                numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.output[0] in node.input[2:]
            ]
            assert all(not numpy.asarray(z, "float32").any() for z in [*zero, *constants])
        if node.op_type == "BatchNormalization":
            assert not restored & set(node.input), "a batch norm has four bits"


def test_masks_leave_room_for_scores(captured: Callable[[str], Program]) -> None:
    """With minus infinity in a sum of scores and mask, all scores would share one step."""
    generator = torch.Generator().manual_seed(3)
    data = [
        {
            "input_ids": torch.randint(3, 100, (2, 8), generator=generator),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        }
        for _ in range(4)
    ]
    for batch in data:
        batch["attention_mask"][1, 5:] = 0
    done = graphopt.optimize(captured("llama"), "fit-target, quantize{activations=8}", data=data)
    sites = [s for s in done.history[-1]["plan"]["sites"] if "scale" in s]
    assert max(s["scale"] for s in sites) * 255 < 101, "a range holds more than the mask needs"
