"""Random inputs for a quantised program, kept within the calibrated ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...ir.facts import Quantized
from ...ir.operators.quantize import INTEGERS
from ...ir.program import Program
from ...ir.running.execute import interpret, run
from ...ir.schema import arguments, is_operator

CUT_OFF = {8: 0.15, 16: 0.01}
"""Largest norm of the clipped part of a value relative to the value, by bits; at eight bits, rounding hides smaller
ones."""


def within_ranges(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs scaled down until hardly any value is clipped, with recurrent state taken from a real step.

    A compiler does not clip between the operators that it fuses, ONNX Runtime does: outside the calibrated ranges the
    two differ by more than rounding. Recurrent state is the output of a step, since that is what its ranges were
    calibrated on.

    Args:
        program: a quantised program.
        inputs: random inputs by name; tokens, masks and run-time settings are not changed.
    """
    carried = [name for name in program.signature.inputs if f"next_{name}" in program.outputs]
    initial = inputs | {name: torch.zeros_like(inputs[name]) for name in carried}
    numbers = [n for n, v in initial.items() if v.is_floating_point() and v.dim() and n not in carried]
    always = _cut_off(program, initial | {n: torch.zeros_like(initial[n]) for n in numbers})
    bits = program.facts[Quantized].activations
    most = CUT_OFF.get(bits, 0.01)
    for halvings in range(8):
        smaller = initial | {n: initial[n] * 0.5**halvings for n in numbers}
        outputs = run(program, smaller) if carried else {}
        smaller |= {name: outputs[f"next_{name}"] for name in carried}
        if not numbers:
            break
        shares = _cut_off(program, smaller)
        if all(share <= always[node] + most for node, share in shares.items()):
            break
    return smaller


def _cut_off(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[fx.Node, float]:
    """Return the norm of the part of each value that its range clips, relative to the value."""
    ranges: dict[fx.Node, tuple[float, float]] = {}
    for node in program.nodes:
        if is_operator(node, "graphopt.fake_quantize"):
            args = arguments(node)
            low, high = INTEGERS[args["dtype"]]
            # up to half a step beyond the range is rounding
            ranges[args["x"]] = (
                (low - args["zero_point"] - 0.5) * args["scale"],
                (high - args["zero_point"] + 0.5) * args["scale"],
            )
    shares: dict[fx.Node, float] = {}

    def hook(node: fx.Node, value: Any) -> Any:
        if node in ranges and isinstance(value, torch.Tensor):
            low, high = ranges[node]
            wide = value.double()
            shares[node] = float((wide - wide.clamp(low, high)).norm() / wide.norm().clamp(min=1e-30))
        return value

    interpret(program, inputs, hook=hook)
    return shares
