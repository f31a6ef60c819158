"""Undoing what a run of a model assigns, so that tensors without values are not left in the user's model."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_DEPTH = 4
_MOST = 10_000  # entries of one container: longer ones are data, not tables that a model keeps
# what holds nothing that could change; asked first, since a model has tens of thousands of attributes
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Give all modules the attributes that they had, and what these hold its content, when the block ends.

    Tables that a model fills in when it is first called stay empty: in attributes, buffers that it registers, containers
    within containers, and objects of its own.
    """
    modules = [vars(module) for module in model.modules()]
    kept: dict[int, tuple[Any, Any]] = {id(table): (table, table.copy()) for table in modules}
    for table in modules:
        for value in table.values():
            if type(value) not in _PLAIN:
                _keep(value, kept, _DEPTH)
    try:
        yield
    finally:
        for container, content in kept.values():
            _restore(container, content)


def _keep(value: Any, kept: dict[int, tuple[Any, Any]], depth: int) -> None:
    """Copy the entries of a container, or the attributes of an object, and of those within it."""
    if isinstance(value, (dict, list, set)):
        table: Any = value
    elif isinstance(value, (torch.Tensor, nn.Module, type)) or callable(value):
        return
    else:
        table = getattr(value, "__dict__", None)
        if not isinstance(table, (dict, list, set)):
            return
    if id(table) in kept or len(table) > _MOST:
        return
    kept[id(table)] = table, table.copy() if table else ()
    if depth > 1:
        for entry in list(table.values() if isinstance(table, dict) else table):
            if type(entry) not in _PLAIN:
                _keep(entry, kept, depth - 1)


def _restore(container: Any, content: Any) -> None:
    # what did not change keeps its order and costs nothing
    if not content:
        if container:
            container.clear()
        return
    if isinstance(container, dict):
        same = (
            len(container) == len(content)
            and all(map(operator.is_, container, content))
            and all(map(operator.is_, container.values(), content.values()))
        )
    elif isinstance(container, list):
        same = len(container) == len(content) and all(map(operator.is_, container, content))
    else:
        same = set(map(id, container)) == set(map(id, content))
    if not same:
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)
