"""Scale the input channels of the matrices that read a value, down to the tensors they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.fold import depends_on_weights_alone
from ..ir.program import Program
from ..ir.schema import argument, arguments, is_operator

aten = torch.ops.aten
_SHAPES = ("aten.reshape", "aten.to")


@dataclass
class Reader:
    """A linear or mixture that multiplies a value with a matrix.

    ``path`` are the reshapes between the value and the reader; ``axis`` is the matrix's input dimension.
    """

    node: fx.Node
    matrix: fx.Node
    axis: int
    path: list[fx.Node]


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
                is_operator(user, *_SHAPES)
                and user.meta["val"].shape[-1] == size
                and node.meta["val"].dtype == user.meta["val"].dtype
            ):
                work.append((user, [*path, user]))
                continue
            else:
                return f"{user.name} reads it and has no matrix to hold its weight"
            if matrix not in constant:
                return f"{user.name} multiplies it with something that depends on the input"
            assert isinstance(matrix, fx.Node)
            readers.append(Reader(user, matrix, axis, path))
    return readers or "nothing reads it"


def scale_reader(
    program: Program,
    reader: Reader,
    old: fx.Node,
    bare: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
) -> None:
    """Let a reader of ``old = bare * weight + bias`` read ``bare``, its matrix holding the rest."""
    call = program.edit.call
    with program.edit.before(reader.node):
        value = bare
        for step in reader.path:
            value = call(step.target, value, *step.args[1:], **step.kwargs)
        matrix = reader.matrix
        scaled = matrix if weight is None else scaled_matrix(program, matrix, weight, reader.axis)
        if is_operator(reader.node, "graphopt.routed_ffn"):
            found = arguments(reader.node) | {"x": value, "up": scaled}
            positional = [found[n] for n in ("x", "experts", "weights", "up", "down", "up_bias", "down_bias")]
            options = {
                n: found[n] for n in ("activation", "gated", "interleaved", "transposed", "limit", "alpha")
            }
            new = call(torch.ops.graphopt.routed_ffn.default, *positional, **options)
        else:
            offset = reader.node.args[2] if len(reader.node.args) > 2 else None
            if bias is not None:
                moved = call(aten.mv.default, matrix, _like(program, bias, matrix))
                offset = moved if offset is None else call(aten.add.Tensor, moved, offset)
            new = call(aten.linear.default, value, scaled, offset)
    if weight is not None:
        _update_checkpoint(program, matrix, weight, reader.axis)
    if bias is not None and len(reader.node.args) > 2:
        for name, held in list(program.checkpoint.items()):
            if held is reader.node.args[2] and not _others(held, reader.node):
                program.checkpoint[name] = new.args[2]  # type: ignore[assignment]
    program.edit.replace(reader.node, new)


def _others(node: fx.Node, reader: fx.Node) -> bool:
    return any(u is not reader and is_operator(u, "aten.linear") for u in node.users)


def _like(program: Program, vector: fx.Node, matrix: fx.Node) -> fx.Node:
    if vector.meta["val"].dtype == matrix.meta["val"].dtype:
        return vector
    return program.edit.call(aten.to.dtype, vector, matrix.meta["val"].dtype)


def scaled_matrix(program: Program, matrix: fx.Node, scale: fx.Node, axis: int) -> fx.Node:
    """Return a matrix with its input channels multiplied by a vector."""
    rank = matrix.meta["val"].dim()
    shape = [1] * rank
    shape[axis % rank] = int(scale.meta["val"].numel())
    scale = _like(program, scale, matrix)
    if rank - 1 != axis % rank or scale.meta["val"].dim() != 1:
        scale = program.edit.call(aten.reshape.default, scale, shape)
    return program.edit.call(aten.mul.Tensor, matrix, scale)


def _update_checkpoint(program: Program, matrix: fx.Node, scale: fx.Node, axis: int) -> None:
    """Scale the checkpoint's tensors that a matrix is made of, through joins, swaps and casts."""
    held = [name for name, node in program.checkpoint.items() if node is matrix]
    if held:
        with program.edit.after(_later(matrix, scale)):
            scaled = scaled_matrix(program, matrix, scale, axis)
        for name in held:
            program.checkpoint[name] = scaled
        return
    if is_operator(matrix, "aten.cat", "aten.stack"):
        dim = int(argument(matrix, "dim")) % matrix.meta["val"].dim()
        inner = axis - 1 if is_operator(matrix, "aten.stack") and dim < axis else axis
        if dim != axis:
            for operand in matrix.args[0]:  # type: ignore[union-attr]
                _update_checkpoint(program, operand, scale, inner)  # type: ignore[arg-type]
            return
    if is_operator(matrix, "aten.permute"):
        order = [int(d) % matrix.meta["val"].dim() for d in matrix.args[1]]  # type: ignore[union-attr, arg-type]
        _update_checkpoint(program, matrix.args[0], scale, order[axis])  # type: ignore[arg-type]
        return
    if is_operator(matrix, "aten.transpose"):
        first, second = (int(d) % matrix.meta["val"].dim() for d in matrix.args[1:3])  # type: ignore[arg-type]
        swapped = {first: second, second: first}.get(axis, axis)
        _update_checkpoint(program, matrix.args[0], scale, swapped)  # type: ignore[arg-type]
        return
    if is_operator(matrix, "aten.to", "aten.clone", "aten.contiguous"):
        _update_checkpoint(program, matrix.args[0], scale, axis)  # type: ignore[arg-type]
        return
    program.facts["unwritable"] = (
        f"{matrix.name} is made of several tensors in a way that cannot be scaled back"
    )


def _later(first: Any, second: Any) -> fx.Node:
    """Return whichever of two nodes comes later in the graph."""
    if first.op == "placeholder":
        return second  # type: ignore[no-any-return]
    node = first
    while node.op != "root":
        if node is second:
            return second  # type: ignore[no-any-return]
        node = node.next
    return first  # type: ignore[no-any-return]
