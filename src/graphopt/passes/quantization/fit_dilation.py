"""Rewriting dilated depthwise convolutions that a compiler computes wrongly."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.program import Program
from ...ir.schema import arguments, normal_call

aten = torch.ops.aten


def undilated(program: Program, node: fx.Node) -> fx.Node:
    """Return an equal convolution with zeros between the kernel's entries instead of dilation."""
    call, operands = program.edit.call, dict(arguments(node))
    weight, dilation = operands["weight"], list(operands["dilation"])
    for dim, size in enumerate(weight.meta["val"].shape[2:], start=2):
        if dilation[dim - 2] != 2:
            continue
        dilation[dim - 2] = 1
        wide = call(aten.unsqueeze.default, weight, dim + 1)
        apart = call(aten.cat.default, [wide, call(aten.zeros_like.default, wide)], dim + 1)
        shape = list(weight.meta["val"].shape)
        shape[dim] = 2 * int(size)
        joined = call(aten.reshape.default, apart, [int(s) for s in shape])
        weight = call(aten.slice.Tensor, joined, dim, 0, 2 * int(size) - 1)
    operands.update(weight=weight, dilation=dilation)
    args, kwargs = normal_call(node.target, operands)
    return call(node.target, *args, **kwargs)
