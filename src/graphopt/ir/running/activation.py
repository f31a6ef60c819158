"""Recognition of the activation between two projections, by evaluating it on random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..operators.activations import ACTIVATIONS, activate, gated_by
from ..schema import is_operator
from .evaluate import evaluate, needed_for


def plain_region(target: fx.Node, sources: list[fx.Node]) -> set[fx.Node] | None:
    """Return the nodes that compute a value from ``sources``; None if it also reads an input or a weight."""
    region = needed_for([target], dict.fromkeys(sources))
    if any(n.op == "placeholder" for n in region if n not in sources):
        return None
    return region


def run_region(
    target: fx.Node, known: Mapping[fx.Node, torch.Tensor], region: set[fx.Node]
) -> torch.Tensor | None:
    """Return the value of a region, computed in the type of the given values; None where an operator rejects them."""
    values: dict[fx.Node, Any] = dict(known)
    for node in target.graph.nodes:
        if node in region and node not in known:
            if is_operator(node, "aten.to"):
                values[node] = values[node.args[0]]
                continue
            try:
                values[node] = evaluate(node, values)
            except (RuntimeError, KeyError):
                return None
    result = values.get(target)
    return result if isinstance(result, torch.Tensor) else None


def constants(region: set[fx.Node]) -> list[float]:
    """Return 0, 1 and the numbers that the region's operators are called with."""
    numbers = {0.0, 1.0}
    for node in region:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.add(float(value))
    return sorted(numbers)


def clamps(activation: str, region: set[fx.Node]) -> list[tuple[float, float]]:
    """Return the pairs of limit and alpha to try."""
    if activation == "gelu_tanh":
        return [(0.0, 1.0), *((0.0, n) for n in constants(region) if 0.797 < n < 0.799)]
    if not activation.endswith(("_clamped", "_softcapped")):
        return [(0.0, 1.0)]
    positive = [n for n in constants(region) if n > 0]
    if activation == "silu_clamped":
        return [(limit, 1.0) for limit in positive]
    return [(limit, alpha) for limit in positive for alpha in positive]


def activation_between(up: fx.Node, gate: fx.Node | None, hidden: fx.Node) -> dict[str, Any] | None:
    """Return ``activation``, ``limit`` and ``alpha`` of ``hidden = activation(gate) * up``; None if none matches."""
    sources = [up] if gate is None else [gate, up]
    region = plain_region(hidden, sources)
    if region is None:
        return None
    width = int(up.meta["val"].shape[-1])
    # a few channels are enough, unless the region depends on their number
    for size in dict.fromkeys((min(width, 64), width)):
        activation = _recognised(up, gate, hidden, region, size)
        if activation is not None:
            return activation
    return None


def _recognised(
    up: fx.Node, gate: fx.Node | None, hidden: fx.Node, region: set[fx.Node], width: int
) -> dict[str, Any] | None:
    generator = torch.Generator().manual_seed(0)
    shape = (*(2 + i for i in range(up.meta["val"].dim() - 1)), width)
    sources = [up] if gate is None else [gate, up]
    probes = {n: torch.randn(shape, generator=generator, dtype=torch.float64) * 6 for n in sources}
    actual = run_region(hidden, probes, region)
    if actual is None or actual.shape != torch.Size(shape):
        return None
    for activation in ACTIVATIONS:
        if activation == "swiglu_clamped" and gate is None:
            continue
        for limit, alpha in clamps(activation, region):
            first = probes[up] if gate is None else probes[gate]
            expected = gated_by(first, None if gate is None else probes[up], activation, limit, alpha)
            # the precision that sites are checked to afterwards
            if torch.allclose(expected, actual, rtol=1e-12, atol=1e-12):
                return {"activation": activation, "limit": limit, "alpha": alpha}
    return None


def activation_of_experts(source: fx.Node, target: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of ``graphopt.routed_ffn`` for the activation between two projections; None if none fit.

    Args:
        source: (..., inner or 2 * inner), with the gate, if there is one, in one half or in every other channel.
        target: (..., inner), what the second projection reads.
    """
    size = source.meta["val"].shape[-1]
    region = plain_region(target, [source])
    if not isinstance(size, int) or region is None:
        return None
    shape = [5, *(2 for _ in range(source.meta["val"].dim() - 2)), size]
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    actual = run_region(target, {source: probe}, region)
    if actual is None:
        return None
    for activation in ACTIVATIONS:
        for gated, interleaved in ((True, False), (True, True), (False, False)):
            if activation == "swiglu_clamped" and not gated:
                continue
            for limit, alpha in clamps(activation, region):
                expected = activate(probe, activation, gated, interleaved, limit, alpha)
                if expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-9, atol=1e-9):
                    return {
                        "activation": activation,
                        "gated": gated,
                        "interleaved": interleaved,
                        "limit": limit,
                        "alpha": alpha,
                    }
    return None
