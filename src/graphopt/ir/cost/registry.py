"""Cost formulas by operator name."""

from __future__ import annotations

from collections.abc import Callable

from .operands import Call, Work

Formula = Callable[[Call], Work]

FORMULAS: dict[str, Formula] = {}
"""Operator name to formula; its sizes may be numbers or expressions, so a formula only does arithmetic."""


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Register the decorated function as the formula of the operators named."""

    def register(function: Formula) -> Formula:
        for name in names:
            FORMULAS[name] = function
        return function

    return register
