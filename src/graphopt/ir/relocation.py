"""Transfer of analysis results from a graph to the nodes of the same names in a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

from torch import fx


def relocated(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Return a value in which every node is replaced by the one of the same name; containers and dataclasses are copied.

    Objects that occur several times are copied once. Anything else (numbers, names, tensors, objects of other classes)
    is shared.

    Args:
        value: nodes in lists, tuples, sets, dictionaries and dataclasses, nested to any depth.
        nodes: of the graph that the result refers to, by name.

    Raises:
        KeyError: there is no node of that name.
        TypeError: the value contains a closure, which may hold nodes.
    """
    return _Relocation(nodes).of(value)


class _Relocation:
    def __init__(self, nodes: Mapping[str, fx.Node]):
        self.nodes = nodes
        # the originals are kept with their copies, so that their ids are not reused
        self.copies: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.nodes[value.name]
        if isinstance(value, FunctionType) and value.__closure__:
            raise TypeError(f"{value.__qualname__} may hold nodes of the graph that it was made for")
        if not isinstance(value, (list, tuple, set, frozenset, dict)) and (
            isinstance(value, type) or not is_dataclass(value)
        ):
            return value
        if id(value) not in self.copies:
            self.copies[id(value)] = value, self._copied(value)
        return self.copies[id(value)][1]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.of(key): self.of(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.of, value))
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(map(self.of, value))
        copied = copy.copy(value)
        for name, part in vars(value).items():
            # through the base, since some are frozen
            object.__setattr__(copied, name, self.of(part))
        return copied


__all__ = ["relocated"]
