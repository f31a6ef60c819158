"""How fusing affects a kernel in eight bits: ranges of its channels, expected signal-to-noise ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.errors import GraphoptError
from ...ir.program import Program
from ...ir.schema import is_operator
from .forms import Form
from .reading import CONVOLUTIONS
from .writing import OnTensors


@dataclass(frozen=True)
class Ranges:
    """Ranges of a kernel's output channels and its noise in int8.

    Args:
        spread: largest over median of the channels' largest absolute weights.
        per_tensor: signal-to-noise of the median channel in decibels, symmetric, one step for the whole kernel.
        per_channel: the same with one step per channel.
    """

    spread: float
    per_tensor: float
    per_channel: float


def ranges(kernel: torch.Tensor) -> Ranges:
    """Return ranges and noise of a kernel (outputs, ...), with rounding modelled as uniform noise, step²/12."""
    flat = kernel.reshape(kernel.shape[0], -1).double()
    maxima = flat.abs().amax(1)
    power = flat.square().mean(1)
    steps = maxima / 127
    nonzero = power > 0
    if not bool(nonzero.any()):
        return Ranges(1.0, math.inf, math.inf)

    def decibels(step: torch.Tensor) -> float:
        ratio = power[nonzero] / (step.expand_as(power)[nonzero].square() / 12)
        return float((10 * ratio.log10()).median())

    spread = float(maxima.max() / maxima[nonzero].median())
    return Ranges(spread, decibels(steps.max()), decibels(steps))


def compare(program: Program, form: Form) -> tuple[Ranges, Ranges] | None:
    """Return the ranges of a group's largest kernel and of the fused one; None if weights are absent."""
    reader = OnTensors(program)
    inner = [n for n in form.nodes if is_operator(n, *CONVOLUTIONS)]
    if not inner:
        return None
    try:
        largest = max(inner, key=lambda n: (n.args[1].meta["val"].numel(), n.name))  # type: ignore[union-attr]
        weight = largest.args[1]
        assert isinstance(weight, fx.Node)
        return ranges(reader(weight)), ranges(form.build(reader)[0])
    except (GraphoptError, OSError):
        return None


def described(name: str, before: Ranges, after: Ranges) -> str:
    """Return one line for a report."""
    return (
        f"{name}: channel ranges (largest to median) {before.spread:.1f} -> {after.spread:.1f}; int8 signal-to-noise "
        f"per tensor {before.per_tensor:.0f} -> {after.per_tensor:.0f} dB, "
        f"per channel {before.per_channel:.0f} -> {after.per_channel:.0f} dB"
    )
