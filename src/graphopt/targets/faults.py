"""Calls that a device computes wrongly, where the table of operators cannot tell them from correct ones."""

from __future__ import annotations

from torch import fx

from ..ir.schema import arguments, is_operator

LONG = 9
"""Kernel size from which qnn-htp-v75 silently computes wrong depthwise convolutions of dilation 2 in float16."""


def misread(node: fx.Node) -> bool:
    """Tell whether a node is a depthwise convolution with a dilation of 2 and a kernel of at least ``LONG``."""
    if not is_operator(node, "aten.conv1d", "aten.conv2d"):
        return False
    args = arguments(node)
    weight = args["weight"].meta["val"]
    depthwise = args["groups"] > 1 and int(weight.shape[1]) == 1
    return depthwise and any(
        dilation == 2 and int(size) >= LONG
        for dilation, size in zip(args["dilation"], weight.shape[2:], strict=True)
    )
