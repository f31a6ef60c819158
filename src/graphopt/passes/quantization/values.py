"""What is quantised in a program: values that a device computes, matrices, and tables of other constants."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.operators.traits import Trait, has, named
from ...ir.program import Program
from ...ir.running.execute import interpret
from ...ir.schema import arguments, is_operator
from ...targets.partition import border, host_nodes
from .ranges import Ranges

MATRICES = named(Trait.CONVOLUTION) | {"aten.linear"}
"""Operators whose weight has a scale for each row."""
_PRODUCTS = Trait.PRODUCT | Trait.CONVOLUTION | Trait.TRANSPOSED


def values_of(program: Program) -> list[fx.Node]:
    """Return the floating-point values that a device computes or receives, in order."""
    constant, host = _settled(program), host_nodes(program)
    boundary = set(border(program))
    values = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node in constant or node.op == "output" or not isinstance(value, torch.Tensor):
            continue
        numbers = value.dtype.is_floating_point and str(node.meta.get("input")) not in program.dials
        # a value that only the host reads, for its shape, is not computed on the device
        leaves_host = any(user not in host for user in node.users)
        if numbers and leaves_host and (node not in host or node in boundary):
            values.append(node)
    return values


def moved(node: fx.Node) -> fx.Node | None:
    """Return the source of a value that was only moved, else None."""
    if not has(node, Trait.MOVEMENT):
        return None
    if has(node, Trait.PADDING) and arguments(node)["value"]:
        return None  # the source's range may not include the values joined to it
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]
    if len(sources) != 1:
        return None
    (source,) = sources
    return moved(source) if not isinstance(source.meta["val"], torch.Tensor) else source


def matrices_of(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Return the weights of linear operators and convolutions on the device, with those operators."""
    constant, host = _settled(program), host_nodes(program)
    first: set[fx.Node] = set()
    matrices: dict[fx.Node, list[fx.Node]] = {}
    for node in program.nodes:
        if node in constant or node in host or node.op != "call_function":
            continue
        for name, value in arguments(node).items():
            if isinstance(value, fx.Node) and value in constant and value.meta["val"].dtype.is_floating_point:
                matrix = name == "weight" and is_operator(node, *MATRICES)
                if matrix and (value in matrices or value not in first):
                    matrices.setdefault(value, []).append(node)
                if not (name == "bias" and is_operator(node, *MATRICES)):
                    first.add(value)
    return matrices


def tables_of(program: Program, matrices: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """Return the other floating-point constants that a device reads, without the biases of matrices."""
    constant, host = _settled(program), host_nodes(program)
    tables: dict[fx.Node, None] = {}
    for node in program.nodes:
        if node in constant or node in host or node.op != "call_function":
            continue
        for name, value in arguments(node).items():
            if not isinstance(value, fx.Node) or value not in constant or value in matrices:
                continue
            bias = name == "bias" and is_operator(node, *MATRICES)
            if value.meta["val"].dtype.is_floating_point and not bias:
                tables[value] = None
    return list(tables)


def whole_matrices(tables: list[fx.Node], bits: int) -> list[str]:
    """Return notes on matrices that are stored like tables: in more bits, with a single scale."""
    notes = []
    for value in tables:
        readers = [u for u in value.users if has(u, _PRODUCTS) or is_operator(u, "aten.linear")]
        if readers and value.meta["val"].dim() > 1:
            looked_up = any(is_operator(u, "aten.embedding") for u in value.users)
            why = (
                "it is looked up as well as multiplied"
                if looked_up
                else f"{readers[0].name} is no linear or convolution"
            )
            notes.append(f"{value.name}: {bits} bits with one scale for all of it, since {why}")
    return notes


def _settled(program: Program) -> set[fx.Node]:
    """Return values that depend on no input: weights, values computed from them, and constant tables."""
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.name not in program.weights
        if is_input or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return {n for n in program.graph.nodes if n not in reached}


def constant_value(program: Program, node: fx.Node) -> torch.Tensor:
    """Return the value of a weight, or of a node computed from weights."""
    if node.op == "placeholder":
        return program.weights[node.name].source.load()
    value: torch.Tensor = interpret(program, {}, record=[node], stop=True)[node.name]
    return value


def features_of(node: fx.Node) -> tuple[fx.Node, int]:
    """Return the input of a matrix and its feature dimension."""
    args = arguments(node)
    if is_operator(node, "aten.linear"):
        return args["input"], -1
    return args["input"], args["input"].meta["val"].dim() - args["weight"].meta["val"].dim() + 1


def silent_inputs(matrices: dict[fx.Node, list[fx.Node]], ranges: Ranges) -> list[str]:
    """Return notes on input channels that calibration never excited."""
    notes = []
    for node, users in matrices.items():
        for user in users:
            silent = ranges.silent.get(features_of(user)[0])
            if silent is not None and 0 < int(silent.sum()) < silent.numel():
                indices = silent.nonzero().flatten().tolist()
                shown = ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
                notes.append(
                    f"{node.name}: {len(indices)} of {silent.numel()} input channels ({shown}) are zero on all calibration "
                    "data: their range is unknown, and their weights are rounded to the nearest; give data "
                    "that excites them, if they are in use"
                )
                break
    return notes
