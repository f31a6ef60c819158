"""Helpers for matrices of convolutions and linears that are scaled, reshaped and applied again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Program

aten = torch.ops.aten


def _shaped(program: Program, vector: fx.Node, shape: list[int]) -> fx.Node:
    return program.edit.call(aten.reshape.default, vector, shape)


def per_group(program: Program, vector: fx.Node, shape: list[int], groups: int) -> fx.Node:
    """Reshape per-channel values to the second dimension of a matrix, whose groups of rows have channels of their own."""
    trailing = [1] * (len(shape) - 2)
    if groups == 1:
        return _shaped(program, vector, [1, shape[1], *trailing])
    grouped = _shaped(program, vector, [groups, 1, shape[1]])
    spread = program.edit.call(aten.expand.default, grouped, [groups, shape[0] // groups, shape[1]])
    return _shaped(program, spread, [shape[0], shape[1], *trailing])


def repeated(program: Program, node: fx.Node, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Repeat a convolution or linear with another input, matrix and bias, in the dtype of the original matrix."""
    old_weight: Any = node.args[1]
    weight, bias = (None if t is None else as_type_of(program, t, old_weight) for t in (weight, bias))  # type: ignore[assignment]
    return program.edit.call(node.target, x, weight, bias, *node.args[3:], **node.kwargs)


def as_type_of(program: Program, tensor: fx.Node, like: fx.Node) -> fx.Node:
    """Return a tensor in the dtype of another; folding rounds it once."""
    if tensor.meta["val"].dtype == like.meta["val"].dtype:
        return tensor
    return program.edit.call(aten.to.dtype, tensor, like.meta["val"].dtype)
