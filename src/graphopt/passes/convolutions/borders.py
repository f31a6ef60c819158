"""Borders filled with one value per channel, as blocks pad the output of a norm (DBB's BNAndPad)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from .forms import Form
from .geometry import Axis, one_after_another
from .reading import one_a_channel, read_operator, spatial_axes
from .writing import OnTensors

_MAX_END = 2**63 - 1


def read_border(node: fx.Node, constant: set[fx.Node]) -> tuple[Form, fx.Node] | None:
    """Return the padding that a chain of writes fills, as an affine form of its input, and the filling value.

    None if the node is no such chain, or the writes do not cover exactly the border.
    """
    writes: list[tuple[int, bool, int]] = []
    nodes: list[fx.Node] = []
    values: set[fx.Node] = set()
    current: Any = node
    while is_operator(current, "aten.slice_scatter"):
        args = arguments(current)
        written_value = _before_expand(args["src"])
        if written_value not in constant or args["step"] != 1 or (nodes and len(current.users) != 1):
            return None
        side = _written_side(current, args)
        if side is None:
            return None
        writes.append((int(args["dim"]) - 2, *side))
        nodes.append(current)
        values.add(written_value)
        current = args["self"]
    if not nodes or len(values) != 1 or not has(current, Trait.PADDING):
        return None
    pad = read_operator(current, constant)
    filling = values.pop()
    if pad is None or len(current.users) != 1 or pad.mode != "zeros":
        return None
    if not one_a_channel(filling, spatial_axes(node), pad.outputs):
        return None
    border_sides = {
        (i, near, size)
        for i, a in enumerate(pad.axes)
        for near, size in ((True, a.low), (False, a.high))
        if size
    }
    if set(writes) != border_sides:
        return None
    return replace(pad, value=node, nodes=frozenset([*nodes, current])), filling


def _before_expand(node: Any) -> Any:
    while is_operator(node, "aten.expand"):
        node = node.args[0]
    return node


def _written_side(node: fx.Node, args: dict[str, Any]) -> tuple[bool, int] | None:
    """Return (whether at the near end, number of positions) of a write along one axis; None if it is at neither end."""
    size = node.meta["val"].shape[args["dim"]]
    start, end = args["start"] or 0, args["end"]
    if not isinstance(start, int) or not (end is None or isinstance(end, int)):
        return None
    end = _MAX_END if end is None else end
    if isinstance(size, int):
        start, end = (v + size if v < 0 else min(v, size) for v in (start, end))
        return (True, end) if start == 0 else (False, size - start) if end == size else None
    if start == 0 and 0 < end < _MAX_END:
        return True, end
    return (False, -start) if start < 0 and end >= _MAX_END else None


def filled(program: Program, border: Form, filling: fx.Node, first: Form) -> Form | str:
    """Return the affine form of a filled border over the source of ``first``, if ``first`` maps zeros to that value."""
    name = border.source.name
    if (
        any(a.count > 1 for a in first.axes)
        or first.mode not in ("", "zeros")
        or any(a != Axis() for a in first.axes)
    ):
        return f"the border of {name} is filled, but {name} is not pointwise"
    reader = OnTensors(program)
    bias = first.build(reader)[1]
    value = reader(filling).reshape(-1).expand(first.outputs)
    border_value = torch.zeros_like(value) if bias is None else bias
    if not torch.allclose(value, border_value, rtol=1e-4, atol=1e-6 * float(border_value.abs().max() + 1)):
        return f"the border of {name} is filled with another value than {name} would have there"
    axes = tuple(one_after_another(a, b) for a, b in zip(first.axes, border.axes, strict=True))
    return replace(first, value=border.value, axes=axes, mode="zeros", nodes=first.nodes | border.nodes)
