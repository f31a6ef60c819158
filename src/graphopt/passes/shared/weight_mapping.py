"""The mapping to the checkpoint after entries were selected from weights: the same expressions of the new values."""

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
    """Compute tensors of the checkpoint from the selected values, where nothing reads the original ones.

    A tensor may be the original value itself, a slice of it in a fused weight, or a value computed from it for the
    mapping to the checkpoint (a transposition, a scale that was folded in).

    Args:
        program: its checkpoint entries are changed.
        taken: the value that is read now, by the value that was read before.
        apart: names of checkpoint entries to leave unchanged.
        beside: nodes that also read the original values but do not need them kept.
    """
    ends = {*taken.values(), *beside}
    still_read = needed_for(program.outputs.values(), ends) - ends
    expressions = Expressions()
    replacements: dict[int, fx.Node] = {}
    for old, new in taken.items():
        for source in (old, _joined_tensor(old)):
            if source is not None and source not in still_read:
                replacements.setdefault(expressions(source), new)
    rewritten: dict[fx.Node, fx.Node | None] = {}
    replaced: list[fx.Node] = []
    for name, node in list(program.checkpoint.items()):
        if name not in apart:
            new_node = _rewrite(program, node, replacements, expressions, rewritten)
            if new_node is not None:
                program.checkpoint[name] = new_node
                replaced.append(node)
    # an outdated mapping would keep values alive, and stored, that are no longer read
    program.edit.erase_dead(n for n in replaced if n not in taken)


def _joined_tensor(node: fx.Node) -> fx.Node | None:
    """Return the operand of a concatenation that ``node`` slices out exactly; None if there is none."""
    if not is_operator(node, "aten.slice"):
        return None
    args = arguments(node)
    joined = args["self"]
    if not is_operator(joined, "aten.cat") or args["step"] != 1:
        return None
    dim = args["dim"] % joined.meta["val"].dim()
    if arguments(joined)["dim"] % joined.meta["val"].dim() != dim:
        return None
    total, start = int(joined.meta["val"].shape[dim]), 0
    end = total if args["end"] is None else min(int(args["end"]), total)
    for operand in arguments(joined)["tensors"]:
        size = int(operand.meta["val"].shape[dim])
        if (int(args["start"] or 0), end) == (start, start + size):
            return operand  # type: ignore[no-any-return]
        start += size
    return None


def _rewrite(
    program: Program,
    node: fx.Node,
    replacements: dict[int, fx.Node],
    expressions: Expressions,
    rewritten: dict[fx.Node, fx.Node | None],
) -> fx.Node | None:
    """Return the expression with selected values in place of the original ones; None if it reads none of them."""
    if node not in rewritten:
        number = expressions(node)
        rewritten[node] = replacements.get(number)
        if number not in replacements and node.op == "call_function":
            operands = node.all_input_nodes
            new_operands = {
                n: m
                for n in operands
                if (m := _rewrite(program, n, replacements, expressions, rewritten)) is not None
            }
            rewritten[node] = _repeat(program, node, new_operands) if new_operands else None
    return rewritten[node]


def _repeat(program: Program, node: fx.Node, new_operands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    resized = any(n.meta["val"].shape != m.meta["val"].shape for n, m in new_operands.items())
    if resized and has(node, Trait.PART):
        return None  # where its slice begins now is not known
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: new_operands.get(n, n))
    inputs: list[fx.Node] = []
    fx.map_arg((args, kwargs), inputs.append)
    try:
        with program.edit.after(max(inputs)):
            return program.edit.call(node.target, *args, **kwargs)
    except VerificationError:
        return None
