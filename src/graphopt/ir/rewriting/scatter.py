"""The inverse of views: the new value of a tensor of which a part was written."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import CaptureError
from ..infer import infer, same_value
from ..operators.traits import Trait, named
from ..schema import arguments, operator_name
from .spelling import CASTS, DROPOUTS, NOTHING, VIEWS

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten

_RESHAPES = named(Trait.RESHAPE) | VIEWS
# these return the same values in the same order if the shape is unchanged
_PLAIN = named(Trait.REPEAT) | NOTHING | CASTS | DROPOUTS


def put_back(program: Program, whole: fx.Node, chain: list[fx.Node], value: fx.Node) -> fx.Node:
    """Return the new value of a storage after ``value`` was written through a chain of views.

    Args:
        program: nodes are inserted at its insertion point.
        whole: the storage's value before the write.
        chain: the views from the storage to the written value, outermost first.
        value: what was written.

    Raises:
        CaptureError: a view in the chain has no functional inverse.
    """
    if not chain:
        return value
    sources = [whole]
    for step in chain[:-1]:
        sources.append(_call(program, step.target, (sources[-1], *step.args[1:]), dict(step.kwargs)))
    for step, source in zip(reversed(chain), reversed(sources), strict=True):
        value = _inverse(program, step, source, value)
    return value


def _inverse(program: Program, step: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    name = operator_name(step.target)
    args = arguments(step)
    before = source.meta["val"]
    if name == "aten.slice":
        span: tuple[Any, ...] = (source, value, args["dim"], args["start"], args["end"], args["step"])
        return _call(program, aten.slice_scatter.default, span)
    if name == "aten.narrow":
        end = args["start"] + args["length"] if isinstance(args["length"], int) else None
        if end is None:
            end = _call(program, operator.add, (args["start"], args["length"]))
        return _call(program, aten.slice_scatter.default, (source, value, args["dim"], args["start"], end))
    if name == "aten.select":
        return _call(program, aten.select_scatter.default, (source, value, args["dim"], args["index"]))
    if name == "aten.diagonal":
        span = (source, value, args["offset"], args["dim1"], args["dim2"])
        return _call(program, aten.diagonal_scatter.default, span)
    if name in _RESHAPES and step.target is not aten.view.dtype:
        return _call(program, aten.view_as.default, (value, source))
    if name == "aten.permute":
        order = [int(d) % before.dim() for d in args["dims"]]
        return _call(program, aten.permute.default, (value, [order.index(d) for d in range(len(order))]))
    if name in _PLAIN and same_value(before, step.meta["val"]):
        return value
    raise CaptureError(
        f"a write through a view made by {name} has no functional form here",
        node=step.name,
        source=program.source_line(step),
    )


def _call(
    program: Program, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    node = program.graph.call_function(target, args, kwargs or {})
    node.meta["val"] = infer(program.mode, target, args, kwargs or {})
    return node
