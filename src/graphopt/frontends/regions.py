"""Inlining of regions of a captured graph that have no effect in a program."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..ir.errors import CaptureError

_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


def inline_regions(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Inline regions with gradients switched on or off, and with autocast switched off.

    Neither matters in a program: it is captured without gradients, and all casts are explicit.

    Args:
        graph: edited in place.
        module: contains the regions' graphs.

    Raises:
        CaptureError: a nested graph is control flow, or a region under autocast.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_region(node):
            continue
        with graph.inserting_before(node):
            results = _inlined(graph, node, module, {a: a for a in node.all_input_nodes})
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise CaptureError("the results of a region are used as a whole", node=node.name)
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and isinstance(_attribute(module, node), fx.GraphModule):
            if node.users:
                raise CaptureError(
                    "the captured graph has nested graphs (control flow)",
                    node=next(iter(node.users)).name,
                    hint="capture without torch.cond and loops that torch keeps, or remove the control flow",
                )
            graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in (_GRADIENTS, _AUTOCAST)


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for attribute in str(node.target).split("."):
        value = getattr(value, attribute, None)
    return value


def _inlined(graph: fx.Graph, region: fx.Node, module: fx.GraphModule, outer: dict[Any, Any]) -> list[Any]:
    """Copy the calls of a region to the graph's insertion point and return its results."""
    first = 1
    if getattr(region.target, "__name__", "") == _AUTOCAST:
        first = 4
        device, dtype, enabled = region.args[:3]
        if enabled:
            raise CaptureError(
                f"a part of the model runs under autocast ({device}, {dtype})",
                node=region.name,
                hint="convert the model to that type, as by model.to(torch.bfloat16), and capture it without autocast",
            )
    inner = _attribute(module, region.args[first])  # type: ignore[arg-type]
    operands = [outer[a] if isinstance(a, fx.Node) else a for a in region.args[first + 1 :]]
    placeholders = inner.graph.find_nodes(op="placeholder")
    values: dict[Any, Any] = dict(zip(placeholders, operands, strict=True))
    several: dict[fx.Node, list[Any]] = {}
    for node in inner.graph.nodes:
        if node.op == "output":
            return [values[v] if isinstance(v, fx.Node) else v for v in node.args[0]]
        if node.op == "placeholder" or (
            node.op == "get_attr" and isinstance(_attribute(inner, node), fx.GraphModule)
        ):
            continue
        if node.op == "call_function" and _is_region(node):
            several[node] = _inlined(graph, node, inner, values)
        elif node.op == "call_function" and node.args and node.args[0] in several:
            values[node] = several[node.args[0]][node.args[1]]
        elif node.op == "call_function" and all(a in values for a in node.all_input_nodes):
            values[node] = graph.node_copy(node, values.__getitem__)
        else:
            raise CaptureError("a region of the model contains control flow", node=node.name)
    return []
