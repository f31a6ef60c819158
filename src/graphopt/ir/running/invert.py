"""Inversion of data movement: the mapping from a folded weight to the tensors it was assembled from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..operators.traits import Trait, has
from ..schema import argument, arguments, operator_name

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


def invert(program: Program, graph: fx.Graph, value: fx.Node) -> dict[str, fx.Node]:
    """Insert nodes that recover the operands of a data movement from its result, and return them.

    Args:
        program: nodes are inserted at its insertion point.
        graph: the movement, with operands as placeholders.
        value: a node of the program with the result.

    Returns:
        Nodes by placeholder name, for the operands that can be recovered.
    """
    inverted: dict[fx.Node, fx.Node] = {}
    output = next(iter(graph.find_nodes(op="output")))
    inverted[output.args[0]] = value
    operands: dict[str, fx.Node] = {}
    for node in reversed(list(graph.nodes)):
        if node not in inverted:
            continue
        if node.op == "placeholder":
            operands[node.name] = inverted[node]
        elif node.op == "call_function":
            _invert_call(program, node, inverted[node], inverted)
    return operands


def _invert_call(program: Program, node: fx.Node, value: fx.Node, inverted: dict[fx.Node, fx.Node]) -> None:
    name = operator_name(node.target)
    call = program.edit.call
    if name in ("aten.cat", "aten.stack"):
        dim = int(argument(node, "dim"))
        start = 0
        operands: Any = node.args[0]
        for index, operand in enumerate(operands):
            if name == "aten.stack":
                part = call(aten.select.int, value, dim, index)
            else:
                size = int(operand.meta["val"].shape[dim])
                part = call(aten.slice.Tensor, value, dim, start, start + size)
                start += size
            inverted.setdefault(operand, part)
        return
    source = node.args[0]
    if not isinstance(source, fx.Node) or source in inverted:
        return
    if has(node, Trait.RESHAPE):
        inverted[source] = call(aten.reshape.default, value, [int(s) for s in source.meta["val"].shape])
    elif name == "aten.permute":
        order = [int(d) % len(source.meta["val"].shape) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        inverted[source] = call(aten.permute.default, value, [order.index(d) for d in range(len(order))])
    elif name == "aten.flip":
        inverted[source] = call(aten.flip.default, value, arguments(node)["dims"])
    elif name == "aten.to":
        inverted[source] = call(aten.to.dtype, value, source.meta["val"].dtype)
    elif has(node, Trait.IDENTITY):
        inverted[source] = value
