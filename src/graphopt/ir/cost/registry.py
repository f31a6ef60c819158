"""Cost formulas by operator name."""

from __future__ import annotations

from collections.abc import Callable

from ..operators.spec import SPECS
from ..operators.work import Call, Work

Formula = Callable[[Call], Work]

FORMULAS: dict[str, Formula] = {}
"""Formulas of ATen's operators by name; sizes may be numbers or expressions, so a formula only does arithmetic."""


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Register the decorated function as the formula of the operators named."""

    def register(function: Formula) -> Formula:
        for name in names:
            FORMULAS[name] = function
        return function

    return register


def formula_of(name: str) -> Formula | None:
    """Return the formula of an operator of torch or of graphopt; None if it has none."""
    spec = SPECS.get(name)
    return FORMULAS.get(name) if spec is None else spec.work
