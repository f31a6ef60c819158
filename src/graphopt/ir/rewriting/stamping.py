"""Insertion of recorded functions into a program as nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ..editor import RECORDING, Editor
from ..errors import GraphoptError
from .tracing import Trace, trace, weight_of


def stamp(editor: Editor, traced: Trace, arguments: tuple[Any, ...]) -> Any:
    """Insert a recorded function, called on arguments of the shapes and types that it was recorded on.

    Returns:
        One node, or a list of them where the function returned several.
    """
    graph, piece = editor.graph, traced.piece
    nodes = list(_nodes_in(arguments))
    tensors = [n for n in nodes if isinstance(n.meta["val"], torch.Tensor)]
    mapping: dict[fx.Node, Any] = dict(zip(piece.operands, tensors, strict=True))
    before = len(editor.touched)
    try:
        _enter(editor, traced, mapping, nodes)
        for node in piece.graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = (
                fx.map_arg(argument, mapping.__getitem__) for argument in (node.args, node.kwargs)
            )
            inserted = graph.call_function(node.target, args, kwargs)
            inserted.meta["val"] = node.meta["val"]
            editor.adopt(inserted)
            mapping[node] = inserted
    except GraphoptError:
        for inserted in reversed(list(editor.touched)[before:]):
            editor.erase_dead([inserted])
        raise
    results = [mapping[node] for node in traced.results]
    return results if traced.several else results[0]


def emit(editor: Editor, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Insert the nodes of a function of tensors; see :meth:`~graphopt.ir.editor.Editor.emit`."""
    return stamp(editor, trace(editor.program, function, arguments), arguments)


def stand_in(
    editor: Editor, old: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> fx.Node:
    """Insert ``function(*arguments)`` as a possible replacement of ``old``, and return its node.

    Raises:
        UsageError: the function cannot be recorded, or returns several values.
        VerificationError: it returns another shape or type.
    """
    traced = trace(editor.program, function, arguments)
    traced.require(editor.program, [old], "and one value is replaced")
    result = stamp(editor, traced, arguments)
    node: fx.Node = result[0] if traced.several else result
    return node


def _enter(editor: Editor, traced: Trace, mapping: dict[fx.Node, Any], nodes: list[fx.Node]) -> None:
    """Map the placeholders of a recorded graph, except operands, to nodes of the program, adding what is missing."""
    program, piece = editor.program, traced.piece
    sizes = {
        n.meta["val"].node.expr: n for n in nodes if isinstance(n.meta["val"], (torch.SymInt, torch.SymFloat))
    }
    for value, node in piece.sizes.items():
        if node.users:
            mapping[node] = sizes.get(value) or program.size_nodes(node.meta["val"])
    returned = set(traced.results)
    for node, tensor in piece.constants.values():
        if node._erased or not (node.users or node in returned):
            continue
        if node not in traced.placed:
            traced.placed[node] = weight_of(program, tensor) or _new_weight(editor, tensor)
        mapping[node] = traced.placed[node]


def _new_weight(editor: Editor, tensor: torch.Tensor) -> fx.Node:
    kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "constant"
    used_names = {name for weight in editor.program.weights.values() for name in (weight.name, *weight.names)}
    number = next(i for i in range(len(used_names) + 1) if f"{kind}_{i}" not in used_names)
    return editor.add_weight(f"{kind}_{number}", tensor.detach(), kind=kind)


def _nodes_in(argument: Any) -> Iterator[fx.Node]:
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _nodes_in(item)


RECORDING.update(emit=emit, stand_in=stand_in)
