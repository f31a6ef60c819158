"""Borders filled with a value a channel, as blocks pad what a norm has shifted (DBB's BNAndPad)."""

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

_END = 2**63 - 1


def read_border(node: fx.Node, constant: set[fx.Node]) -> tuple[Form, fx.Node] | None:
    """Return the padding that a chain of writes fills, as a form of its input, and what fills it.

    None if the node is no such chain, or the writes do not cover the border and nothing else.
    """
    writes: list[tuple[int, bool, int]] = []
    nodes: list[fx.Node] = []
    values: set[fx.Node] = set()
    place: Any = node
    while is_operator(place, "aten.slice_scatter"):
        found = arguments(place)
        written = _strip(found["src"])
        if written not in constant or found["step"] != 1 or (nodes and len(place.users) != 1):
            return None
        side = _side(place, found)
        if side is None:
            return None
        writes.append((int(found["dim"]) - 2, *side))
        nodes.append(place)
        values.add(written)
        place = found["self"]
    if not nodes or len(values) != 1 or not has(place, Trait.PADDING):
        return None
    pad = read_operator(place, constant)
    filling = values.pop()
    if pad is None or len(place.users) != 1 or pad.mode != "zeros":
        return None
    if not one_a_channel(filling, spatial_axes(node), pad.outputs):
        return None
    wanted = {
        (i, near, size)
        for i, a in enumerate(pad.axes)
        for near, size in ((True, a.low), (False, a.high))
        if size
    }
    if set(writes) != wanted:
        return None
    return replace(pad, value=node, nodes=frozenset([*nodes, place])), filling


def _strip(node: Any) -> Any:
    while is_operator(node, "aten.expand"):
        node = node.args[0]
    return node


def _side(node: fx.Node, found: dict[str, Any]) -> tuple[bool, int] | None:
    """Return (whether at the near end, how many places) of a write along one axis."""
    size = node.meta["val"].shape[found["dim"]]
    start, end = found["start"] or 0, found["end"]
    if not isinstance(start, int) or not (end is None or isinstance(end, int)):
        return None
    end = _END if end is None else end
    if isinstance(size, int):
        start, end = (v + size if v < 0 else min(v, size) for v in (start, end))
        return (True, end) if start == 0 else (False, size - start) if end == size else None
    if start == 0 and 0 < end < _END:
        return True, end
    return (False, -start) if start < 0 and end >= _END else None


def filled(program: Program, border: Form, filling: fx.Node, first: Form) -> Form | str:
    """Return the form of a filled border over what ``first`` reads, if ``first`` gives that value for zeros."""
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
    given = torch.zeros_like(value) if bias is None else bias
    if not torch.allclose(value, given, rtol=1e-4, atol=1e-6 * float(given.abs().max() + 1)):
        return f"the border of {name} is filled with another value than {name} would have there"
    axes = tuple(one_after_another(a, b) for a, b in zip(first.axes, border.axes, strict=True))
    return replace(first, value=border.value, axes=axes, mode="zeros", nodes=first.nodes | border.nodes)
