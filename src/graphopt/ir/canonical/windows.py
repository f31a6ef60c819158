"""Candidate windows of a mask, from the arguments of its operators, and masks with shortened windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..running.evaluate import needed_for
from ..running.region import cut

if TYPE_CHECKING:
    from ..program import Program

Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Computes a mask from inputs by name."""

HIDDEN = -1e4
_LARGEST_SHORT = 400


def candidate_windows(program: Program, mask: fx.Node) -> list[int]:
    """Return candidates for windows: numbers among the arguments of the mask's operators, and their neighbours."""
    windows: set[int] = set()
    for node in needed_for([mask], {}):
        for number in _numbers(program, node):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            # fill values that hide scores are not windows
            if 1 < abs(number) < 2**20 and not (number <= HIDDEN and _of_floats(node)):
                windows.update((int(abs(number)) - 1, int(abs(number)), int(abs(number)) + 1))
    return sorted(w for w in windows if w > 0)


def _numbers(program: Program, node: fx.Node) -> list[Any]:
    numbers: list[Any] = [*node.args, *node.kwargs.values()]
    if node.name in program.weights and not node.meta["val"].dim():
        numbers.append(program.weights[node.name].source.load().item())
    return numbers


def shortened(program: Program, mask: fx.Node, longest: int) -> tuple[Run, list[int], dict[int, int]] | None:
    """Return the same mask with long windows replaced by short ones, so that short rows are enough to recognise it.

    Integers above ``longest`` in integer arithmetic and comparisons are replaced; other numbers, such as fill values,
    are not. Every long number gets a different short one, in the same order and above all others.

    Returns:
        A function that computes the mask, its candidates for windows, and the long number for each short one; None if
        there are too many.
    """
    region = cut(program, [mask], lambda n: False)
    scalars = {
        n.name: program.weights[n.name].source.load()
        for n in region.weights
        if not n.meta["val"].dim() and not n.meta["val"].dtype.is_floating_point
    }
    numbers: set[int] = {int(abs(value)) for value in scalars.values()}
    for node in region.operators:
        if not _of_floats(node):
            numbers.update(abs(a) for a in (*node.args, *node.kwargs.values()) if type(a) is int)
    short = {n for n in numbers if 1 < n <= longest}
    first = max(short, default=1) + 8
    replacements = {n: first + 8 * i for i, n in enumerate(sorted(n for n in numbers if longest < n < 2**20))}
    if not replacements or max(replacements.values()) > _LARGEST_SHORT:
        return None

    def swap(value: Any) -> Any:
        if type(value) is int and abs(value) in replacements:
            return replacements[abs(value)] * (1 if value > 0 else -1)
        return value

    for node in region.graph.nodes:
        if node.op == "call_function" and not _of_floats(node):
            node.args = tuple(swap(a) for a in node.args)
            node.kwargs = {k: swap(v) for k, v in node.kwargs.items()}

    def load(node: fx.Node) -> torch.Tensor:
        if node.name in scalars:
            return torch.tensor(swap(int(scalars[node.name])), dtype=scalars[node.name].dtype)
        return program.weights[node.name].source.load()

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return region.run({n.name: inputs[str(n.meta["input"])] for n in region.leaves}, load)[0]

    candidates = {number + d for number in (*short, *replacements.values()) for d in (-1, 0, 1)}
    return run, sorted(candidates), {s: n for n, s in replacements.items()}


def _of_floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
