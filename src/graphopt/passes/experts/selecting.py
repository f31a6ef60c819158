"""Selecting experts of mixture-of-experts layers: importance by their routing, and removing some of them."""

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
    """Return one score per expert by block name: ``weight``, the sum of its routing weights over calibration tokens;
    ``count``, how many tokens are routed to it; ``random``, a control."""
    if score == "random":
        return {b.name: torch.rand(int(b.sizes["experts"]), generator=context.rng).double() for b in blocks}
    scores = {b.name: torch.zeros(int(b.sizes["experts"]), dtype=torch.float64) for b in blocks}
    reads = {b.name: [arguments(b.parts["core"])[n] for n in ("experts", "weights")] for b in blocks}
    for batch, values in context.record(program, dict.fromkeys(n for pair in reads.values() for n in pair)):
        mask = batch.get("attention_mask")
        for name, (chosen, weights) in reads.items():
            experts, routing_weights = values[chosen.name], values[weights.name].double()
            if mask is not None and mask.numel() == len(experts):
                valid = mask.reshape(-1).bool()
                experts, routing_weights = experts[valid], routing_weights[valid]
            # a frozen lower number of active experts marks omitted ones by an index that no expert has
            present = experts < scores[name].numel()
            experts, routing_weights = experts[present], routing_weights[present]
            amounts = torch.ones_like(routing_weights) if score == "count" else routing_weights
            scores[name].index_add_(0, experts.reshape(-1), amounts.reshape(-1))
    return scores


def groups_of(block: Block) -> int:
    """Return the number of groups into which a router divides its experts; 1 if there are no groups."""
    args = arguments(block.parts["core"])
    count = int(args["up"].meta["val"].shape[0])
    for node in between(block.parts["router"], [args["experts"], args["weights"]]):
        shape = list(node.meta["val"].shape) if is_operator(node, "aten.reshape") else []
        if len(shape) > 2 and all(isinstance(s, int) for s in shape[-2:]) and shape[-2] * shape[-1] == count:
            return int(shape[-2])
    return 1


def take_experts(program: Program, block: Block, left: list[int]) -> None:
    """Keep only some experts of an MoE layer; its router chooses among them.

    Raises:
        ValueError: the computation from the router to the choice depends on how many experts there are.
    """
    core, router = block.parts["core"], block.parts["router"]
    call_args = dict(arguments(core))
    count = int(call_args["up"].meta["val"].shape[0])
    index = _add_index(program, left)
    constant = depends_on_weights_alone(program)
    renamed = _new_names(program, block, left, count)
    inside = between(router, [call_args["experts"], call_args["weights"]])
    rewritten: dict[fx.Node, fx.Node] = {}
    selected: dict[fx.Node, fx.Node] = {}
    with program.edit.before(router):
        router_args = dict(arguments(router))
        for name in ("weight", "bias"):
            if router_args.get(name) is not None:
                # scores after those of the experts belong to shared experts
                rows = int(router_args[name].meta["val"].shape[0])
                scored = index if rows == count else _add_index(program, [*left, *range(count, rows)])
                router_args[name] = _select_rows(program, selected, router_args[name], scored)
        args, kwargs = normal_call(router.target, router_args)
        rewritten[router] = program.edit.call(router.target, *args, **kwargs)
    for node in inside:
        with program.edit.before(node):
            rewritten[node] = _repeat(program, node, rewritten, selected, constant, count, index)
    with program.edit.before(core):
        for name in ("up", "down", "up_bias", "down_bias"):
            if call_args[name] is not None:
                call_args[name] = _select_rows(program, selected, call_args[name], index)
        for name in ("experts", "weights"):
            call_args[name] = rewritten[call_args[name]]
        args, kwargs = normal_call(core.target, call_args)
        new_core = program.edit.call(core.target, *args, **kwargs)
    # the weight of a shared expert is computed here too
    for node in [n for n in inside if any(user not in inside and user is not core for user in n.users)]:
        if not same_value(node.meta["val"], rewritten[node].meta["val"]):
            raise ValueError(f"{node.name} has other readers, and a value for each expert")
        program.edit.replace(node, rewritten[node], record=False)
    program.edit.replace(core, new_core)
    follow(program, selected, renamed)
    new_entries = ((renamed.get(name, name), node) for name, node in program.checkpoint.items())
    program.checkpoint = {name: node for name, node in new_entries if name}


def _add_index(program: Program, left: list[int]) -> fx.Node:
    names = {w.name for w in program.weights.values()}
    name = next(f"experts_left.{n}" for n in range(10**6) if f"experts_left.{n}" not in names)
    return program.edit.add_weight(name, torch.tensor(left), kind="constant", persistent=False)


def _select_rows(
    program: Program, selected: dict[fx.Node, fx.Node], tensor: fx.Node, index: fx.Node, dim: int = 0
) -> fx.Node:
    """Return selected entries of a weight, taken below casts and views, where the checkpoint has it, and record the
    selection."""
    if tensor not in selected:
        inner_dim = _dimension_below(tensor, dim)
        if inner_dim is None:
            selected[tensor] = program.edit.call(aten.index_select.default, tensor, dim, index)
        else:
            call_args = arguments(tensor)
            call_args["self"] = _select_rows(program, selected, call_args["self"], index, inner_dim)
            if is_operator(tensor, "aten.reshape"):
                sizes = [int(s) for s in tensor.meta["val"].shape]
                sizes[dim] = int(index.meta["val"].shape[0])
                call_args[next(n for n in ("shape", "size") if n in call_args)] = sizes
            args, kwargs = normal_call(tensor.target, call_args)
            selected[tensor] = program.edit.call(tensor.target, *args, **kwargs)
    return selected[tensor]


def _dimension_below(tensor: fx.Node, dim: int) -> int | None:
    """Return the dimension of a cast's or view's operand that corresponds to one of the result; None if none does."""
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
    """Return the nodes computed from a router's scores up to the choice of experts, in order."""
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


def _repeat(
    program: Program,
    node: fx.Node,
    rewritten: dict[fx.Node, fx.Node],
    selected: dict[fx.Node, fx.Node],
    constant: set[fx.Node],
    count: int,
    index: fx.Node,
) -> fx.Node:
    """Return the node of an operator repeated for fewer experts."""

    def replacement(value: fx.Node) -> fx.Node:
        if value in rewritten:
            return rewritten[value]
        example = value.meta.get("val")
        if (
            value in constant
            and isinstance(example, torch.Tensor)
            and example.dim()
            and example.shape[-1] == count
        ):
            return _select_rows(program, selected, value, index, example.dim() - 1)
        return value

    args, kwargs = fx.map_arg((node.args, node.kwargs), replacement)
    if is_operator(node, "aten.reshape", "aten.expand"):
        sizes: Any = args[1]
        args = (args[0], _resized(list(sizes), count, int(index.meta["val"].shape[0])), *args[2:])
    try:
        return program.edit.call(node.target, *args, **kwargs)
    except VerificationError as error:
        raise ValueError(f"{node.name} does not accept fewer experts: {error.message}") from None


def _resized(sizes: list[Any], count: int, left: int) -> list[Any]:
    """Return sizes in which the number of experts, or of experts per group, is replaced by the number left."""
    if (
        len(sizes) > 2
        and all(isinstance(s, int) and s > 0 for s in sizes[-2:])
        and sizes[-2] * sizes[-1] == count
    ):
        return [*sizes[:-1], left // sizes[-2]]
    return [*sizes[:-1], left] if sizes and sizes[-1] == count else sizes


def _new_names(program: Program, block: Block, left: list[int], count: int) -> dict[str, str]:
    """Return new names for tensors that a checkpoint stores per expert; an empty name for those removed."""
    args = arguments(block.parts["core"])
    tensors = [args[n] for n in ("up", "down", "up_bias", "down_bias") if args[n] is not None]
    nodes = needed_for(tensors, ())
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name, node in program.checkpoint.items():
        # a loaded program stores them joined, and its mapping slices each one out
        belongs = node in nodes or not nodes.isdisjoint(needed_for([node], ()))
        for match in re.finditer(r"(?<=\.)\d+(?=\.)", name) if belongs else ():
            groups.setdefault((name[: match.start()], name[match.end() :]), {})[int(match.group())] = name
    renamed: dict[str, str] = {}
    for (before, after), members in groups.items():
        if set(members) == set(range(count)):
            for number, name in members.items():
                renamed[name] = f"{before}{left.index(number)}{after}" if number in left else ""
    return renamed
