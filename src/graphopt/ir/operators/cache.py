"""KV caches: where the keys and values of new tokens are stored, and which of them a token sees.

A cache has a slot for each token of a row; committed tokens are in the slot of their position. Tokens of one step may
be in other slots (the nodes of a tree share positions), after the committed ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..schema import arguments
from .library import composite_operator
from .placement_types import Misplaced, Placement, check_whole, placement_of
from .spec import OperatorSpec, like_first
from .work import Call, Work, product


def _store_work(call: Call) -> Work:
    """Bytes: the new tokens' values, read and written in place; no arithmetic."""
    values = call.tensor("values")
    return Work(0, 0, 2 * product(values.shape) * values.dtype.itemsize)


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    cache, values = placement_of(args["cache"], placed), placement_of(args["values"], placed)
    check_whole(placed, args["slots"])
    if cache != values:
        raise Misplaced(f"its cache is {cache}, and the values to store are {values}")
    return cache


def _visible_shape(
    positions: Tensor, slots: Tensor, cache: Tensor, *others: object, **options: object
) -> Tensor:
    return positions.new_empty((positions.shape[0], 1, positions.shape[1], cache.shape[2]), dtype=torch.bool)


def _visible_work(call: Call) -> Work:
    """Two comparisons for each token and slot; bytes of the result."""
    pairs = product(call.tensor("positions").shape) * call.tensor("cache").shape[2]
    return Work(2 * pairs, 0, pairs)


@composite_operator(
    "cache_store(Tensor cache, Tensor values, Tensor slots) -> Tensor",
    spec=OperatorSpec(shape=like_first, work=_store_work, place=_place),
)
def cache_store(cache: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Return the cache with new tokens' keys, or values, in their slots.

    Args:
        cache: (batch, key-value heads, capacity, size).
        values: (batch, key-value heads, tokens, size).
        slots: (batch, tokens), integers below the capacity, all different in a row.
    """
    index = slots[:, None, :, None].expand(values.shape)
    return cache.scatter(2, index, values.to(cache.dtype))


@composite_operator("cache_positions(Tensor positions, Tensor slots, SymInt capacity) -> Tensor")
def cache_positions(positions: Tensor, slots: Tensor, capacity: int) -> Tensor:
    """Return the position of the token in each slot: the slot's index, except for slots written in this step.

    Args:
        positions: (batch, tokens), of the new tokens.
        slots: (batch, tokens), where they are stored.
        capacity: number of slots.

    Returns:
        (batch, capacity), integers.
    """
    numbers = torch.arange(capacity, device=positions.device, dtype=positions.dtype)
    return numbers.expand(positions.shape[0], -1).scatter(1, slots, positions)


@composite_operator(
    "cache_visible(Tensor positions, Tensor slots, Tensor cache, Tensor? step_mask=None, *, int? window=None) -> Tensor",
    spec=OperatorSpec(shape=_visible_shape, work=_visible_work),
)
def cache_visible(
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    step_mask: Tensor | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Return which slots each new token sees: those up to its position and within its window.

    Args:
        positions: (batch, tokens), of the new tokens.
        slots: (batch, tokens), where they are stored.
        cache: (batch, heads, capacity, size), read for its capacity.
        step_mask: (batch, tokens, tokens), true where a new token sees another one of the same step, as in a tree;
            if left out, positions alone decide.
        window: how many positions a token sees, including its own.

    Returns:
        (batch, 1, tokens, capacity), booleans. Slots after the new tokens are never visible: their position is taken
        to be their index.
    """
    capacity = cache.shape[2]
    slot_positions = cache_positions(positions, slots, capacity)
    distance = positions[:, :, None] - slot_positions[:, None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if step_mask is not None:
        tokens = positions.shape[1]
        # index 0 stands for slots that were not written in this step
        order = torch.arange(1, tokens + 1, device=positions.device).expand(positions.shape)
        step_index = torch.zeros_like(slot_positions).scatter(1, slots, order)
        among = torch.cat([step_mask.new_ones(step_mask.shape[0], tokens, 1), step_mask], dim=2)
        seen = seen & among.to(torch.bool).gather(2, step_index[:, None, :].expand(-1, tokens, -1))
    return seen[:, None]
