"""Sync points of a sharded model, and dropping the one after attention as in SPD.

With x the stream before attention, P_i the partial result of its last projection on rank i and Z_i that of the
feed-forward, a block computes ``u = x + sum(P_i) + b``, ``y = u + sum(Z_i(u)) + c``. Without the sync point after
attention, it computes
``u_i = x + P_i + b`` on each rank and ``y = x + b + c + sum(P_i + Z_i(u_i))``: attention's contribution to the stream
remains exact, the feed-forward sees a part of it (arXiv 2502.20727).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.groups import TENSOR_PARALLEL
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import is_operator
from ..shared.cutting import all_reduce

aten, composites = torch.ops.aten, torch.ops.graphopt
_VIEWS = Trait.RESHAPE | Trait.REORDER | Trait.CAST
NAME = "drop-sync-points"


@dataclass
class Term:
    """A block's contribution to the stream: a partial value, and the steps applied to its sum.

    ``steps`` are operators with the index of the changing operand, including the addition of a bias.
    """

    partial: fx.Node
    steps: list[tuple[fx.Node, int]]


@dataclass
class SyncPoint:
    """An attention whose all-reduce can be dropped, and the feed-forward whose all-reduce takes over its sum."""

    attention: Block
    ffn: Block
    first: Term
    second: Term


def find_sync_points(program: Program) -> tuple[dict[str, SyncPoint], dict[str, str]]:
    """Return the sync points that can be dropped, by name of the attention block, and why the others cannot."""
    points: tuple[dict[str, SyncPoint], dict[str, str]] = program.derived(
        "sync points", lambda: _find_sync_points(program), portable=True
    )
    return points


def _find_sync_points(program: Program) -> tuple[dict[str, SyncPoint], dict[str, str]]:
    points: dict[str, SyncPoint] = {}
    refused: dict[str, str] = {}
    constant = depends_on_weights_alone(program)
    following: dict[fx.Node, list[Block]] = {}
    for block in program.anatomy.blocks:
        following.setdefault(block.reads, []).append(block)
    for block in program.anatomy.attention:
        point = _sync_point(block, following, constant)
        if isinstance(point, str):
            refused[block.name] = point
        else:
            points[block.name] = point
    return points, refused


def _sync_point(
    block: Block, following: dict[fx.Node, list[Block]], constant: set[fx.Node]
) -> SyncPoint | str:
    if block.parallel:
        return "attention and feed-forward run side by side and share one all-reduce already"
    if block.norms in ("sandwich", "branch"):
        return "a norm follows its all-reduce: the norm of a sum is not the sum of norms"
    if block.norms == "post" or block.writes is not block.add:
        return "a norm on the stream follows its all-reduce: the norm of a sum is not the sum of norms"
    first = term_of(block, constant)
    if first is None:
        return "no all-reduce of its own: it is not sharded, or was dropped before"
    if is_operator(first.partial, "aten.add"):
        return "attention and feed-forward run side by side and share one all-reduce already"
    after = following.get(block.writes, [])
    if not after:
        return "nothing follows it whose all-reduce could take over its sum"
    if len(after) > 1 or after[0].parallel:
        return "more than one block reads what it writes"
    ffn = after[0]
    if ffn.kind == "experts":
        return "an MoE layer follows: routers that see different values choose different experts on each rank"
    if ffn.kind != "ffn":
        return f"a feed-forward must follow, and {ffn.name} is none"
    if ffn.norms in ("sandwich", "branch", "post") or ffn.writes is not ffn.add:
        return f"a norm follows the all-reduce of {ffn.name}"
    second = term_of(ffn, constant)
    if second is None:
        return f"{ffn.name}, which follows, has no all-reduce that could take over its sum"
    inside = {*ffn.nodes, ffn.add}
    others = [user.name for user in block.add.users if user not in inside]
    if others:
        return f"what it writes is read by {others[0]} as well"
    if set(block.add.args) != {block.reads, block.term} or set(ffn.add.args) != {ffn.reads, ffn.term}:
        return "its addition has other terms besides"
    return SyncPoint(block, ffn, first, second)


def term_of(block: Block, constant: set[fx.Node]) -> Term | None:
    """Return a block's partial value and the steps from its sum to the stream; None if it has no all-reduce of its own."""
    steps: list[tuple[fx.Node, int]] = []
    node = block.term
    while True:
        if len(node.users) != 1:
            return None
        if is_operator(node, "graphopt.all_reduce"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return Term(source, steps[::-1])
        if has(node, _VIEWS) or is_operator(node, "aten.div"):
            index = 0
        elif is_operator(node, "aten.add", "aten.mul") and not node.kwargs:
            changing = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a not in constant]
            if len(changing) != 1:
                return None
            index = changing[0]
        else:
            return None
        steps.append((node, index))
        operand = node.args[index]
        if not isinstance(operand, fx.Node):
            return None
        node = operand


def _scaled(program: Program, term: Term) -> fx.Node:
    """Return the partial value after all steps except additions."""
    value = term.partial
    for node, operand in term.steps:
        if not is_operator(node, "aten.add"):
            args = list(node.args)
            args[operand] = value
            value = program.edit.call(node.target, *args, **node.kwargs)
    return value


def _offset(program: Program, term: Term) -> fx.Node | None:
    """Return the result of the steps for a sum of zeros: the bias, transformed by later steps."""
    value: fx.Node | None = None
    for node, operand in term.steps:
        if is_operator(node, "aten.add"):
            other = node.args[1 - operand]
            assert isinstance(other, fx.Node)
            value = other if value is None else program.edit.call(aten.add.Tensor, value, other)
        elif value is not None and not has(node, _VIEWS):
            args = list(node.args)
            args[operand] = value
            value = program.edit.call(node.target, *args, **node.kwargs)
    return value


def drop(program: Program, names: list[str]) -> dict[str, fx.Node]:
    """Drop the sync points after these attention blocks, in order; return what each pair of blocks now writes.

    Raises:
        KeyError: a name is not that of a block whose sync point can be dropped.
    """
    points, _ = find_sync_points(program)
    now: dict[fx.Node, fx.Node] = {}
    selected = [points[name] for name in names]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for point in sorted(selected, key=lambda p: order[p.attention.add]):
        _drop_one(program, point, now)
    return {point.attention.name: now[point.ffn.add] for point in selected}


def _drop_one(program: Program, point: SyncPoint, now: dict[fx.Node, fx.Node]) -> None:
    call = program.edit.call
    x = now.get(point.attention.reads, point.attention.reads)
    with program.edit.before(point.attention.add):
        partial = _scaled(program, point.first)
        offset = _offset(program, point.first)
        local = call(composites.unreduced.default, partial, TENSOR_PARALLEL)
        if offset is not None:
            local = call(aten.add.Tensor, local, offset)
        local = call(aten.add.Tensor, x, local)
    with program.edit.before(point.ffn.add):
        total = all_reduce(program, call(aten.add.Tensor, partial, _scaled(program, point.second)))
        base = x
        for term in (offset, _offset(program, point.second)):
            if term is not None:
                base = call(aten.add.Tensor, base, term)
        reduced = call(aten.add.Tensor, base, total)
    program.edit.replace(point.ffn.add, reduced)
    program.edit.replace(point.attention.add, local)
    now[point.ffn.add] = reduced


def count_dropped(program: Program) -> int:
    """Return how many partial values are used as if they were replicated."""
    return program.operators["graphopt.unreduced"]


__all__ = ["SyncPoint", "Term", "count_dropped", "drop", "find_sync_points", "term_of"]
