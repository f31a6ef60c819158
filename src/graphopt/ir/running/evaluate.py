"""Evaluation of nodes: which are needed, how long, and their values."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import fx

from ..schema import operator_name


def needed_for(targets: Iterable[fx.Node], known: Container[fx.Node]) -> set[fx.Node]:
    """Return the nodes needed to compute the targets, including the targets."""
    needed: set[fx.Node] = set()
    work = list(targets)
    while work:
        node = work.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in known:
            work.extend(node.all_input_nodes)
    return needed


def last_uses(nodes: Iterable[fx.Node], keep: Iterable[fx.Node] = ()) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the values that are not needed after it."""
    order = list(nodes)
    kept_to_end = set(keep)
    seen: set[fx.Node] = set()
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                if used not in kept_to_end:
                    freed.setdefault(node, []).append(used)
    return freed


def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the result of the node's operator on known values."""
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        error.add_note(f"while running {node.name} = {operator_name(node.target)}")
        raise
