"""Scaling the input channels of matrices that read a value, and updating the mapping to the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.export_blockers import block_export
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.fold import computed, depends_on_weights_alone
from ...ir.running.invert import invert
from ...ir.schema import argument, arguments, is_operator, normal_call
from ..shared.matrices import as_type_of
from ..shared.weight_mapping import follow

aten = torch.ops.aten


@dataclass
class Reader:
    """A linear or MoE layer that multiplies a value with a matrix.

    ``path`` are the reshapes and casts between the value and the reader; ``axis`` is the matrix's input dimension.
    """

    node: fx.Node
    matrix: fx.Node
    axis: int
    path: list[fx.Node]

    def now(self, program: Program) -> Reader:
        """Return it in its present state, after edits that gave it another matrix."""
        node = program.edit.now(self.node)
        if node is self.node:
            return self
        name = "up" if is_operator(node, "graphopt.routed_ffn") else "weight"
        return replace(self, node=node, matrix=argument(node, name))


def matrix_readers(
    program: Program, value: fx.Node, constant: set[fx.Node] | None = None
) -> list[Reader] | str:
    """Return all readers of a value if each multiplies it with a matrix, else why not.

    Args:
        program: the program.
        value: what is read.
        constant: nodes that depend on weights alone, if known; finding them takes a walk over the graph.
    """
    constant = depends_on_weights_alone(program) if constant is None else constant
    size = value.meta["val"].shape[-1]
    readers: list[Reader] = []
    work: list[tuple[fx.Node, list[fx.Node]]] = [(value, [])]
    while work:
        node, path = work.pop(0)
        for user in node.users:
            if is_operator(user, "aten.linear") and user.args[0] is node:
                matrix, axis = user.args[1], 1
            elif is_operator(user, "graphopt.routed_ffn") and user.args[0] is node:
                matrix, axis = argument(user, "up"), 1 if argument(user, "transposed") else 2
            elif (
                has(user, Trait.RESHAPE | Trait.CAST)
                and user.meta["val"].shape[-1] == size
                and user.meta["val"].dtype.is_floating_point
            ):
                work.append((user, [*path, user]))
                continue
            else:
                return f"{user.name} reads it and has no matrix to absorb its weight"
            if matrix not in constant:
                return f"{user.name} multiplies it with something that depends on the input"
            assert isinstance(matrix, fx.Node)
            readers.append(Reader(user, matrix, axis, path))
    return readers or "nothing reads it"


def scale_reader(
    program: Program,
    reader: Reader,
    bare: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
) -> None:
    """Let a reader of ``bare * weight + bias`` read ``bare``, with weight and bias folded into its matrix."""
    call = program.edit.call
    call_args = arguments(reader.node)
    bias_product = None
    offset: Any = call_args.get("bias")
    shift: Any = offset
    with program.edit.before(reader.node):
        value = bare
        for step in reader.path:
            value = call(step.target, value, *step.args[1:], **step.kwargs)
        matrix = reader.matrix
        scaled = matrix if weight is None else scaled_matrix(program, matrix, weight, reader.axis)
        if is_operator(reader.node, "graphopt.routed_ffn"):
            args, kwargs = normal_call(reader.node.target, call_args | {"x": value, "up": scaled})
            new = call(reader.node.target, *args, **kwargs)
        else:
            if bias is not None:
                bias_product = call(aten.mv.default, matrix, as_type_of(program, bias, matrix))
                shift = bias_product if offset is None else call(aten.add.Tensor, bias_product, offset)
            new = call(aten.linear.default, value, scaled, shift)
    program.edit.replace(reader.node, new)
    if weight is not None:
        _update_checkpoint(program, matrix, scaled, bias_product)
    if bias is None:
        return
    if offset is None:
        block_export(program, f"{new.name} gets a bias, which a checkpoint of this architecture cannot store")
    elif not any(is_operator(u, "aten.linear") for u in offset.users):
        _update_checkpoint(program, offset, shift)


def scaled_matrix(program: Program, matrix: fx.Node, scale: fx.Node, axis: int) -> fx.Node:
    """Return a matrix with its input channels multiplied by a vector."""
    rank = matrix.meta["val"].dim()
    shape = [1] * rank
    shape[axis % rank] = int(scale.meta["val"].numel())
    scale = as_type_of(program, scale, matrix)
    if rank - 1 != axis % rank or scale.meta["val"].dim() != 1:
        scale = program.edit.call(aten.reshape.default, scale, shape)
    return program.edit.call(aten.mul.Tensor, matrix, scale)


def _update_checkpoint(
    program: Program, matrix: fx.Node, scaled: fx.Node, bias_product: fx.Node | None = None
) -> None:
    """Map the checkpoint's tensors that a matrix or bias is computed from to their scaled values."""
    names: dict[str, list[str]] = {}
    for name, node in program.checkpoint.items():
        names.setdefault(node.name, []).append(name)
    if matrix.op == "placeholder" and matrix.name not in names:
        # a saved program stores computed weights; the checkpoint's tensors are derived from them
        follow(program, {matrix: scaled}, beside=[bias_product] if bias_product is not None else [])
        return
    if matrix.name in names:
        mapping = {matrix.name: scaled}
    else:
        expression_graph = computed(program, matrix)[0].graph
        with program.edit.after(scaled):
            mapping = {
                name: node
                for name, node in invert(program, expression_graph, scaled).items()
                if name in names
            }
        missing = {
            n.name for n in expression_graph.find_nodes(op="placeholder")
        } & names.keys() - mapping.keys()
        if missing or not mapping:
            block_export(
                program,
                (
                    f"{matrix.name} is computed from several tensors in a way that cannot be inverted after scaling"
                ),
            )
    for old_name, node in mapping.items():
        for name in names[old_name]:
            program.checkpoint[name] = node
