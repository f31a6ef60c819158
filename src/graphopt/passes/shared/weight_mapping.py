"""A checkpoint's tensors after weights were taken from: the same expressions, of what is read now."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ...ir.errors import VerificationError
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.running.expressions import Expressions
from ...ir.schema import arguments, is_operator

aten = torch.ops.aten


def follow(
    program: Program,
    taken: dict[fx.Node, fx.Node],
    apart: Collection[str] = (),
    beside: Collection[fx.Node] = (),
) -> None:
    """Let tensors of the checkpoint be computed from the taken values, where nothing reads them as they were.

    A tensor may be the value that was taken from, a part that a fused weight has of it, or what was made of it to
    be read back (a transposition, a scale that was folded in).

    Args:
        program: its checkpoint entries are changed.
        taken: what is read now, by the value that was read before.
        apart: names of entries that stay as they are.
        beside: what also reads the values as they were, and keeps none of them.
    """
    ends = {*taken.values(), *beside}
    still = needed_for(program.outputs.values(), ends) - ends
    numbered = Expressions()
    now: dict[int, fx.Node] = {}
    for old, new in taken.items():
        for known in (old, _part_of_whole(old)):
            if known is not None and known not in still:
                now.setdefault(numbered(known), new)
    made_of: dict[fx.Node, fx.Node | None] = {}
    left: list[fx.Node] = []
    for name, held in list(program.checkpoint.items()):
        if name not in apart:
            made = _again(program, held, now, numbered, made_of)
            if made is not None:
                program.checkpoint[name] = made
                left.append(held)
    # an old way back would keep alive, and stored, what is no longer read
    program.edit.erase_dead(n for n in left if n not in taken)


def _part_of_whole(node: fx.Node) -> fx.Node | None:
    """Return the tensor that was put into a joined one just where ``node`` takes a part of it."""
    if not is_operator(node, "aten.slice"):
        return None
    found = arguments(node)
    joined = found["self"]
    if not is_operator(joined, "aten.cat") or found["step"] != 1:
        return None
    dim = found["dim"] % joined.meta["val"].dim()
    if arguments(joined)["dim"] % joined.meta["val"].dim() != dim:
        return None
    total, start = int(joined.meta["val"].shape[dim]), 0
    ends = total if found["end"] is None else min(int(found["end"]), total)
    for operand in arguments(joined)["tensors"]:
        size = int(operand.meta["val"].shape[dim])
        if (int(found["start"] or 0), ends) == (start, start + size):
            return operand  # type: ignore[no-any-return]
        start += size
    return None


def _again(
    program: Program,
    held: fx.Node,
    now: dict[int, fx.Node],
    numbered: Expressions,
    known: dict[fx.Node, fx.Node | None],
) -> fx.Node | None:
    """Return the expression with taken values in the place of those before; None where nothing was taken."""
    if held not in known:
        number = numbered(held)
        known[held] = now.get(number)
        if number not in now and held.op == "call_function":
            read = held.all_input_nodes
            others = {n: m for n in read if (m := _again(program, n, now, numbered, known)) is not None}
            known[held] = _call(program, held, others) if others else None
    return known[held]


def _call(program: Program, held: fx.Node, others: dict[fx.Node, fx.Node]) -> fx.Node | None:
    resized = any(n.meta["val"].shape != m.meta["val"].shape for n, m in others.items())
    if resized and has(held, Trait.PART):
        return None  # where its part begins now is not known
    args, kwargs = fx.map_arg((held.args, held.kwargs), lambda n: others.get(n, n))
    read: list[fx.Node] = []
    fx.map_arg((args, kwargs), read.append)
    try:
        with program.edit.after(max(read)):
            return program.edit.call(held.target, *args, **kwargs)
    except VerificationError:
        return None
