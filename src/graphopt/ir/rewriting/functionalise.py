"""Replace in-place writes by functional operators, so that every value has one definition."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..compat import without_guards
from ..errors import CaptureError
from ..infer import infer, same_shape, value_of
from ..schema import arguments, is_mutable, operator_name
from .cleanup import respell_transposes
from .scatter import put_back
from .spelling import DROPOUTS

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


@dataclass
class _Storage:
    """One piece of memory: the node that allocated it, its current value and how often it was written."""

    origin: fx.Node
    value: fx.Node
    version: int = 0
    written: tuple[list[fx.Node], fx.Node] | None = None
    """The views through which it was last written, and the value written."""


@dataclass
class _View:
    """How a value reads a storage: the chain of view nodes from it, and the version it was read at."""

    storage: _Storage
    chain: list[fx.Node]
    version: int


def functionalise(program: Program) -> None:
    """Replace operators that write to their arguments, including writes through views.

    Raises:
        CaptureError: an in-place operator or a view of written memory has no functional form here.
    """
    graph = program.graph
    if not any(n.op == "call_function" and is_mutable(n.target) for n in graph.nodes):
        return
    views: dict[fx.Node, _View] = {}

    def view_of(node: fx.Node) -> _View:
        if node not in views:
            views[node] = _View(_Storage(node, node), [], 0)
        return views[node]

    def current(node: fx.Node) -> fx.Node:
        """Return the node that now has the value of ``node``."""
        view = views.get(node)
        if view is None or view.version == view.storage.version:
            return node
        written = view.storage.written
        if written is not None and written[0] == view.chain:
            return written[1]
        value = view.storage.value
        for step in view.chain:
            value = _again(program, step, value)
        return value

    _split_into_slices(program)
    respell_transposes(program)
    for node in list(graph.nodes):
        if node.op == "placeholder":
            continue
        if node.op == "output" or not is_mutable(node.target):
            # views are tracked by storage, not by the storage's current value
            _track_view(program, node, views, view_of)
            with graph.inserting_before(node):
                node.args = fx.map_arg(node.args, current)
                node.kwargs = fx.map_arg(node.kwargs, current)
            continue
        _write(program, node, view_of, current)
    program.changed()


def _track_view(
    program: Program, node: fx.Node, views: dict[fx.Node, _View], view_of: Callable[[fx.Node], _View]
) -> None:
    if (
        node.op == "call_function"
        and node.args
        and isinstance(node.args[0], fx.Node)
        and _aliases(program, node)
    ):
        base = view_of(node.args[0])
        views[node] = _View(base.storage, [*base.chain, node], base.storage.version)


def _aliases(program: Program, node: fx.Node) -> bool:
    """Tell whether a result shares memory with the first operand; reshapes and casts do only sometimes."""
    source: Any = node.args[0]
    if node.target is operator.getitem:
        return isinstance(source.meta.get("val"), (list, tuple)) and _aliases(program, source)
    name = operator_name(node.target)
    schema = getattr(node.target, "_schema", None)
    if schema is None or name in _NEW_TENSORS:
        return False
    if name not in DROPOUTS and name != "aten.type_as" and not any(r.alias_info for r in schema.returns):
        return False
    # run on the tensors of the trace, which have the model's strides
    args, kwargs = value_of(node.args), value_of(node.kwargs)
    with program.mode, torch.no_grad(), without_guards(program.mode):
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    if not isinstance(first, torch.Tensor) or not isinstance(args[0], torch.Tensor):
        return False
    return bool(first.untyped_storage()._cdata == args[0].untyped_storage()._cdata)


# a constant of the model is a new tensor each time
_NEW_TENSORS = ("aten.lift_fresh", "aten.lift")


def _split_into_slices(program: Program) -> None:
    """Replace the results of a split by slices, whose inverse is known."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target is not operator.getitem:
            continue
        source, index = node.args
        if not isinstance(source, fx.Node):
            continue
        name = operator_name(source.target)
        if name not in ("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.unbind"):
            continue
        base, dim, position = source.args[0], arguments(source)["dim"], int(index)
        with program.graph.inserting_before(node):
            if name == "aten.unbind":
                part = _insert_call(program, aten.select.int, (base, dim, position), {})
            else:
                sizes = [p.shape[dim] for p in source.meta["val"]]
                if not all(isinstance(s, int) for s in sizes):
                    continue
                start = sum(sizes[:position])
                part = _insert_call(
                    program, aten.slice.Tensor, (base, dim, start, start + sizes[position]), {}
                )
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        program.graph.erase_node(node)


def _again(program: Program, step: fx.Node, source: fx.Node) -> fx.Node:
    """Insert a view again, of memory that was written since."""
    args = (source, *step.args[1:])
    new = program.graph.call_function(step.target, args, dict(step.kwargs))  # type: ignore[arg-type]
    new.meta = dict(step.meta)
    return new


def _write(
    program: Program,
    node: fx.Node,
    view_of: Callable[[fx.Node], _View],
    current: Callable[[fx.Node], fx.Node],
) -> None:
    target = node.target
    name = operator_name(target)
    written = node.args[0]
    schema = target._schema  # type: ignore[union-attr]
    writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not isinstance(written, fx.Node) or writes != [schema.arguments[0].name]:
        raise CaptureError(
            f"{name} writes to {', '.join(writes)}, which has no functional form here",
            node=node.name,
            source=program.source_line(node),
        )
    if name == "aten.detach_":
        node.replace_all_uses_with(written)
        program.graph.erase_node(node)
        return
    origin = view_of(written).storage.origin
    if origin.op == "placeholder":
        raise CaptureError(
            f"{name} writes to {'a weight' if origin.name in program.weights else 'an input'} in place",
            node=node.name,
            source=program.source_line(node),
            hint="capture in evaluation mode, or compute on a copy",
        )
    with program.graph.inserting_before(node):
        value = _functional(program, node, current)
        view = view_of(written)
        # the result of a write has the shape and type of what was written
        stored = put_back(program, view.storage.value, view.chain, value)
    view.storage.value = stored
    view.storage.version += 1
    view.storage.written = (view.chain, value)
    for user in list(node.users):
        user.replace_input_with(node, written)
    program.graph.erase_node(node)


def _functional(program: Program, node: fx.Node, current: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Insert the operator that computes what the in-place one writes."""
    target: Any = node.target
    args: Any = fx.map_arg(node.args, current)
    kwargs: Any = fx.map_arg(node.kwargs, current)
    name = target._schema.name.split("::")[1]
    destination = args[0]
    if name == "copy_":
        return _copied(program, destination, args[1])
    if name == "zero_" or (name == "fill_" and not isinstance(args[1], fx.Node)):
        filler = 0 if name == "zero_" else args[1]
        return _insert_call(program, aten.full_like.default, (destination, filler), {})
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None or is_mutable(overload):
        raise CaptureError(
            f"the in-place operator {name} has no functional form",
            node=node.name,
            source=program.source_line(node),
        )
    result = _insert_call(program, overload, args, kwargs)
    dtype = destination.meta["val"].dtype
    if result.meta["val"].dtype != dtype:
        result = _insert_call(program, aten.to.dtype, (result, dtype), {})
    return result


def _copied(program: Program, destination: fx.Node, source: fx.Node) -> fx.Node:
    value, expected = source.meta["val"], destination.meta["val"]
    if value.dtype != expected.dtype:
        source = _insert_call(program, aten.to.dtype, (source, expected.dtype), {})
    if not same_shape(value.shape, expected.shape):
        source = _insert_call(program, aten.expand_as.default, (source, destination), {})
    return source


def _insert_call(program: Program, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    node = program.graph.call_function(target, args, kwargs)
    node.meta["val"] = infer(program.mode, target, args, kwargs)
    return node
