"""Numbers that the graph computes from weights alone, such as scales and the fill values of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..running.evaluate import needed_for
from ..running.execute import interpret

if TYPE_CHECKING:
    from ..program import Program


def depends_on(node: fx.Node) -> set[fx.Node]:
    """Return the placeholders that a value is computed from."""
    return {n for n in needed_for([node], {}) if n.op == "placeholder"}


def constant(program: Program, value: Any) -> float | None:
    """Return a value as a number, also if it is a constant tensor of one element; None if it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    if value.meta["val"].numel() != 1 if all(isinstance(s, int) for s in value.meta["val"].shape) else True:
        return None
    if value.name in program.weights:
        weight = program.weights[value.name]
        return None if weight.trainable else float(weight.source.load())
    sources = depends_on(value)
    if any(n.name not in program.weights or program.weights[n.name].trainable for n in sources):
        return None
    return float(interpret(program, {}, record=[value], stop=True)[value.name])
