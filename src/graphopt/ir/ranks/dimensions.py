"""Sources of a result's dimension: which dimension of which operand holds the same entries, in order.

Used to compute a part of a value from parts of its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ..operators.along import Along, Sources, broadcast, is_one, tensors_of
from ..operators.spec import SPECS
from ..operators.traits import Trait, has, named
from ..schema import arguments, operator_name
from ..sizes import expression


def sources_of(node: fx.Node, dim: int) -> Sources | None:
    """Return the sources of the entries along ``dim`` of a result; None if the operator mixes them.

    Args:
        node: a call that returns one tensor.
        dim: not negative.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not 0 <= dim < value.dim():
        return None
    name = operator_name(node.target)
    spec = SPECS.get(name)
    rule = _DIMENSION_RULES.get(name) if spec is None else spec.dimensions
    if rule is not None:
        return rule(node, dim)
    return broadcast(node, dim) if has(node, _ENTRYWISE) else None


def carried(node: fx.Node, source: fx.Node, dim: int, place: int | None = None) -> Along | None:
    """Return the result's dimension that an operand's dimension becomes, with the ratio of entries; None if mixed.

    Args:
        node: a call.
        source: an operand.
        dim: of the operand.
        place: dimension of the result, where it is known; a shard of one entry looks like a broadcast dimension.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    for index in range(value.dim()) if place is None else [place]:
        if has(node, Trait.RESHAPE):
            counts = related(source.meta["val"].shape, value.shape, dim, index)
            sources: Sources | None = {source: Along(dim, *counts)} if counts is not None else None
        else:
            sources = sources_of(node, index)
        along = sources.get(source) if sources is not None else None
        if along is not None and along.dim == dim:
            return Along(index, along.divisor, along.factor)
    return None


# an entry of the result depends on the operands' entries at its position
_ENTRYWISE = Trait.POINTWISE | Trait.CAST | Trait.IDENTITY


def related(before: Any, after: Any, source: int, result: int) -> tuple[int, int] | None:
    """Return (size of the source's dimension, size of the result's) if a reshape keeps the order of their entries.

    It does where the sizes before both dimensions have the same product. None otherwise.
    """
    if bool((_product(before[:source]) - _product(after[:result])).expand() != 0):
        return None
    sizes = expression(before[source]), expression(after[result])
    return (int(sizes[0]), int(sizes[1])) if all(size.is_Integer for size in sizes) else None


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _not_dims(*names: str) -> Callable[[fx.Node, int], Sources | None]:
    """Return the rule of operators that mix the dimensions named by an argument and keep all others."""

    def rule(node: fx.Node, dim: int) -> Sources | None:
        args = arguments(node)
        source = next(iter(tensors_of(node)))
        rank = source.meta["val"].dim()
        dims = next((args[n] for n in names if n in args), None)
        if dims is None:
            return None
        mixed = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        if args.get("keepdim") is False and node.meta["val"].dim() != rank:
            remaining = [d for d in range(rank) if d not in mixed]
            return {source: Along(remaining[dim])} if dim < len(remaining) else None
        # all of an index is read
        return (
            None if dim in mixed else {n: Along(dim) if _rank(n) == rank else None for n in tensors_of(node)}
        )

    return rule


def _layer_norm(node: fx.Node, dim: int) -> Sources | None:
    args = arguments(node)
    if dim >= node.meta["val"].dim() - len(args["normalized_shape"]):
        return None
    return {n: Along(dim) if n is args["input"] else None for n in tensors_of(node)}


def _permute(node: fx.Node, dim: int) -> Sources:
    args = arguments(node)
    rank = node.meta["val"].dim()
    return {args["self"]: Along(int(args["dims"][dim]) % rank)}


def _unsqueeze(node: fx.Node, dim: int) -> Sources | None:
    args = arguments(node)
    position = int(args["dim"]) % node.meta["val"].dim()
    return None if dim == position else {args["self"]: Along(dim - (dim > position))}


def _select(node: fx.Node, dim: int) -> Sources:
    args = arguments(node)
    position = int(args["dim"]) % args["self"].meta["val"].dim()
    return {args["self"]: Along(dim + (dim >= position))}


def _linear(node: fx.Node, dim: int) -> Sources:
    args = arguments(node)
    if dim == node.meta["val"].dim() - 1:
        sources: Sources = {args["input"]: None, args["weight"]: Along(0)}
        if args["bias"] is not None:
            sources[args["bias"]] = Along(0)
        return sources
    return {n: Along(dim) if n is args["input"] else None for n in tensors_of(node)}


def _embedding(node: fx.Node, dim: int) -> Sources:
    args = arguments(node)
    if dim == node.meta["val"].dim() - 1:
        return {args["weight"]: Along(1), args["indices"]: None}
    return {args["weight"]: None, args["indices"]: Along(dim)}


def _expand(node: fx.Node, dim: int) -> Sources:
    source = arguments(node)["self"]
    result, value = node.meta["val"], source.meta["val"]
    operand_dim = dim - (result.dim() - value.dim())
    is_whole = operand_dim < 0 or (is_one(value.shape[operand_dim]) and not is_one(result.shape[dim]))
    return {source: None if is_whole else Along(operand_dim)}


def _factory(node: fx.Node, dim: int) -> Sources:
    """Return the sources of a new tensor, which reads no entries of the operand that gives its type."""
    return dict.fromkeys(tensors_of(node))


def _reshape(node: fx.Node, dim: int) -> Sources | None:
    source = arguments(node)["self"]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    # a dimension of size one cannot be sharded
    order = sorted(range(len(before)), key=lambda d: is_one(before[d]))
    for source_dim in order:
        counts = related(before, after, source_dim, dim)
        if counts is not None:
            return {source: Along(source_dim, *counts)}
    return None


def _product(shape: Any) -> sympy.Expr:
    total = sympy.Integer(1)
    for size in shape:
        total = total * expression(size)
    return total


def _products(node: fx.Node, dim: int) -> Sources | None:
    """Return the sources for batched matrix products: batch dimensions, rows of the first, columns of the second."""
    first, second = (n for n in node.args[:2])
    rank = node.meta["val"].dim()
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    if first.meta["val"].dim() != rank or second.meta["val"].dim() != rank:
        return None
    if dim == rank - 2:
        return {first: Along(dim), second: None}
    if dim == rank - 1:
        return {first: None, second: Along(dim)}
    sources = {n: None if is_one(n.meta["val"].shape[dim]) else Along(dim) for n in (first, second)}
    return dict(sources)


def _slice_scatter(node: fx.Node, dim: int) -> Sources | None:
    args = arguments(node)
    if dim == int(args["dim"]) % node.meta["val"].dim():
        return None
    return {args["self"]: Along(dim), args["src"]: Along(dim)}


# general rules first: later entries override earlier ones
_DIMENSION_RULES: dict[str, Callable[[fx.Node, int], Sources | None]] = {
    **dict.fromkeys(named(Trait.RESHAPE), _reshape),
    **dict.fromkeys(named(Trait.ALONG), _not_dims("dim", "dims")),
    **dict.fromkeys(named(Trait.NEW), _factory),
    "aten.permute": _permute,
    "aten.unsqueeze": _unsqueeze,
    "aten.select": _select,
    "aten.embedding": _embedding,
    "aten.expand": _expand,
    "aten.linear": _linear,
    "aten.layer_norm": _layer_norm,
    "aten.matmul": _products,
    "aten.bmm": _products,
    "aten.slice_scatter": _slice_scatter,
}

__all__ = ["Along", "Sources", "carried", "related", "sources_of"]
