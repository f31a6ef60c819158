"""Checking that a model does the same without the layers that are left out.

What is no tensor passes layers by unseen: a count of the layers that were called, a list that they append to, a table that
one of them fills in for all. So the shortened model is recorded as well, and what is left must do what it did before.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .kinds import Choice
from .record import CannotStamp, Origin, Record


def exported_lists(choice: Choice) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return the layers that are exported, as (name, layer) by name of their list."""
    lists: dict[str, list[tuple[str, nn.Module]]] = {}
    for number in choice.exported:
        layer = choice.layers[number]
        lists.setdefault(layer.list_name, []).append((layer.name, layer.module))
    return lists


def require_same_run(whole: Record, short: Record, choice: Choice) -> None:
    """Compare what is exported with what was recorded of the whole model.

    Args:
        whole: record of the model.
        short: record of the model without the layers that are left out.
        choice: which those are.

    Raises:
        CannotStamp: a layer, or what lies between layers, does something else without them.
    """
    runs = _Runs(choice)
    if len(short.layers) != len(choice.exported):
        raise CannotStamp("other layers are called where some are left out")
    for number, layer in zip(choice.exported, short.layers, strict=True):
        if not runs.same(whole.layers[number].calls, layer.calls):
            raise CannotStamp(f"{layer.name} does something else where layers are left out")
    if not runs.same(whole.outside, short.outside):
        raise CannotStamp("what lies between layers does something else where layers are left out")
    if not runs.same(whole.results, short.results):
        raise CannotStamp("the model returns other values where layers are left out")


class _Runs:
    def __init__(self, choice: Choice):
        self.choice = choice
        self.stands_for: dict[Origin, Origin] = {}

    def same(self, one: Any, other: Any) -> bool:
        if isinstance(one, (list, tuple)):
            if type(one) is not type(other) or len(one) != len(other):
                return False
            if one[:1] == ("from",):
                return other[:1] == ("from",) and one[2:] == other[2:] and self.origin(one[1], other[1])
            return all(self.same(a, b) for a, b in zip(one, other, strict=True))
        return bool(one == other)

    def origin(self, one: Origin, other: Origin) -> bool:
        """Return whether a value of the shortened run stands for one of the whole run."""
        if other[0] >= 0:
            other = (self.choice.exported[other[0]], *other[1:])
        if one[0] not in self.choice.templates:
            return one == other
        # what passes through a layer that was left out comes from the last one that was not
        before = max(number for number in self.choice.exported if number < one[0])
        return other[0] == before and self.stands_for.setdefault(one, other) == other
