"""Ranges of values on calibration data, and the steps that come of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.errors import PassRefusedError
from ...ir.program import Program
from ...ir.running.execute import interpret
from ...ir.running.recurrent_state import in_steps, states_of

if TYPE_CHECKING:
    from ...measure.context import Context


_SAMPLE = 1 << 20
"""Numbers of a value of which the middle one is sought; sorted are several copies, and logits are many."""


@dataclass
class Ranges:
    """What calibration met.

    Attributes:
        of: least and largest number of each value.
        usual: what half of the numbers of each value that are not zero are below, on the first of the data.
        silent: for values whose features were asked for, which of them were zero throughout.
    """

    of: dict[fx.Node, tuple[float, float]] = field(default_factory=dict)
    usual: dict[fx.Node, float] = field(default_factory=dict)
    silent: dict[fx.Node, torch.Tensor] = field(default_factory=dict)


def watch(
    program: Program, context: Context, see: Callable[[fx.Node, torch.Tensor], None], what: str
) -> None:
    """Show every value that a program computes on calibration data, inputs included; caches and states are carried."""

    def hook(node: fx.Node, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.numel():
            see(node, value)
        return value

    def step(inputs: dict[str, torch.Tensor]) -> Mapping[str, Any]:
        for name, node in program.input_nodes.items():
            if name in inputs:
                hook(node, inputs[name])
        return interpret(program, inputs, hook=hook)

    batches, carries = context.batches(), bool(states_of(program))
    context.progress.start(what, len(batches))
    try:
        for batch in batches:
            inputs = context.bound(program, batch)
            if carries:
                in_steps(program, inputs, step)
            else:
                step(inputs)
            context.progress.step()
    finally:
        context.progress.done()


def observe(
    program: Program, context: Context, values: list[fx.Node], features: Mapping[fx.Node, int]
) -> Ranges:
    """Return the ranges of values, and which features of some were never anything but zero.

    Args:
        program: not changed.
        context: with calibration data.
        values: to be stored in few bits.
        features: the dimension of features of values that matrices read.
    """
    watched, ranges = set(values), Ranges()

    def see(node: fx.Node, value: torch.Tensor) -> None:
        if node in watched:
            low, high = (float(v) for v in value.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise PassRefusedError(
                    f"{node.name} is infinite or no number on calibration data, for which integers have no step",
                    hint="a mask of minus infinity: let it be a large number; else the data or the model is broken",
                    node=node.name, source=program.source_line(node),
                )  # fmt: skip
            if node not in ranges.usual:
                flat = value.reshape(-1)
                flat = flat[:: -(-flat.numel() // _SAMPLE)]
                numbers = flat[flat != 0].abs()
                ranges.usual[node] = float(numbers.median()) if numbers.numel() else 0.0
            before = ranges.of.get(node, (low, high))
            ranges.of[node] = (min(low, before[0]), max(high, before[1]))
        if node in features:
            others = [d for d in range(value.dim()) if d != features[node] % value.dim()]
            zero = (value == 0).all(dim=others) if others else value == 0
            ranges.silent[node] = ranges.silent[node] & zero if node in ranges.silent else zero

    watch(program, context, see, "observing ranges")
    for name in states_of(program):
        # what comes back has the steps it left with, or it would be rounded anew at every token
        pair = [program.input_nodes[name], program.outputs[f"next_{name}"]]
        pair_ranges = [ranges.of[node] for node in pair if node in ranges.of]
        for node in pair:
            if node in ranges.of:
                ranges.of[node] = (min(low for low, _ in pair_ranges), max(high for _, high in pair_ranges))
    return ranges


def scale_of(low: float, high: float, steps: int) -> tuple[float, int]:
    """Return what a step is worth, and the integer of zero, for a range that is made to have zero in it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-8) / steps
    return scale, round(-low / scale)
