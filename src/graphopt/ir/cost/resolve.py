"""Sizes of a program as numbers: as given, or as at capture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import sympy

from ..compat import symbol_range
from ..errors import UsageError
from ..operators.work import Size
from .names import nearest
from .survey import survey

if TYPE_CHECKING:
    from ..program import Program


class Numbers:
    """Turns sizes into numbers; each expression is evaluated once.

    Attributes:
        sizes: every named size and its value.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int] | None = None):
        names = symbol_names(program)
        self.sizes = {name: _hint(program, symbol) for symbol, name in names.items()}
        for name, value in (sizes or {}).items():
            self.sizes[name] = _checked(program, name, value, self.sizes)
        self._values = {symbol: sympy.Integer(self.sizes[name]) for symbol, name in names.items()}
        self._numbers: dict[sympy.Expr, int] = {}

    def __call__(self, size: Size) -> int:
        """Return a size as a number."""
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            self._numbers[size] = int(size.xreplace(self._values))
        return self._numbers[size]


def symbol_names(program: Program) -> dict[sympy.Symbol, str]:
    """Return the name of every symbol in the program's sizes.

    A size that depends on values, such as the number of elements that a mask selects, is named by its symbol.
    """
    names = dict(program.symbols)
    for symbol in sorted(survey(program).symbols() - set(names), key=str):
        names[symbol] = str(symbol)
    return names


def _hint(program: Program, symbol: sympy.Symbol) -> int:
    name = program.symbols.get(symbol)
    if name is not None and name in program.signature.sizes:
        return program.signature.sizes[name].hint
    try:
        return symbol_range(program.mode, symbol)[2]
    except KeyError:
        return 1


def _checked(program: Program, name: str, value: int, named_sizes: Mapping[str, int]) -> int:
    if name not in named_sizes:
        raise UsageError(f"the program has no size named {name!r}", hint=nearest(name, named_sizes))
    limits = program.signature.sizes.get(name)
    high = None if limits is None else limits.high
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"the size {name} is a positive integer, not {value!r}")
    if high is not None and value > high:
        raise UsageError(f"{name} is {value}, but the program takes up to {high}")
    return value
