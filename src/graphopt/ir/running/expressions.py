"""Equal expressions: nodes that call the same operators on the same weights."""

from __future__ import annotations

from typing import Any

from torch import fx


class Expressions:
    """Gives the same number to nodes that compute the same expression."""

    def __init__(self) -> None:
        self.number_of: dict[fx.Node, int] = {}
        self.numbers: dict[Any, int] = {}

    def __call__(self, node: fx.Node) -> int:
        """Return the number of a node's expression; its operands must not change meanwhile."""
        work = [node]
        while work:
            current = work[-1]
            waiting = [n for n in current.all_input_nodes if n not in self.number_of]
            if waiting and current not in self.number_of:
                work.extend(waiting)
                continue
            work.pop()
            if current not in self.number_of:
                key: Any = current.name
                if current.op == "call_function":
                    key = (
                        str(current.target),
                        repr(fx.map_arg((current.args, current.kwargs), self._stand_in)),
                    )
                self.number_of[current] = self.numbers.setdefault(key, len(self.numbers))
        return self.number_of[node]

    def _stand_in(self, node: fx.Node) -> Any:
        return f"value {self.number_of[node]}"
