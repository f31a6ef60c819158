"""Fused projections: linears whose result is only used in parts, and replacing the parts by separate linears."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator

aten = torch.ops.aten


_CHOOSING = ("aten.split_with_sizes", "aten.slice", "aten.select", "aten.unbind")


@dataclass
class FusedPart:
    """A value computed from a linear by views: which dimensions are channels, and the same views of the rows.

    ``labels`` names each dimension: a number for a channel dimension (in the order of ``sizes``), or
    ``("lead", i)`` for dimension i of the linear's input.
    """

    node: fx.Node
    labels: list[Any]
    sizes: list[int]
    steps: list[tuple[Any, ...]] = field(default_factory=list)


def find_pieces(linear: fx.Node) -> list[FusedPart] | str:
    """Return the parts of a linear's result that are used, or why it cannot be split.

    An empty string means that it is not used in parts.
    """
    rank = linear.meta["val"].dim()
    start = FusedPart(
        linear, [*(("lead", i) for i in range(rank - 1)), 0], [int(linear.meta["val"].shape[-1])]
    )
    pieces: list[FusedPart] = []
    work = [(start, False)]
    chosen = False
    while work:
        view, inside = work.pop()
        for user in view.node.users:
            following = _follow(view, user)
            if isinstance(following, str):
                if following:
                    return following
                if not inside:
                    # the whole result is read as well
                    return "" if not chosen else "its whole result is read besides its parts"
                if view not in pieces:
                    pieces.append(view)
                continue
            for after, is_part in following:
                chosen = chosen or is_part
                work.append((after, inside or is_part))
    if any(is_operator(piece.node, "output") for piece in pieces):
        return "a part is an output"
    unique = {piece.node: piece for piece in pieces}
    for piece in unique.values():
        # a view of a part that is itself a part is handled with that part's readers
        if any(
            other is not piece and other.node in _ancestors(piece.node, linear) for other in unique.values()
        ):
            return "a part is read both whole and in parts"
    order = {node: i for i, node in enumerate(linear.graph.nodes)}
    return sorted(unique.values(), key=lambda piece: order[piece.node])


def _ancestors(node: fx.Node, stop: fx.Node) -> set[fx.Node]:
    ancestors: set[fx.Node] = set()
    while node is not stop and node.op == "call_function":
        first = node.args[0]
        if not isinstance(first, fx.Node):
            break
        node = first
        ancestors.add(node)
    return ancestors


def _follow(view: FusedPart, user: fx.Node) -> list[tuple[FusedPart, bool]] | str:
    """Return the views that ``user`` makes, each with whether it is a part; or a reason, empty for other readers."""
    if user.op == "output" or user.args[0] is not view.node:
        return ""
    if is_operator(user, "aten.split_with_sizes", "aten.unbind"):
        return _parts(view, user)
    if is_operator(user, "aten.slice", "aten.select"):
        return _choose(view, user)
    leads_to_choice = any(
        is_operator(u, *_CHOOSING)
        or (is_operator(u, "aten.permute") and any(is_operator(v, *_CHOOSING) for v in u.users))
        for u in user.users
    )
    if is_operator(user, "aten.reshape") and leads_to_choice:
        return _reshape(view, user)
    if is_operator(user, "aten.permute") and leads_to_choice:
        order = [int(d) % len(view.labels) for d in user.args[1]]  # type: ignore[union-attr, arg-type]
        return [(FusedPart(user, [view.labels[d] for d in order], view.sizes, view.steps), False)]
    return ""


def _channel(view: FusedPart, dim: int) -> int | None:
    label = view.labels[dim % len(view.labels)]
    return label if isinstance(label, int) else None


def _parts(view: FusedPart, user: fx.Node) -> list[tuple[FusedPart, bool]] | str:
    args = arguments(user)
    dim = _channel(view, int(args["dim"]))
    if dim is None:
        return ""
    parts: list[tuple[FusedPart, bool]] = []
    start = 0
    is_split = is_operator(user, "aten.split_with_sizes")
    readers = {int(u.args[1]): u for u in user.users if u.target is operator.getitem}  # type: ignore[arg-type]
    if len(readers) != len(user.users):
        return "parts are read as a list"
    for index in range(len(user.meta["val"])):
        size = int(args["split_sizes"][index]) if is_split else 1
        if index in readers:
            if is_split:
                sizes = [*view.sizes]
                sizes[dim] = size
                step = ("slice", dim, start, start + size, 1)
                parts.append((FusedPart(readers[index], view.labels, sizes, [*view.steps, step]), True))
            else:
                parts.append((_selected(view, readers[index], int(args["dim"]), dim, index), True))
        start += size
    return parts


def _selected(view: FusedPart, node: fx.Node, position: int, dim: int, index: int) -> FusedPart:
    labels = [label for i, label in enumerate(view.labels) if i != position % len(view.labels)]
    # channel dimensions after the selected one move up
    labels = [label - 1 if isinstance(label, int) and label > dim else label for label in labels]
    sizes = [s for i, s in enumerate(view.sizes) if i != dim]
    return FusedPart(node, labels, sizes, [*view.steps, ("select", dim, index)])


def _choose(view: FusedPart, user: fx.Node) -> list[tuple[FusedPart, bool]] | str:
    args = arguments(user)
    position = int(args["dim"])
    dim = _channel(view, position)
    if dim is None:
        return ""
    size = view.sizes[dim]
    if is_operator(user, "aten.select"):
        if not isinstance(args["index"], int):
            return "a part is chosen by a value"
        return [(_selected(view, user, position, dim, args["index"] % size), True)]
    start, end = args["start"] or 0, size if args["end"] is None else args["end"]
    if not isinstance(start, int) or not isinstance(end, int):
        return "a part is chosen by a value"
    start = max(0, start + size if start < 0 else start)
    end = min(size, end + size if end < 0 else end)
    step = int(args["step"])
    sizes = [*view.sizes]
    sizes[dim] = len(range(start, end, step))
    return [(FusedPart(user, view.labels, sizes, [*view.steps, ("slice", dim, start, end, step)]), True)]


def _reshape(view: FusedPart, user: fx.Node) -> list[tuple[FusedPart, bool]] | str:
    """Return the view of a reshape that splits the last dimension, all channels; empty string if it is another one."""
    if (view.labels and view.labels[-1] != len(view.sizes) - 1) or len(view.sizes) != 1:
        return ""
    lead = len(view.labels) - 1
    before, after = view.node.meta["val"].shape, user.meta["val"].shape
    if len(after) <= lead or any(str(a) != str(b) for a, b in zip(before[:lead], after[:lead], strict=True)):
        return ""
    sizes = list(after[lead:])
    if not all(isinstance(size, int) for size in sizes):
        return ""
    labels = [*view.labels[:-1], *range(len(sizes))]
    return [(FusedPart(user, labels, sizes, [*view.steps, ("reshape", *sizes)]), False)]


def separate(program: Program, linear: fx.Node, piece: FusedPart) -> None:
    """Replace a part by a linear with the rows that produce it."""
    call = program.edit.call
    x, weight = linear.args[0], linear.args[1]
    bias = linear.args[2] if len(linear.args) > 2 else None
    with program.edit.before(piece.node):
        rows = _rows(program, weight, piece, 1)
        part = call(aten.linear.default, x, rows, None if bias is None else _rows(program, bias, piece, 0))
        lead = list(range(linear.meta["val"].dim() - 1))
        straight: list[Any] = [*(("lead", i) for i in lead), *range(len(piece.sizes))]
        if len(piece.sizes) != 1:
            shape = program.size_nodes([*linear.meta["val"].shape[:-1], *piece.sizes])
            part = call(aten.reshape.default, part, shape)
        if straight != piece.labels:
            part = call(aten.permute.default, part, [straight.index(label) for label in piece.labels])
    program.edit.replace(piece.node, part)


def _rows(program: Program, tensor: Any, piece: FusedPart, columns: int) -> fx.Node:
    """Apply the views of a part to the rows of a matrix (``columns`` 1) or the entries of a bias (0)."""
    call = program.edit.call
    trailing = [int(s) for s in tensor.meta["val"].shape[1:]] if columns else []
    value = tensor
    for step in piece.steps:
        if step[0] == "reshape":
            value = call(aten.reshape.default, value, [*step[1:], *trailing])
        elif step[0] == "select":
            value = call(aten.select.int, value, step[1], step[2])
        else:
            value = call(aten.slice.Tensor, value, *step[1:])
    if len(piece.sizes) != 1:
        value = call(aten.reshape.default, value, [-1, *trailing])
    assert isinstance(value, fx.Node)
    return value


def fused_linears(program: Program) -> list[tuple[fx.Node, list[FusedPart] | str]]:
    """Return each linear with a constant matrix, with its parts or why it has none; see :func:`find_pieces`."""

    def find() -> list[tuple[fx.Node, list[FusedPart] | str]]:
        constant = depends_on_weights_alone(program)
        linears = (n for n in program.graph.nodes if is_operator(n, "aten.linear") and n.args[1] in constant)
        return [(node, find_pieces(node)) for node in linears]

    result: list[tuple[fx.Node, list[FusedPart] | str]] = program.derived("fused", find, portable=True)
    return result


def split_all(program: Program, within: Collection[str] | None = None) -> None:
    """Split fused projections into separate ones, as sharding by head or by channel requires.

    Args:
        program: changed in place.
        within: names of the blocks whose projections are split; None for all.
    """
    inside = None
    if within is not None:
        inside = {node.name for b in program.anatomy.blocks if b.name in within for node in b.nodes}
    fused = [(node, pieces) for node, pieces in fused_linears(program) if not isinstance(pieces, str)]
    for node, pieces in fused:
        if len(pieces) > 1 and (inside is None or node.name in inside):
            for piece in pieces:
                separate(program, node, piece)
