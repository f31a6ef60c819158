"""Second moments of what reaches each expert of a mixture, and of what its second matrix reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...ir.operators.activations import activate
from ...ir.program import Program
from ...ir.schema import argument, arguments
from .ranges import watch
from .values import constant_value

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass
class _Part:
    """Some experts of one stack of matrices, and the moments of their inputs so far."""

    layer: fx.Node
    name: str
    first: int
    last: int
    moments: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)


def expert_moments(
    program: Program, context: Context, matrices: Iterable[fx.Node], memory: int
) -> Iterator[tuple[fx.Node, int, Tensor, int]]:
    """Yield each expert's matrix that tokens reached, with the moments of its inputs.

    Args:
        program: not changed.
        context: with calibration data.
        matrices: stacks of experts' matrices that ``graphopt.routed_ffn`` reads.
        memory: bytes of moments at a time; each part of them takes a run over the data, and one expert's are always held.

    Yields:
        The stack, the expert's number, (inputs, inputs) in float64, and how many rows that is the sum of.
    """
    waves: list[list[_Part]] = [[]]
    held = 0
    for matrix in matrices:
        layer = next(u for u in matrix.users if u.op == "call_function" and "up" in arguments(u))
        name = "up" if argument(layer, "up") is matrix else "down"
        shape = matrix.meta["val"].shape
        inputs = int(shape[1] if argument(layer, "transposed") else shape[2])
        for expert in range(int(shape[0])):
            size = inputs * inputs * 8
            if held and held + size > memory:
                waves.append([])
                held = 0
            held += size
            last = waves[-1][-1] if waves[-1] else None
            if last is not None and last.layer is layer and last.name == name:
                last.last = expert + 1
            else:
                waves[-1].append(_Part(layer, name, expert, expert + 1))
    for number, wave in enumerate(waves):
        if not wave:
            continue
        by_layer: dict[fx.Node, list[_Part]] = {}
        for part in wave:
            by_layer.setdefault(part.layer, []).append(part)
        _gather(program, context, by_layer, f"inputs of experts, {number + 1} of {len(waves)}")
        for part in wave:
            matrix = argument(part.layer, part.name)
            for expert, moments in part.moments.items():
                yield matrix, expert, moments, part.rows[expert]


def _gather(program: Program, context: Context, by_layer: dict[fx.Node, list[_Part]], what: str) -> None:
    place = {n: number for number, n in enumerate(program.graph.nodes)}
    # what a layer reads is known when the last of its operands is: the layer itself is not computed for it
    known: dict[fx.Node, list[fx.Node]] = {}
    until: dict[fx.Node, fx.Node] = {}
    for layer in sorted(by_layer, key=place.__getitem__):
        operands = [argument(layer, n) for n in ("x", "experts", "weights")]
        last = max(operands, key=place.__getitem__)
        known.setdefault(last, []).append(layer)
        for operand in operands:
            until[operand] = max(until.get(operand, last), last, key=place.__getitem__)
    values: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if node not in until:
            return
        values[node] = value
        for layer in known.get(node, ()):
            for part in by_layer[layer]:
                _add(program, part, values)
        for operand in [n for n in values if until[n] is node]:
            del values[operand]

    watch(program, context, see, what, until)


def _add(program: Program, part: _Part, values: dict[fx.Node, Tensor]) -> None:
    given = arguments(part.layer)
    x, experts, weights = (values[given[n]] for n in ("x", "experts", "weights"))
    hidden_of = part.name == "down"
    up = constant_value(program, given["up"]) if hidden_of else None
    bias = (
        constant_value(program, given["up_bias"]) if hidden_of and given.get("up_bias") is not None else None
    )
    for expert in range(part.first, part.last):
        token, place = (experts == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        rows = x[token]
        if given["weigh_inputs"]:
            rows = rows * weights[token, place][:, None].to(rows.dtype)
        if up is not None:
            matrix = up[expert].mT if given["transposed"] else up[expert]
            rows = torch.nn.functional.linear(rows, matrix, None if bias is None else bias[expert])
            rows = activate(
                rows,
                given["activation"],
                given["gated"],
                given["interleaved"],
                given["limit"],
                given["alpha"],
            )
        wide = rows.double()
        product = wide.T @ wide
        part.moments[expert] = part.moments[expert] + product if expert in part.moments else product
        part.rows[expert] = part.rows.get(expert, 0) + len(token)
