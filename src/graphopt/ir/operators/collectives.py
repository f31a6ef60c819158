"""Collectives, and operators that return a different value on every rank.

Every operator names its group by a symbol (:mod:`graphopt.ir.groups`). In a process that belongs to the group, the
operator is a collective of torch.distributed; in a single process, a sharded program is unrolled instead
(:mod:`graphopt.ir.ranks.rank_programs`), and these operators are never called on values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .. import groups
from ..schema import arguments
from .library import composite_operator
from .placement_types import PARTIAL, WHOLE, Misplaced, Placement, Shard, check_whole
from .spec import OperatorSpec, Trait


def _place_slice(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    check_whole(placed, args["x"])
    rank = args["x"].meta["val"].dim()
    total = args["x"].meta["val"].shape[args["dim"]]
    return Shard(args["dim"] % rank, tuple(args["starts"]), int(args["length"]), int(total))


def place_sum(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    """Return the placement of a sum over ranks: the operand must be partial, the result is replicated."""
    source = arguments(node)["x"]
    if placed[source] != PARTIAL:
        raise Misplaced(f"{source.name} is {placed[source]}; only a partial sum is reduced")
    return WHOLE


def _place_gathered(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    source, dim = args["x"], args["dim"]
    placement = placed[source]
    if not (
        isinstance(placement, Shard) and placement.even and placement.dim == dim % source.meta["val"].dim()
    ):
        raise Misplaced(f"{source.name} is {placement}, and cannot be gathered along dimension {dim}")
    return WHOLE


def _place_scattered(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    place_sum(node, placed)
    args = arguments(node)
    size, dim = int(args["size"]), args["dim"] % node.meta["val"].dim()
    length = int(node.meta["val"].shape[dim])
    return Shard(dim, tuple(range(0, size * length, length)), length, size * length)


def _place_unreduced(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    if placed[arguments(node)["x"]] != PARTIAL:
        raise Misplaced("only a partial sum can be left unreduced")
    return WHOLE


def _place_rows(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    table, start = placed[args["weight"]], placed[args["start"]]
    if not (isinstance(table, Shard) and isinstance(start, Shard) and table.dim == 0 and table.even):
        raise Misplaced(f"its table is {table}, its first row {start}")
    return PARTIAL


@composite_operator(
    "local_slice(Tensor x, int dim, SymInt[] starts, SymInt length, str group) -> Tensor",
    spec=OperatorSpec(place=_place_slice, traits=Trait.PER_RANK),
)
def local_slice(x: Tensor, dim: int, starts: Sequence[int], length: int, group: str) -> Tensor:
    """Return this rank's shard of a replicated value.

    Args:
        x: the replicated value.
        dim: the dimension that is sharded.
        starts: the first entry of each rank's shard; two ranks may have the same shard.
        length: of every shard.
        group: whose ranks.
    """
    bound = groups.bound_group(group, x)
    return x.narrow(dim, starts[bound.rank if bound else 0], length)


@composite_operator(
    "all_reduce(Tensor x, str group) -> Tensor",
    spec=OperatorSpec(place=place_sum, traits=Trait.COLLECTIVE),
)
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Return the sum of all ranks' values, the same on every rank."""
    bound = groups.bound_group(group, x)
    return groups.all_reduce(x, bound) if bound else torch.empty_like(x)


@composite_operator(
    "all_gather(Tensor x, int dim, int size, str group) -> Tensor",
    spec=OperatorSpec(place=_place_gathered, traits=Trait.COLLECTIVE),
)
def all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Return all ranks' values concatenated along ``dim``; there are ``size`` ranks."""
    bound = groups.bound_group(group, x)
    if bound is None:
        return torch.cat([x] * size, dim)
    stacked = groups.all_gather(x.unsqueeze(0), bound)
    return torch.cat(list(stacked.unbind(0)), dim)


@composite_operator(
    "reduce_scatter(Tensor x, int dim, int size, str group) -> Tensor",
    spec=OperatorSpec(place=_place_scattered, traits=Trait.COLLECTIVE),
)
def reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Return this rank's shard, along ``dim``, of the sum of all ranks' values."""
    bound = groups.bound_group(group, x)
    parts = x.chunk(size, dim)
    if bound is None:
        return torch.empty_like(parts[0])
    return groups.reduce_scatter(torch.stack(parts), bound).squeeze(0)


@composite_operator(
    "unreduced(Tensor x, str group) -> Tensor",
    spec=OperatorSpec(place=_place_unreduced, traits=Trait.PER_RANK),
)
def unreduced(x: Tensor, group: str) -> Tensor:
    """Return a partial sum unchanged, marked to be used as if it were the full sum: a dropped sync point."""
    return x.clone()


@composite_operator(
    "local_embedding(Tensor weight, Tensor ids, Tensor start) -> Tensor", spec=OperatorSpec(place=_place_rows)
)
def local_embedding(weight: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """Look up rows of a table of which this rank has those from ``start`` (1,) on; other rows are zeros."""
    local_ids = ids - start
    inside = (local_ids >= 0) & (local_ids < weight.shape[0])
    rows = torch.nn.functional.embedding(local_ids.clamp(0, weight.shape[0] - 1), weight)
    return rows.masked_fill(inside.logical_not().unsqueeze(-1), 0.0)
