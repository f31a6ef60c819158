"""Splitting a program into consecutive shards where only the residual stream crosses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...ir.errors import LoweringError
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.extract import extract
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator, normal_call


def everywhere(program: Program) -> set[fx.Node]:
    """Return the nodes that every shard computes itself: those that depend on weights alone, or on inputs and no matrix.

    Examples are masks, positions and their rotations, and cache slots.
    """
    settled = set(depends_on_weights_alone(program))
    derived = {n for n in program.graph.nodes if n.op == "placeholder" and n not in settled}
    for node in program.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and node not in settled:
            vectors = all(
                sum(size != 1 for size in n.meta["val"].shape) <= 1 for n in operands if n in settled
            )
            if vectors and all(n in derived or n in settled for n in operands):
                derived.add(node)
    return settled | {n for n in derived if n.op == "call_function"}


def cut_points(program: Program) -> list[tuple[int, fx.Node]]:
    """Return where a program may be split: after which call, and the one tensor that crosses there.

    Inputs, and values computed by every shard for itself, exist on both sides of a split and do not cross it.

    Args:
        program: with fixed sizes.
    """
    settled = everywhere(program)
    order = [n for n in program.graph.nodes if n.op == "call_function" and n not in settled]
    index = {n: i for i, n in enumerate(order)}
    last = {n: max((index[u] for u in n.users if u in index), default=-1) for n in order}
    points, live = [], set[fx.Node]()
    for number, node in enumerate(order):
        live = {n for n in [*live, node] if last[n] > number}
        if len(live) == 1:
            (crossing,) = live
            if isinstance(crossing.meta.get("val"), torch.Tensor):
                points.append((number, crossing))
    return points


def in_parts(program: Program, most: int) -> list[Program]:
    """Return shards whose weights take at most ``most`` bytes each; run in order, they compute the program.

    Shard k has the output ``part_k``, which is an input of shard k + 1; other inputs and outputs keep their names, in
    the shards that use or compute them.

    Args:
        program: with fixed sizes; not changed.
        most: largest weights of a shard, in bytes.

    Raises:
        LoweringError: a segment between two possible split points is larger.
    """
    settled = everywhere(program)
    order = [n for n in program.graph.nodes if n.op == "call_function" and n not in settled]
    ends: list[tuple[int, fx.Node | None]] = [*cut_points(program), (len(order) - 1, None)]
    ends_of_shards: list[tuple[int, fx.Node | None]] = []
    stored_bytes: dict[str, int] = {}
    begin, before = 0, None
    for end in ends:
        piece = dict(_stored(program, order[begin : end[0] + 1], settled))
        begin = end[0] + 1
        if sum(piece.values()) > most:
            name = max(piece, key=lambda n: piece[n])
            raise LoweringError(
                f"a part would hold {sum(piece.values()):,} bytes between two places where the program could be cut, "
                f"{piece[name]:,} of them in {program.weights[name].name}; {most:,} are allowed",
                hint="allow larger parts, or store weights in fewer bits",
            )
        if before is not None and sum((stored_bytes | piece).values()) > most:
            ends_of_shards.append(before)
            stored_bytes = {}
        stored_bytes |= piece
        before = end
    ends_of_shards.append((len(order) - 1, None))
    shards, first, incoming = [], 0, None
    for number, (end_place, crossing) in enumerate(ends_of_shards, start=1):
        shards.append(_part(program, order[first : end_place + 1], incoming, crossing, number, settled))
        first, incoming = end_place + 1, crossing
    return shards


def _stored(program: Program, calls: list[fx.Node], settled: set[fx.Node]) -> Iterator[tuple[str, int]]:
    """Yield the weights that calls read, with their size in bytes as they are written."""
    work, seen = list(calls), set(calls)
    while work:
        node = work.pop()
        for operand in node.all_input_nodes:
            if operand in seen:
                continue
            seen.add(operand)
            if operand.name in program.weights:
                yield operand.name, _written(program, operand)
            elif operand.op == "call_function" and operand in settled:
                work.append(operand)


def _written(program: Program, node: fx.Node) -> int:
    """Return the bytes of a weight in the type that it is stored in."""
    bits = {"int4": 4, "int8": 8, "uint8": 8, "uint16": 16, "int16": 16}
    weight = program.weights[node.name]
    count = weight.bytes // max(1, weight.source.dtype.itemsize)
    sizes = []
    for user in node.users:
        args = arguments(user)
        if not has(user, Trait.ROUNDING) or node is args["scale"]:
            sizes.append(weight.bytes)
        elif args.get("integers") not in (None, node):
            sizes.append(0)  # integers fitted to data are written instead
        else:
            sizes.append(count * bits[str(args["dtype"])] // 8)
    return max(sizes, default=weight.bytes)


def _part(
    program: Program, calls: list[fx.Node], incoming: fx.Node | None, outgoing: fx.Node | None, number: int,
    settled: set[fx.Node],
) -> Program:  # fmt: skip
    inside = {n.name for n in calls}
    writes = {
        name: node
        for name, node in program.outputs.items()
        if node.name in inside or (number == 1 and (node.op == "placeholder" or node in settled))
    }
    if outgoing is not None:
        writes[f"part_{number}"] = outgoing
    name = f"part_{number - 1}"
    shard = extract(program, {} if incoming is None else {name: incoming}, writes, all_given=True)
    if incoming is not None and is_operator(incoming, "graphopt.fake_quantize"):
        # an incoming value is stored in as few bits as in the shard before
        placeholder = shard.input_nodes[name]
        readers = list(placeholder.users)
        args, kwargs = normal_call(incoming.target, dict(arguments(incoming)) | {"x": placeholder})
        with shard.edit.after(placeholder):
            rounded = shard.edit.call(incoming.target, *args, **kwargs)
        for reader in readers:
            reader.replace_input_with(placeholder, rounded)
        shard.changed()
    return shard
