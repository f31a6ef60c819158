"""Equal expressions: nodes that call the same operators on the same weights."""

from __future__ import annotations

from typing import Any

from torch import fx


class Expressions:
    """Gives nodes that compute the same of the same one number."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, int] = {}
        self.numbers: dict[Any, int] = {}

    def __call__(self, node: fx.Node) -> int:
        """Return the number of what a node computes; its operands are not to change meanwhile."""
        work = [node]
        while work:
            current = work[-1]
            waiting = [n for n in current.all_input_nodes if n not in self.known]
            if waiting and current not in self.known:
                work.extend(waiting)
                continue
            work.pop()
            if current not in self.known:
                key: Any = current.name
                if current.op == "call_function":
                    key = (
                        str(current.target),
                        repr(fx.map_arg((current.args, current.kwargs), self._stand_in)),
                    )
                self.known[current] = self.numbers.setdefault(key, len(self.numbers))
        return self.known[node]

    def _stand_in(self, node: fx.Node) -> Any:
        return f"value {self.known[node]}"
