"""Peak memory of activations: which values are alive while each operator runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from ..operators.work import Size
from .resolve import Numbers
from .survey import survey

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class Peak:
    """The moment at which a program needs most memory.

    Attributes:
        bytes: of all values alive then; weights and what is folded from them excluded.
        node: the operator that runs then.
        alive: bytes of each value alive then, by node name, largest first.
    """

    bytes: int
    node: str
    alive: dict[str, int]


def peak_memory(program: Program, sizes: Mapping[str, int] | None = None) -> Peak:
    """Return the peak of activation memory, run in the graph's order; linear in its size.

    A value is alive from the operator that writes it to the last that reads it or a view of it. Inputs
    belong to the caller and stay throughout; outputs stay to the end. An operator's own scratch memory and
    reuse of an operand's memory for its result are not counted.

    Args:
        program: the program.
        sizes: sizes by name; the others as at capture.
    """
    return find_peak(program, Numbers(program, sizes))


def find_peak(program: Program, number: Callable[[Size], int]) -> Peak:
    """Return the peak of activation memory with sizes given by a function."""
    calls = survey(program)
    nodes = list(program.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    end = len(nodes) - 1
    born: dict[fx.Node, int] = {}
    dies: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        if node.op == "output" or node in calls.constant:
            continue
        base = calls.base[node]
        if base in calls.constant or not calls.operands[node]:
            continue
        is_input = node.op == "placeholder"
        if base is node:
            born[node] = 0 if is_input else index
        last = end if is_input else max((order[user] for user in node.users), default=index)
        dies[base] = max(dies.get(base, index), last)
    sizes = {node: sum(number(operand.bytes) for operand in calls.operands[node]) for node in born}
    change = [0] * (len(nodes) + 1)
    for node, first in born.items():
        change[first] += sizes[node]
        change[dies[node] + 1] -= sizes[node]
    best = now = at = 0
    for index in range(len(nodes)):
        now += change[index]
        if now > best:
            best, at = now, index
    alive = {node.name: sizes[node] for node in born if born[node] <= at <= dies[node]}
    return Peak(best, nodes[at].name, dict(sorted(alive.items(), key=lambda item: -item[1])))
