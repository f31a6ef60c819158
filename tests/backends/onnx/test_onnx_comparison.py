"""What lowering compares: files with planted faults are refused, whatever the fault hides behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.checking.cases import Case, comparison_cases
from graphopt.backends.onnx import model as onnx_model
from graphopt.ir.errors import LoweringError
from graphopt.ir.facts import Quantized
from graphopt.ir.program import Dial, Program
from graphopt.ir.schema import is_operator

NPU = "qnn-htp-v75"
aten = torch.ops.aten
Change = Callable[[Program], None]


def read_instead(program: Program, node: Any, make: Callable[[Any], Any]) -> None:
    """Let what reads a value read something made of it."""
    with program.edit.after(node):
        made = make(node)
    for user in [u for u in node.users if u is not made and made not in u.users]:
        user.replace_input_with(node, made)
    program.changed()


def planted(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Write the graph of a program that was changed."""
    honest = onnx_model.build_graph

    def build(program: Program, opset: int, kernels: bool = False) -> Any:
        other = program.copy()
        change(other)
        return honest(other, opset, kernels)

    monkeypatch.setattr(onnx_model, "build_graph", build)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("passes", ["insert-cache{max_length=12}", "insert-cache"])
def test_a_cache_that_is_not_read_is_noticed(
    passes: str,
    count: int,
    captured: Callable[[str], Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the beginning of a text caches are empty: only behind what they hold does a fault show."""
    cached = graphopt.optimize(captured("llama"), passes)

    def forget(program: Program) -> None:
        for node in list(program.nodes):
            if is_operator(node, "graphopt.cache_visible"):
                slots = node.meta["val"].shape[-1]

                def first(seen: Any, slots: Any = slots) -> Any:
                    call = program.edit.call
                    size = program.size_nodes([slots])[0] if not isinstance(slots, int) else slots
                    below = call(aten.lt.Scalar, call(aten.arange.default, size), count)
                    return call(aten.logical_and.default, seen, below)

                read_instead(program, node, first)

    sizes = {"batch": 1, "sequence": count, **({} if "max" in passes else {"capacity": 12})}
    cached.lower("onnx", tmp_path / "honest.onnx", sizes=sizes)
    planted(monkeypatch, forget)
    with pytest.raises(LoweringError, match="after what caches hold"):
        cached.lower("onnx", tmp_path / "a.onnx", sizes=sizes)


def test_parts_are_compared_as_what_they_are_together(
    captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that computes another function agrees with itself."""
    program = captured("llama")
    total = sum(w.bytes for w in program.weights.values())
    honest = onnx_model.in_parts

    def other(whole: Program, most: int) -> list[Program]:
        parts = honest(whole, most)
        given = parts[1].input_nodes["part_1"]
        read_instead(parts[1], given, lambda node: parts[1].edit.call(aten.mul.Tensor, node, 1.01))
        return parts

    monkeypatch.setattr(onnx_model, "in_parts", other)
    with pytest.raises(LoweringError, match="logits"):
        program.lower(
            "onnx", tmp_path / "out", sizes={"batch": 2, "sequence": 6}, part_bytes=int(0.6 * total)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0, 8, 16])
def test_what_a_host_computes_is_compared_too(
    bits: int, captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask lets the last token see the first no more, in a graph that only the host runs."""
    program = graphopt.optimize(captured("llama"), "fit-target")
    if bits:
        generator = torch.Generator().manual_seed(3)
        data = [{"input_ids": torch.randint(3, 100, (2, 8), generator=generator)} for _ in range(6)]
        program = graphopt.optimize(program, f"quantize{{activations={bits}}}", data=data)
    sizes = {"batch": 1, "sequence": 8}
    program.lower("onnx", tmp_path / "honest", sizes=sizes, target=NPU)

    def hide(host: Program) -> None:
        for node in list(host.nodes):
            if is_operator(node, "graphopt.additive_mask"):
                more = torch.zeros([1, 1, *node.meta["val"].shape[2:]])
                more[..., -1, :4] = -1000.0
                held = host.edit.add_weight("more", more, kind="buffer")

                def further(seen: Any, held: Any = held) -> Any:
                    return host.edit.call(aten.add.Tensor, seen, held)

                read_instead(host, node, further)

    planted(monkeypatch, hide)
    with pytest.raises(LoweringError, match="differs from the program"):
        program.lower("onnx", tmp_path / "out", sizes=sizes, target=NPU)


class Masked(nn.Module):
    """Attention over what a mask of truths hides, in torch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, hidden_mask: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, key_padding_mask=hidden_mask, need_weights=False)[0]


def test_masks_of_either_sense_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True hides here: with all of it true nothing would be seen, and a file that ignores it would pass."""
    inputs = {"x": torch.randn(2, 6, 8), "hidden_mask": torch.zeros(2, 6, dtype=torch.bool)}
    inputs["hidden_mask"][0, 4:] = True
    program = graphopt.capture(Masked().eval(), inputs)
    program.lower("onnx", tmp_path / "honest.onnx")
    assert sum("another hidden_mask" in c.label for c in comparison_cases(program, {}, False)) == 1

    def ignore(other: Program) -> None:
        node = other.input_nodes["hidden_mask"]
        read_instead(
            other, node, lambda mask: other.edit.call(aten.logical_and.default, mask, off(other, mask))
        )

    def off(other: Program, mask: Any) -> Any:
        return other.edit.call(aten.zeros_like.default, mask)

    planted(monkeypatch, ignore)
    with pytest.raises(LoweringError, match="with another hidden_mask"):
        program.lower("onnx", tmp_path / "a.onnx")


def test_a_dial_that_does_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), torch.randn(2, 4)).copy()
    dial = program.add_dial("strength", Dial(1.0, 0.0, 2.0))
    out = program.outputs["output"]
    with program.edit.after(out):
        value = program.edit.call(aten.to.dtype, dial, torch.float32)
        made = program.edit.call(aten.mul.Tensor, out, value)
    program.edit.set_outputs([made])
    program.lower("onnx", tmp_path / "honest.onnx")

    def still(other: Program) -> None:
        node = other.input_nodes["strength"]
        read_instead(other, node, lambda d: other.edit.call(aten.ones_like.default, d))

    planted(monkeypatch, still)
    with pytest.raises(LoweringError, match="strength 0"):
        program.lower("onnx", tmp_path / "a.onnx")


class Huge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x)
        return y.masked_fill(y < 0, torch.finfo(torch.float32).min)


def test_one_huge_value_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors beside the largest value would be nothing beside a mask's."""
    program = graphopt.capture(Huge().eval(), torch.randn(8, 6))
    program.lower("onnx", tmp_path / "honest.onnx")

    def wrong(other: Program) -> None:
        node = next(n for n in other.nodes if is_operator(n, "aten.linear"))
        read_instead(other, node, lambda y: other.edit.call(aten.mul.Tensor, y, 1.1))

    planted(monkeypatch, wrong)
    with pytest.raises(LoweringError, match="differs from the program"):
        program.lower("onnx", tmp_path / "a.onnx")


@pytest.mark.parametrize(("factor", "what"), [(0.0, "down_proj"), (0.9, "o_proj"), (0.9, "lm_head")])
def test_wrong_steps_of_a_quantised_file_are_noticed(
    factor: float,
    what: str,
    captured: Callable[[str], Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sixteen bits differ by little from one runtime to another, so that little is accepted."""
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(3, 100, (2, 8), generator=generator)} for _ in range(8)]
    program = graphopt.optimize(captured("llama"), "fit-target, quantize{activations=16}", data=data)
    program.lower("onnx", tmp_path / "honest.onnx", sizes={"batch": 2, "sequence": 8})

    def rescale(other: Program) -> None:
        for name, weight in list(other.weights.items()):
            if weight.name.endswith("quantize_scale") and what in weight.name:
                node = next(n for n in other.weight_nodes if n.name == name)
                read_instead(other, node, lambda s: other.edit.call(aten.mul.Tensor, s, max(factor, 1e-6)))

    planted(monkeypatch, rescale)
    with pytest.raises(LoweringError, match="differs from the program"):
        program.lower("onnx", tmp_path / "a.onnx", sizes={"batch": 2, "sequence": 8})


def test_reference_that_is_no_number_is_no_agreement() -> None:
    from graphopt.backends.onnx.qnn.measures import signal_to_noise

    assert signal_to_noise(numpy.ones(3), numpy.array([1.0, numpy.nan, 1.0])) == -200.0


class Cancelling(torch.nn.Module):
    """What is left of large values: float32 keeps three digits of it."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight + self.size).sin()


@pytest.mark.parametrize(("size", "share", "holds"), [(3e3, 3, True), (3e3, 40, False), (0.0, 3, False)])
def test_errors_count_beside_what_the_type_costs_the_program_itself(
    size: float, share: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.onnx import compare as onnx_compare

    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    program = graphopt.capture(Cancelling(size), x)
    (name,) = program.outputs
    own = program(x)
    lost = float(
        (own.detach().double() - Cancelling(3e3).double()(x.double()).detach()).abs().max() / own.abs().max()
    )
    error = share * lost if size else share * 1e-4
    found = own + error * own.abs().max() * torch.tensor([1.0, -1.0]).repeat(4)
    monkeypatch.setattr(onnx_compare, "_results", lambda paths, cases, *_: [{name: found.detach().numpy()}])
    case = Case("a case", {next(iter(program.signature.inputs)): x})
    if holds:
        assert error > 1e-4, "the case must need the room"
        assert onnx_compare.compare_with_runtime([], program, [case])[name] == pytest.approx(error, rel=0.3)
    else:
        with pytest.raises(LoweringError, match="differs from the program"):
            onnx_compare.compare_with_runtime([], program, [case])


@pytest.mark.parametrize(
    ("own", "lost", "taken"),
    [(0.03, 0.2, True), (0.02, 0.2, False), (0.03, 0.04, False), (float("nan"), 0.2, False)],
)
def test_a_deep_quantised_program_is_judged_beside_its_own_arithmetic(
    own: float, lost: float, taken: bool, captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that is 0.05 away is right where the program in float64 is about as far, and never beyond all that was lost."""
    from graphopt.backends.onnx import compare as onnx_compare

    program = captured("llama").copy()
    program.facts.add(Quantized(weights=8, activations=16))
    inputs = program.bind((), {"input_ids": torch.arange(3, 15).reshape(2, 6)})
    errors = iter([0.05, own])
    monkeypatch.setattr(onnx_compare, "without_rounding", lambda program: program)
    monkeypatch.setattr(
        onnx_compare, "_results", lambda paths, cases, *_: [{"logits": numpy.zeros((2, 6, 101))}]
    )
    monkeypatch.setattr(onnx_compare, "_error", lambda *_: next(errors))
    monkeypatch.setattr(
        onnx_compare, "_quantization_loss", lambda *_: onnx_compare._QuantizationLoss(lost, 1e-4)
    )
    case = Case("rows", inputs, None)
    if taken:
        assert onnx_compare.compare_with_runtime([], program, [case]) == {"logits": 0.05}
    else:
        with pytest.raises(LoweringError, match=r"logits: 5.00e-02 on rows"):
            onnx_compare.compare_with_runtime([], program, [case])
