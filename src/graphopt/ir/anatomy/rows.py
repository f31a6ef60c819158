"""The two shapes of a stream's values: (batch, sequence, size), and flattened to rows, (batch * sequence, size)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


def shaped_like(program: Program, value: fx.Node, like: fx.Node) -> fx.Node:
    """Return a value of a stream in the shape of another; new nodes are inserted at the insertion point.

    Args:
        program: the program of both nodes.
        value: (..., size).
        like: (..., size), of the same rows.
    """
    shape = like.meta["val"].shape
    if len(value.meta["val"].shape) == len(shape):
        return value
    if len(shape) == 2:
        rows: list[int | fx.Node] = [-1]
    else:
        rows = [program.edit.call(aten.sym_size.int, like, dim) for dim in range(len(shape) - 1)]
    return program.edit.call(aten.reshape.default, value, [*rows, int(value.meta["val"].shape[-1])])
