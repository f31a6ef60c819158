"""What a device computes wrongly in some forms of an operator, which a table of operators does not tell apart."""

from __future__ import annotations

from torch import fx

from ..ir.schema import arguments, is_operator

LONG = 9
"""Entries of a kernel from which on qnn-htp-v75 gets depthwise convolutions of dilation 2 wrong in float16, silently."""


def misread(node: fx.Node) -> bool:
    """Tell whether a node is such a convolution, with a dilation of 2 and a long kernel."""
    if not is_operator(node, "aten.conv1d", "aten.conv2d"):
        return False
    args = arguments(node)
    weight = args["weight"].meta["val"]
    depthwise = args["groups"] > 1 and int(weight.shape[1]) == 1
    return depthwise and any(
        dilation == 2 and int(size) >= LONG
        for dilation, size in zip(args["dilation"], weight.shape[2:], strict=True)
    )
