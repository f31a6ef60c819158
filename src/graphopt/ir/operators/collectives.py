"""What ranks do together, and what each does with its own share.

Every operator names its group by a symbol (:mod:`graphopt.ir.groups`). In a process of its own group the operator
is a collective of torch.distributed; in a single process a sharded program is unrolled instead
(:mod:`graphopt.ir.ranks.rank_programs`), and these are never called on values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import groups
from .library import dialect_operator


@dialect_operator("local_slice(Tensor x, int dim, SymInt[] starts, SymInt length, str group) -> Tensor")
def local_slice(x: Tensor, dim: int, starts: Sequence[int], length: int, group: str) -> Tensor:
    """Return this rank's part of a value that every rank has, or could have.

    Args:
        x: the whole.
        dim: the dimension that is cut.
        starts: where the part of each rank begins; two ranks may have the same part.
        length: of every part.
        group: whose ranks.
    """
    bound = groups.bound_group(group, x)
    return x.narrow(dim, starts[bound.rank if bound else 0], length)


@dialect_operator("all_reduce(Tensor x, str group) -> Tensor")
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Return the sum of all ranks' values, the same on every rank."""
    bound = groups.bound_group(group, x)
    return groups.all_reduce(x, bound) if bound else torch.empty_like(x)


@dialect_operator("all_gather(Tensor x, int dim, int size, str group) -> Tensor")
def all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Return all ranks' values one after the other along ``dim``; there are ``size`` ranks."""
    bound = groups.bound_group(group, x)
    if bound is None:
        return torch.cat([x] * size, dim)
    stacked = groups.all_gather(x.unsqueeze(0), bound)
    return torch.cat(list(stacked.unbind(0)), dim)


@dialect_operator("reduce_scatter(Tensor x, int dim, int size, str group) -> Tensor")
def reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Return this rank's part, along ``dim``, of the sum of all ranks' values."""
    bound = groups.bound_group(group, x)
    parts = x.chunk(size, dim)
    if bound is None:
        return torch.empty_like(parts[0])
    return groups.reduce_scatter(torch.stack(parts), bound).squeeze(0)


@dialect_operator("unreduced(Tensor x, str group) -> Tensor")
def unreduced(x: Tensor, group: str) -> Tensor:
    """Return a partial sum as it is, said to be used as if it were the whole: a dropped sync point."""
    return x.clone()


@dialect_operator("local_embedding(Tensor weight, Tensor ids, Tensor start) -> Tensor")
def local_embedding(weight: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """Look up rows of a table of which this rank has those from ``start`` (1,) on; zeros for all others."""
    own = ids - start
    inside = (own >= 0) & (own < weight.shape[0])
    rows = torch.nn.functional.embedding(own.clamp(0, weight.shape[0] - 1), weight)
    return rows.masked_fill(inside.logical_not().unsqueeze(-1), 0.0)
