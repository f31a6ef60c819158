"""Ranges of values on calibration data, and the resulting quantisation steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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
"""Largest sample of a value for its median, since sorting needs several copies and logits are large."""


@dataclass
class Ranges:
    """Ranges observed in calibration.

    Attributes:
        of: smallest and largest element of each value.
        usual: median magnitude of the non-zero elements of each value, on the first batch.
        silent: which of the watched features of a value were always zero.
    """

    of: dict[fx.Node, tuple[float, float]] = field(default_factory=dict)
    usual: dict[fx.Node, float] = field(default_factory=dict)
    silent: dict[fx.Node, torch.Tensor] = field(default_factory=dict)


def watch(
    program: Program, context: Context, see: Callable[[fx.Node, torch.Tensor], None], what: str,
    only: Iterable[fx.Node] | None = None,
) -> None:  # fmt: skip
    """Call ``see`` with values on calibration data, inputs included; caches and recurrent state are carried over.

    Args:
        program: not changed.
        context: with calibration data.
        see: called with each node and its value.
        what: is reported as progress.
        only: the nodes that matter; what these do not need, such as logits of every token, is not computed. All by default.
    """
    wanted = None if only is None else list(only)

    def hook(node: fx.Node, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.numel():
            see(node, value)
        return value

    def step(inputs: dict[str, torch.Tensor]) -> Mapping[str, Any]:
        for name, node in program.input_nodes.items():
            if name in inputs:
                hook(node, inputs[name])
        return interpret(program, inputs, hook=hook, only=None if carries else wanted)

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
    """Return the ranges of values, and which features of some were always zero.

    Args:
        program: not changed.
        context: with calibration data.
        values: to be stored in few bits.
        features: the feature dimension of values that matrices read.
    """
    watched, ranges = set(values), Ranges()

    def see(node: fx.Node, value: torch.Tensor) -> None:
        if node in watched:
            low, high = (float(v) for v in value.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise PassRefusedError(
                    f"{node.name} is infinite or NaN on calibration data, which integers cannot represent",
                    hint="use a large finite number for a mask of minus infinity; else the data or the model is broken",
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
    """Return the scale and zero point of a range, after extending it to include zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-8) / steps
    return scale, round(-low / scale)
