"""Undoing what a run of a model assigns, so that tensors without values are not left in the user's model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_DEPTH = 4
_MOST = 10_000  # entries of one container: longer ones are data, not tables that a model keeps


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Give all modules the attributes that they had, and what these hold its content, when the block ends.

    Tables that a model fills in when it is first called stay empty: in attributes, buffers that it registers, containers
    within containers, and objects of its own.
    """
    modules = [(module, dict(vars(module))) for module in model.modules()]
    kept: dict[int, tuple[Any, Any]] = {}
    for _, values in modules:
        for value in values.values():
            _keep(value, kept, _DEPTH)
    try:
        yield
    finally:
        for module, values in modules:
            _restore(vars(module), values)
        for container, content in kept.values():
            _restore(container, content)


def _keep(value: Any, kept: dict[int, tuple[Any, Any]], depth: int) -> None:
    """Copy the entries of a container, or the attributes of an object, and of those within it."""
    if isinstance(value, (torch.Tensor, nn.Module, type)) or callable(value):
        return
    table = value if isinstance(value, (dict, list, set)) else getattr(value, "__dict__", None)
    if not isinstance(table, (dict, list, set)) or id(table) in kept or len(table) > _MOST:
        return
    kept[id(table)] = table, table.copy()
    if depth > 1:
        for entry in list(table.values() if isinstance(table, dict) else table):
            _keep(entry, kept, depth - 1)


def _restore(container: Any, content: Any) -> None:
    # what did not change keeps its order and costs nothing
    if isinstance(container, dict):
        same = len(container) == len(content) and all(
            a is c and b is d for (a, b), (c, d) in zip(container.items(), content.items(), strict=True)
        )
    elif isinstance(container, list):
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    else:
        same = {id(v) for v in container} == {id(v) for v in content}
    if not same:
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)
