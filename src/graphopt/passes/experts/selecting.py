"""Mixtures with fewer experts: importance by what routers give them, and taking some of them out."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import VerificationError
from ...ir.infer import same_value
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator, normal_call
from ..shared.weight_mapping import follow

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten


def expert_scores(
    program: Program, context: Context, blocks: list[Block], score: str
) -> dict[str, torch.Tensor]:
    """Return a score an expert by block name: ``weight``, the sum of its routing weights over calibration tokens;
    ``count``, how many tokens go to it; ``random``, a control."""
    if score == "random":
        return {b.name: torch.rand(int(b.sizes["experts"]), generator=context.rng).double() for b in blocks}
    found = {b.name: torch.zeros(int(b.sizes["experts"]), dtype=torch.float64) for b in blocks}
    reads = {b.name: [arguments(b.parts["core"])[n] for n in ("experts", "weights")] for b in blocks}
    for batch, values in context.record(program, dict.fromkeys(n for pair in reads.values() for n in pair)):
        mask = batch.get("attention_mask")
        for name, (chosen, weights) in reads.items():
            experts, given = values[chosen.name], values[weights.name].double()
            if mask is not None and mask.numel() == len(experts):
                seen = mask.reshape(-1).bool()
                experts, given = experts[seen], given[seen]
            # a dial that was fixed lower marks those left out by a number that no expert has
            there = experts < found[name].numel()
            experts, given = experts[there], given[there]
            amounts = torch.ones_like(given) if score == "count" else given
            found[name].index_add_(0, experts.reshape(-1), amounts.reshape(-1))
    return found


def groups_of(block: Block) -> int:
    """Return in how many groups a router looks at its experts; 1 where it looks at them together."""
    found = arguments(block.parts["core"])
    count = int(found["up"].meta["val"].shape[0])
    for node in between(block.parts["router"], [found["experts"], found["weights"]]):
        shape = list(node.meta["val"].shape) if is_operator(node, "aten.reshape") else []
        if len(shape) > 2 and all(isinstance(s, int) for s in shape[-2:]) and shape[-2] * shape[-1] == count:
            return int(shape[-2])
    return 1


def take_experts(program: Program, block: Block, left: list[int]) -> None:
    """Let a mixture have only some of its experts; its router chooses among them.

    Raises:
        ValueError: the way from the router to the choice depends on how many experts there are.
    """
    core, router = block.parts["core"], block.parts["router"]
    found = dict(arguments(core))
    count = int(found["up"].meta["val"].shape[0])
    index = _index(program, left)
    constant = depends_on_weights_alone(program)
    renamed = _renamed(program, block, left, count)
    inside = between(router, [found["experts"], found["weights"]])
    now: dict[fx.Node, fx.Node] = {}
    taken: dict[fx.Node, fx.Node] = {}
    with program.edit.before(router):
        given = dict(arguments(router))
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                # scores behind the experts' are those of shared ones
                rows = int(given[name].meta["val"].shape[0])
                scored = index if rows == count else _index(program, [*left, *range(count, rows)])
                given[name] = _rows(program, taken, given[name], scored)
        args, kwargs = normal_call(router.target, given)
        now[router] = program.edit.call(router.target, *args, **kwargs)
    for node in inside:
        with program.edit.before(node):
            now[node] = _again(program, node, now, taken, constant, count, index)
    with program.edit.before(core):
        for name in ("up", "down", "up_bias", "down_bias"):
            if found[name] is not None:
                found[name] = _rows(program, taken, found[name], index)
        for name in ("experts", "weights"):
            found[name] = now[found[name]]
        args, kwargs = normal_call(core.target, found)
        made = program.edit.call(core.target, *args, **kwargs)
    # what a shared expert is weighted by comes the same way
    for node in [n for n in inside if any(user not in inside and user is not core for user in n.users)]:
        if not same_value(node.meta["val"], now[node].meta["val"]):
            raise ValueError(f"{node.name} is read besides, and has a number for each expert")
        program.edit.replace(node, now[node], record=False)
    program.edit.replace(core, made)
    follow(program, taken, renamed)
    named = ((renamed.get(name, name), node) for name, node in program.checkpoint.items())
    program.checkpoint = {name: node for name, node in named if name}


def _index(program: Program, left: list[int]) -> fx.Node:
    taken = {w.name for w in program.weights.values()}
    name = next(f"experts_left.{n}" for n in range(10**6) if f"experts_left.{n}" not in taken)
    return program.edit.add_weight(name, torch.tensor(left), kind="constant", persistent=False)


def _rows(
    program: Program, taken: dict[fx.Node, fx.Node], tensor: fx.Node, index: fx.Node, dim: int = 0
) -> fx.Node:
    """Take entries of a weight below what only casts or views it, where a checkpoint has it, and write down that they
    were taken."""
    if tensor not in taken:
        under = _dimension_below(tensor, dim)
        if under is None:
            taken[tensor] = program.edit.call(aten.index_select.default, tensor, dim, index)
        else:
            found = arguments(tensor)
            found["self"] = _rows(program, taken, found["self"], index, under)
            if is_operator(tensor, "aten.reshape"):
                sizes = [int(s) for s in tensor.meta["val"].shape]
                sizes[dim] = int(index.meta["val"].shape[0])
                found[next(n for n in ("shape", "size") if n in found)] = sizes
            args, kwargs = normal_call(tensor.target, found)
            taken[tensor] = program.edit.call(tensor.target, *args, **kwargs)
    return taken[tensor]


def _dimension_below(tensor: fx.Node, dim: int) -> int | None:
    """Return which dimension of its operand a cast's or view's dimension is, if it is one."""
    if not has(tensor, Trait.RESHAPE | Trait.CAST):
        return None
    below = arguments(tensor)["self"]
    if is_operator(tensor, "aten.to"):
        return dim
    inner, outer = list(below.meta["val"].shape), list(tensor.meta["val"].shape)
    if not all(isinstance(s, int) for s in (*inner, *outer)):
        return None
    before = math.prod(outer[:dim])
    return next(
        (d for d, size in enumerate(inner) if size == outer[dim] and math.prod(inner[:d]) == before), None
    )


def between(start: fx.Node, ends: list[fx.Node]) -> list[fx.Node]:
    """What is computed from a router's scores on the way to the choice, in order."""
    needed: set[fx.Node] = set()
    work = list(ends)
    while work:
        node = work.pop()
        if node not in needed and node is not start and node.op == "call_function":
            needed.add(node)
            work.extend(node.all_input_nodes)
    reached, order = {start}, []
    for node in sorted(needed):
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            order.append(node)
    return order


def _again(
    program: Program,
    node: fx.Node,
    now: dict[fx.Node, fx.Node],
    taken: dict[fx.Node, fx.Node],
    constant: set[fx.Node],
    count: int,
    index: fx.Node,
) -> fx.Node:
    """Call an operator for fewer experts."""

    def other(value: fx.Node) -> fx.Node:
        if value in now:
            return now[value]
        held = value.meta.get("val")
        if value in constant and isinstance(held, torch.Tensor) and held.dim() and held.shape[-1] == count:
            return _rows(program, taken, value, index, held.dim() - 1)
        return value

    args, kwargs = fx.map_arg((node.args, node.kwargs), other)
    if is_operator(node, "aten.reshape", "aten.expand"):
        sizes: Any = args[1]
        args = (args[0], _fewer(list(sizes), count, int(index.meta["val"].shape[0])), *args[2:])
    try:
        return program.edit.call(node.target, *args, **kwargs)
    except VerificationError as error:
        raise ValueError(f"{node.name} does not accept fewer experts: {error.message}") from None


def _fewer(sizes: list[Any], count: int, left: int) -> list[Any]:
    """Sizes that name how many experts there are, or how many a group has, with as many as are left."""
    if (
        len(sizes) > 2
        and all(isinstance(s, int) and s > 0 for s in sizes[-2:])
        and sizes[-2] * sizes[-1] == count
    ):
        return [*sizes[:-1], left // sizes[-2]]
    return [*sizes[:-1], left] if sizes and sizes[-1] == count else sizes


def _renamed(program: Program, block: Block, left: list[int], count: int) -> dict[str, str]:
    """New names for tensors that a checkpoint holds one an expert; an empty name for those that go."""
    found = arguments(block.parts["core"])
    tensors = [found[n] for n in ("up", "down", "up_bias", "down_bias") if found[n] is not None]
    nodes = needed_for(tensors, ())
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name, node in program.checkpoint.items():
        # a loaded program holds them together, and reads each back out of the whole
        own = node in nodes or not nodes.isdisjoint(needed_for([node], ()))
        for match in re.finditer(r"(?<=\.)\d+(?=\.)", name) if own else ():
            groups.setdefault((name[: match.start()], name[match.end() :]), {})[int(match.group())] = name
    renamed: dict[str, str] = {}
    for (before, after), members in groups.items():
        if set(members) == set(range(count)):
            for number, name in members.items():
                renamed[name] = f"{before}{left.index(number)}{after}" if number in left else ""
    return renamed
