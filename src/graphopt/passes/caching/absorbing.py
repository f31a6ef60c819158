"""Linear maps of keys and values, taken into the projections of queries and of attention's output.

With ``R`` a rotation and ``A`` a map that commutes with it, ``(R q) . (A R k) = (R A^T q) . (R k)``; and for any weights
``a`` of attention, ``W_O (sum of a B v) = (W_O B) (sum of a v)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator
from .moved_entries import ELSEWHERE, Untraceable, by_head, moved, rotations, sizes_of

if TYPE_CHECKING:
    from ...ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Queries:
    """The projection of queries.

    Attributes:
        linear: the projection.
        rows: (heads, size): which of its outputs is which entry of a query.
        pairs: entries that are rotated together, as (first, second); the others are not rotated.
    """

    linear: fx.Node
    rows: torch.Tensor
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Outputs:
    """The projection of what attention gives.

    Attributes:
        linear: the projection.
        columns: (heads, size): which of its inputs is which entry of a head's result.
    """

    linear: fx.Node
    columns: torch.Tensor


def queries_of(program: Program, core: fx.Node) -> Queries | str:
    """Return the projection of an attention's queries, or why a map of keys cannot be taken into it."""
    query = arguments(core)["q"]
    try:
        linear = _projection(program, query)
        count = int(linear.meta["val"].shape[-1])
        numbers = torch.arange(count).expand(sizes_of(program, linear))
        rows = by_head(moved(program, query, {linear: numbers}))
        if rows.min() < 0 or len(set(rows.flatten().tolist())) != rows.numel():
            return "its queries are not one entry of a projection each"
        return Queries(linear, rows, _pairs(program, query))
    except Untraceable as problem:
        return f"its queries: {problem}"


def _projection(program: Program, value: fx.Node) -> fx.Node:
    """Return the only linear with a constant matrix that a value comes from."""
    constant = depends_on_weights_alone(program)
    found: list[fx.Node] = []
    work, seen = [value], {value}
    while work:
        node = work.pop()
        if is_operator(node, "aten.linear") and node.args[1] in constant:
            found.append(node)
        elif has(node, Trait.MIXING) or node.op != "call_function":
            raise Untraceable("they are not the result of one linear")
        else:
            first = node.args[0]
            following = (
                [arguments(node)["x"]] if is_operator(node, "graphopt.rotary") else node.all_input_nodes
            )
            if has(node, Trait.POINTWISE | Trait.NORM) and isinstance(first, fx.Node):
                following = [first]
            following = [n for n in following if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]
            work.extend(n for n in following if n not in seen)
            seen.update(following)
    if len(found) != 1:
        raise Untraceable(f"they are the result of {len(found)} linears")
    return found[0]


def _pairs(program: Program, query: fx.Node) -> tuple[tuple[int, int], ...]:
    """Return the entries of a head that are rotated together."""
    pairs: list[tuple[int, int]] = []
    turned = rotations(query)
    for rotation in turned:
        if any(other is not rotation and rotation in rotations(arguments(other)["x"]) for other in turned):
            raise Untraceable("they are rotated twice")
        shape = sizes_of(program, rotation)
        others = {other: torch.full(sizes_of(program, other), ELSEWHERE) for other in turned}
        placed = by_head(moved(program, query, {**others, rotation: torch.arange(shape[-1]).expand(shape)}))
        if not torch.equal(placed, placed[:1].expand_as(placed)):
            raise Untraceable("heads are rotated in different entries")
        where = {int(number): entry for entry, number in enumerate(placed[0]) if number != ELSEWHERE}
        if len(where) != shape[-1]:
            raise Untraceable("they are no longer whole behind their rotation")
        half = shape[-1] // 2
        both = ((2 * i, 2 * i + 1) for i in range(half))
        if not arguments(rotation)["interleaved"]:
            both = ((i, i + half) for i in range(half))
        pairs.extend((where[first], where[second]) for first, second in both)
    return tuple(pairs)


def outputs_of(program: Program, core: fx.Node) -> Outputs | str:
    """Return the projection that reads what an attention gives, or why a map of values cannot be taken into it."""
    node = core
    constant = depends_on_weights_alone(program)
    while True:
        if len(node.users) != 1:
            return "what it gives is read in several places"
        (user,) = node.users
        if is_operator(user, "aten.linear") and user.args[0] is node and user.args[1] in constant:
            break
        if user.op == "output" or has(user, Trait.MIXING):
            return "no linear reads what it gives"
        node = user
    shape = sizes_of(program, core)
    numbers = torch.arange(shape[1] * shape[3]).reshape(1, shape[1], 1, shape[3]).expand(shape)
    try:
        placed = moved(program, node, {core: numbers})
    except Untraceable:
        return "what it gives is changed before a linear reads it, as by a gate"
    flat = placed.reshape(-1, placed.shape[-1])
    order = flat[0]
    if not torch.equal(flat, order.expand_as(flat)) or not torch.equal(
        order.sort().values, torch.arange(shape[1] * shape[3])
    ):
        return "what it gives is not laid out head by head where a linear reads it"
    return Outputs(user, order.argsort().reshape(shape[1], shape[3]))


def absorb_keys(program: Program, queries: Queries, maps: torch.Tensor) -> dict[fx.Node, fx.Node]:
    """Let queries meet keys ``k`` as they met ``maps @ k``.

    Args:
        program: changed in place.
        queries: their projection.
        maps: (key-value heads, size, size), which commute with the rotation.

    Returns:
        The new weights by those that they take the place of.
    """
    linear, (heads, size) = queries.linear, queries.rows.shape
    flipped = maps.transpose(1, 2).repeat_interleave(heads // maps.shape[0], 0)
    changed: dict[fx.Node, fx.Node] = {}
    args = arguments(linear)
    with program.edit.before(linear):
        by = _constant(program, "keys", flipped.to(torch.float64))
        for name in ("weight", "bias"):
            old = args[name]
            if old is None:
                continue
            width = [int(old.meta["val"].shape[1])] if name == "weight" else [1]
            product = partial(_product, program, by, [heads, size, *width])
            changed[old] = _mapped(program, old, queries.rows, product)
    program.edit.change(linear, **{n: changed[args[n]] for n in ("weight", "bias") if args[n] is not None})
    return changed


def absorb_values(program: Program, outputs: Outputs, maps: torch.Tensor) -> dict[fx.Node, fx.Node]:
    """Let the output projection read values ``v`` as it read ``maps @ v``.

    Args:
        program: changed in place.
        outputs: the projection.
        maps: (key-value heads, size, size).

    Returns:
        The new weight by the one that it takes the place of.
    """
    linear, (heads, size) = outputs.linear, outputs.columns.shape
    flipped = maps.transpose(1, 2).repeat_interleave(heads // maps.shape[0], 0)
    call = program.edit.call
    old = arguments(linear)["weight"]
    with program.edit.before(linear):
        by = _constant(program, "values", flipped.to(torch.float64))
        columns = call(aten.permute.default, old, [1, 0])
        width = int(old.meta["val"].shape[0])
        product = partial(_product, program, by, [heads, size, width])
        mapped = _mapped(program, columns, outputs.columns, product)
        new = call(aten.permute.default, mapped, [1, 0])
    program.edit.change(linear, weight=new)
    return {old: new}


def _constant(program: Program, what: str, values: torch.Tensor) -> fx.Node:
    names = {w.name for w in program.weights.values()}
    number = next(i for i in range(len(names) + 1) if f"shared.{what}_{i}" not in names)
    return program.edit.add_weight(f"shared.{what}_{number}", values, kind="constant", persistent=False)


def _product(program: Program, by: fx.Node, shape: list[int], rows: fx.Node) -> fx.Node:
    """Multiply the rows of each head (heads * size, width) by that head's matrix."""
    call = program.edit.call
    product = call(aten.matmul.default, by, call(aten.reshape.default, rows, shape))
    return call(aten.reshape.default, product, [shape[0] * shape[1], *shape[2:]])


def _mapped(
    program: Program, old: fx.Node, order: torch.Tensor, function: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Apply a function to some rows, in the order of heads and in float64, and put them back where they were."""
    call, dtype = program.edit.call, old.meta["val"].dtype
    flat, count = order.reshape(-1), int(old.meta["val"].shape[0])
    others = torch.ones(count, dtype=torch.bool)
    others[flat] = False
    whole = torch.cat([flat, others.nonzero()[:, 0]])
    straight = torch.equal(whole, torch.arange(count))
    rows = old if dtype == torch.float64 else call(aten.to.dtype, old, torch.float64)
    if not straight:
        rows = call(aten.index_select.default, rows, 0, _constant(program, "order", whole))
    mapped = rows if not others.any() else call(aten.slice.Tensor, rows, 0, 0, flat.numel())
    mapped = function(mapped)
    if old.meta["val"].dim() == 1:
        mapped = call(aten.reshape.default, mapped, [-1])
    if others.any():
        # a gate, for one, may be made by the same matrix
        mapped = call(aten.cat.default, [mapped, call(aten.slice.Tensor, rows, 0, flat.numel(), count)])
    if not straight:
        mapped = call(aten.index_select.default, mapped, 0, _constant(program, "order", whole.argsort()))
    return mapped if dtype == torch.float64 else call(aten.to.dtype, mapped, dtype)


__all__ = ["Outputs", "Queries", "absorb_keys", "absorb_values", "outputs_of", "queries_of"]
