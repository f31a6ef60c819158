"""Folding of operators on weights alone into new weights, which are computed one at a time when loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..operators.traits import Trait, has
from ..schema import arguments, is_operator
from ..weights import TensorSource, Weight, load_part
from .evaluate import evaluate, last_uses
from .expressions import Expressions
from .retype import in_type

if TYPE_CHECKING:
    from ..program import Program

# results are bits of the operands, at any precision
EXACT = Trait.MOVEMENT | Trait.BITS
# operators that differ between ranks, and fake quantisation of weights
_NOT_FOLDED = Trait.PER_RANK | Trait.ROUNDING


@dataclass(frozen=True)
class Computed:
    """The value of a small graph over other tensors, computed on demand.

    Arithmetic runs in float64 and is rounded once, to ``dtype``.
    """

    graph: fx.Graph
    inputs: tuple[TensorSource, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Return the value; operands are read and freed one at a time."""
        plain = all(has(n, EXACT) for n in self.graph.nodes if n.op == "call_function")
        graph = self.graph if plain else in_type(self.graph)
        freed = last_uses(graph.nodes)
        values: dict[fx.Node, object] = {}
        sources = iter(self.inputs)
        pending = {node: next(sources) for node in graph.nodes if node.op == "placeholder"}
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "output":
                    result = values[node.args[0]]
                    assert isinstance(result, torch.Tensor)
                    return result.to(self.dtype).contiguous()
                if node.op == "placeholder":
                    continue
                for used in node.all_input_nodes:
                    if used in pending:
                        source = pending.pop(used)
                        bounds = _first_cut(used)
                        # only the part of a tensor that is read is loaded
                        tensor = source.load() if bounds is None else load_part(source, *bounds)
                        wide = not plain and tensor.dtype.is_floating_point
                        values[used] = tensor.to(torch.float64) if wide else tensor
                start = node.args[0] if node.args else None
                is_whole = not isinstance(start, fx.Node) or start.op != "placeholder"
                if not is_whole and isinstance(start, fx.Node) and _first_cut(start) is not None:
                    values[node] = values[start]
                else:
                    values[node] = evaluate(node, values)
                for dead in freed.get(node, ()):
                    values.pop(dead, None)
        raise AssertionError("a graph without an output")


def _first_cut(node: fx.Node) -> tuple[int, int, int] | None:
    """Return (dimension, start, end) if a tensor is read only through one slice of consecutive entries."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if not is_operator(user, "aten.slice"):
        return None
    args = arguments(user)
    shape = node.meta["val"].shape
    dim = int(args["dim"]) % len(shape)
    size = int(shape[dim])
    start, end = args["start"] or 0, size if args["end"] is None else args["end"]
    if args["step"] != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    start, end = (max(0, min(size, value + size if value < 0 else value)) for value in (start, end))
    return (dim, start, max(start, end))


def depends_on_weights_alone(program: Program) -> set[fx.Node]:
    """Return the nodes whose value no input can change, weights themselves included."""

    def find() -> set[fx.Node]:
        constant: set[fx.Node] = set(program.weight_nodes)
        neutral: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            if not inputs and has(node, Trait.FILL):
                neutral.add(node)
            elif inputs and all(n in constant or n in neutral for n in inputs):
                # a tensor of equal numbers is not a weight, but what is computed from it and weights is constant
                (constant if any(n in constant for n in inputs) else neutral).add(node)
        return constant

    nodes: set[fx.Node] = program.derived("weights_alone", find, portable=True)
    return nodes


def frontier(program: Program) -> list[fx.Node]:
    """Return the computed values that depend on weights alone and that other nodes of the graph read."""
    constant = _foldable(program)
    checkpoint_nodes = set(program.checkpoint.values())
    return [
        node
        for node in program.graph.nodes
        if node in constant
        and node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and (
            any(user not in constant for user in node.users)
            or (node in checkpoint_nodes and not _movement_only(node, constant))
        )
    ]


def _foldable(program: Program) -> set[fx.Node]:
    """Return the nodes that depend on weights alone and have the same value on every rank."""
    constant = depends_on_weights_alone(program)
    apart: set[fx.Node] = set()
    for node in program.graph.nodes:
        if has(node, _NOT_FOLDED) or any(n in apart for n in node.all_input_nodes):
            apart.add(node)
    return constant - apart if apart else constant


def _vector_of_checkpoint(program: Program, node: fx.Node) -> bool:
    checkpoint_nodes = program.checkpoint.values()
    while node.op == "call_function":
        value = node.meta["val"]
        # the parts of a split vector come from a list
        if not isinstance(value, torch.Tensor) or value.dim() != 1:
            return False
        if len(node.all_input_nodes) != 1 or node in checkpoint_nodes:
            return False
        node = node.all_input_nodes[0]
    return node in checkpoint_nodes


def _movement_only(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Tell whether a value only moves data of a weight for the checkpoint mapping, which is not worth a copy."""
    while node.op == "call_function" and all(user in constant for user in node.users):
        if not has(node, EXACT) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return True


def fold(program: Program, *, to_store: bool = False) -> Program:
    """Return a program in which no node computes on weights alone.

    Nothing is computed here: each new weight is computed when it is loaded, so that models larger than memory can be
    folded and streamed. Checkpoint entries point at the folded values.

    Args:
        program: not changed.
        to_store: do not fold arithmetic with a number on a vector that is stored anyway, such as 1 + w in a norm:
            it would save nothing, and the role of the vector would be lost.
    """
    edges = frontier(program)
    if to_store:
        edges = [node for node in edges if not _vector_of_checkpoint(program, node)]
    if not edges and not program.derived("unread_weights", lambda: unread_weights(program)):
        return program
    folded = program.copy()
    by_name = {node.name: node for node in folded.graph.nodes}
    used_names = {name for weight in folded.weights.values() for name in weight.all_names}
    folded_nodes: dict[int, fx.Node] = {}
    numbered = Expressions()
    numbers = [numbered(original) for original in edges]
    for original, key in zip(edges, numbers, strict=True):
        node = by_name[original.name]
        # the checkpoint mapping of a scaled weight is often equal to a value in the graph
        if key in folded_nodes:
            _put_in_place(folded, node, folded_nodes[key])
            continue
        source, operands = computed(folded, node)
        name = _free_name(node, operands, used_names)
        used_names.add(name)
        # a kernel with folded statistics stays trainable if the kernel was
        trainable = any(w.trainable for w in operands)
        kind = "parameter" if any(w.kind == "parameter" for w in operands) else "buffer"
        new = folded.edit.add_weight(name, source, kind=kind, persistent=any(w.persistent for w in operands))
        new.meta["val"] = node.meta["val"]
        folded.weights[new.name] = Weight(name, source, kind, (), True, trainable)  # type: ignore[arg-type]
        folded_nodes[key] = new
        _put_in_place(folded, node, new)
        _map_operands(folded, source, new)
    drop_unread_weights(folded)
    folded.changed()
    return folded


def _put_in_place(program: Program, node: fx.Node, new: fx.Node) -> None:
    for name, mapped in list(program.checkpoint.items()):
        if mapped is node:
            program.checkpoint[name] = new
    node.replace_all_uses_with(new)
    program.edit.erase_dead([node])


def _map_operands(program: Program, source: Computed, new: fx.Node) -> None:
    """Map tensors of the checkpoint to the folded weight where only it still has their values."""
    from .invert import invert

    unread = {
        node: key for key, node in program.checkpoint.items() if node.op == "placeholder" and not node.users
    }
    operand_names = {n.name for n in source.graph.find_nodes(op="placeholder")} & {n.name for n in unread}
    if not operand_names or not all(has(n, EXACT) for n in source.graph.nodes if n.op == "call_function"):
        return
    with program.edit.after(new):
        inverted = invert(program, source.graph, new)
    for node, key in unread.items():
        if node.name in inverted and node.name in operand_names:
            program.checkpoint[key] = inverted[node.name]
    program.edit.erase_dead(inverted.values())


def unread_weights(program: Program) -> list[fx.Node]:
    """Return placeholders of tensors that neither the graph nor the checkpoint mapping reads."""
    checkpoint_nodes = set(program.checkpoint.values())
    return [n for n in program.weight_nodes if not n.users and n not in checkpoint_nodes]


def drop_unread_weights(program: Program) -> None:
    """Remove unused weights."""
    for node in unread_weights(program):
        program.edit.remove_weight(node)


def computed(program: Program, node: fx.Node) -> tuple[Computed, list[Weight]]:
    """Return a source that computes a node which depends on weights alone, and the weights it reads."""
    needed: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(start: fx.Node) -> None:
        work = [(start, False)]
        while work:
            current, ready = work.pop()
            if ready:
                needed.append(current)
            elif current not in seen:
                seen.add(current)
                work.append((current, True))
                work.extend((n, False) for n in reversed(current.all_input_nodes))

    visit(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    operands: list[Weight] = []
    for current in needed:
        if current.op == "placeholder":
            copies[current] = graph.placeholder(current.name)
            copies[current].meta["val"] = current.meta["val"]
            operands.append(program.weights[current.name])
        else:
            copies[current] = graph.node_copy(current, lambda n: copies[n])
    graph.output(copies[node])
    value = node.meta["val"]
    source = Computed(
        graph, tuple(w.source for w in operands), tuple(int(s) for s in value.shape), value.dtype
    )
    return source, operands


def _free_name(node: fx.Node, operands: list[Weight], used_names: set[str]) -> str:
    requested = node.meta.get("custom", {}).get("graphopt", {}).get("weight")
    base = requested or (f"{operands[0].name}.folded" if operands else f"{node.name}.folded")
    name, count = str(base), 1
    while name in used_names:
        count += 1
        name = f"{base}_{count}"
    return name
