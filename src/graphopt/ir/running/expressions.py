"""Equal expressions: nodes that call the same operators on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


class Expressions:
    """Gives the same number to nodes that compute the same expression.

    Args:
        leaf: returns what a node is told apart by; None if by its operator and operands. By default, inputs and weights
            are told apart by their names.
    """

    def __init__(self, leaf: Callable[[fx.Node], Any] | None = None) -> None:
        self.leaf = leaf or _name
        self.number_of: dict[fx.Node, int] = {}
        self.numbers: dict[Any, int] = {}

    def __call__(self, node: fx.Node) -> int:
        """Return the number of a node's expression; its operands must not change meanwhile."""
        work = [node]
        while work:
            current = work[-1]
            if current in self.number_of:
                work.pop()
                continue
            key: Any = self.leaf(current)
            if key is None:
                waiting = [n for n in current.all_input_nodes if n not in self.number_of]
                if waiting:
                    work.extend(waiting)
                    continue
                arguments = fx.map_arg((current.args, current.kwargs), self._stand_in)
                key = (str(current.target), repr(arguments))
            work.pop()
            self.number_of[current] = self.numbers.setdefault(key, len(self.numbers))
        return self.number_of[node]

    def _stand_in(self, node: fx.Node) -> Any:
        return f"value {self.number_of[node]}"


def _name(node: fx.Node) -> Any:
    return None if node.op == "call_function" else node.name
