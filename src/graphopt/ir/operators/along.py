"""Which dimension of which operand a dimension of a result comes from, for broadcasting operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..sizes import expression


@dataclass(frozen=True)
class Along:
    """An operand's dimension; ``factor / divisor`` of its entries make one entry of the result."""

    dim: int
    factor: int = 1
    divisor: int = 1


Sources = dict[fx.Node, Along | None]
"""Operands and the dimension that holds the entries; None where all of the operand is read."""


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """Return the operands that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def is_one(size: int | torch.SymInt) -> bool:
    """Tell whether a size is 1 for every value of its symbols."""
    return bool(expression(size) == 1) if isinstance(size, torch.SymInt) else size == 1


def broadcast(node: fx.Node, dim: int) -> Sources:
    """Return the sources of a dimension for operators that broadcast their operands and work entry by entry."""
    result = node.meta["val"]
    sources: Sources = {}
    for operand in tensors_of(node):
        value = operand.meta["val"]
        operand_dim = dim - (result.dim() - value.dim())
        whole = operand_dim < 0 or (is_one(value.shape[operand_dim]) and not is_one(result.shape[dim]))
        sources[operand] = None if whole else Along(operand_dim)
    return sources


def last_mixed(node: fx.Node, dim: int) -> Sources | None:
    """Return the sources of a dimension for operators that mix the last dimension and are pointwise in the others."""
    return None if dim == node.meta["val"].dim() - 1 else broadcast(node, dim)
