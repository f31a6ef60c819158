"""Constraints between sizes, as text: ``sequence % 8 == 0``, ``keys <= sequence``.

An export decides conditions on sizes by its example; each decision is a relation that other sizes must satisfy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from .errors import CheckpointError
from .sizes import format_size, parse_size

Value = int | torch.Tensor

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}
_KINDS: dict[type, str] = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.Le: "<=",
    sympy.Ge: ">=",
    sympy.Lt: "<",
    sympy.Gt: ">",
}


Comparison = tuple[sympy.Expr, str, sympy.Expr]


@dataclass(frozen=True)
class Relation:
    """Comparisons of named sizes; it holds if all comparisons of one of ``cases`` hold."""

    text: str
    cases: tuple[tuple[Comparison, ...], ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of the sizes in it."""
        expressions = [value for case in self.cases for left, _, right in case for value in (left, right)]
        return frozenset(str(s) for value in expressions for s in value.free_symbols)

    def holds(self, sizes: Mapping[str, Value]) -> Any:
        """Tell whether sizes satisfy it; for tensors of sizes (float64), for each entry."""
        any_case: Any = False
        for case in self.cases:
            all_hold: Any = True
            for comparison in case:
                all_hold = all_hold & _holds(comparison, sizes)
            any_case = any_case | all_hold
        return any_case

    def written(self, change: Callable[[sympy.Expr], sympy.Expr]) -> str:
        """Return its text with ``change`` applied to every expression."""
        return " or ".join(
            " and ".join(
                f"{format_size(change(left), {})} {operator} {format_size(change(right), {})}"
                for left, operator, right in case
            )
            for case in self.cases
        )


def _holds(comparison: Comparison, sizes: Mapping[str, Value]) -> Any:
    left, operator, right = comparison
    try:
        first, second = _evaluate(left, sizes), _evaluate(right, sizes)
    except ZeroDivisionError:
        return False
    answer = _COMPARE[operator](first, second)
    if isinstance(answer, torch.Tensor):
        # a division by zero is NaN or infinite
        answer = answer & torch.as_tensor(first + second).isfinite()
    return answer


_LONGEST = 8000


def _evaluate(value: Any, sizes: Mapping[str, Value]) -> Any:
    if value.is_Integer:
        return int(value)
    if value.is_Symbol:
        return sizes[str(value)]
    parts = [_evaluate(part, sizes) for part in value.args]
    kind = type(value).__name__
    total = parts[0]
    for part in parts[1:]:
        total = _OPERATORS[kind](total, part)
    return total


def _divided(left: Any, right: Any) -> Any:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return torch.floor(torch.as_tensor(left, dtype=torch.float64) / right)
    return left // right


def _remainder(left: Any, right: Any) -> Any:
    return left - right * _divided(left, right)


def _extreme(of_tensors: Callable[[Any, Any], Any], of_numbers: Callable[[Any, Any], Any]) -> Any:
    def extreme(left: Any, right: Any) -> Any:
        if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
            both = (torch.as_tensor(v, dtype=torch.float64) for v in (left, right))
            return of_tensors(*both)
        return of_numbers(left, right)

    return extreme


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Pow": lambda a, b: a**b,
    "FloorDiv": _divided,
    "CleanDiv": _divided,
    "Mod": _remainder,
    "PythonMod": _remainder,
    "Max": _extreme(torch.maximum, max),
    "Min": _extreme(torch.minimum, min),
}


def format_relations(guard: Any, names: Mapping[sympy.Symbol, str]) -> list[str]:
    """Return a relation as texts that :func:`parse_relation` reads; empty if it always holds.

    Raises:
        CheckpointError: it cannot be written in the grammar of sizes.
    """
    if guard in (True, sympy.true):
        return []
    if isinstance(guard, sympy.And):
        return [text for part in guard.args for text in format_relations(part, names)]
    cases = guard.args if isinstance(guard, sympy.Or) else (guard,)
    parts = [case.args if isinstance(case, sympy.And) else (case,) for case in cases]
    text = " or ".join(" and ".join(_comparison(c, names) for c in case) for case in parts)
    parse_relation(text, frozenset(names.values()))
    return [text]


def _comparison(value: Any, names: Mapping[sympy.Symbol, str]) -> str:
    if isinstance(value, sympy.Not) and type(value.args[0]) in _KINDS:
        value = value.args[0].negated
    kind = _KINDS.get(type(value))
    if kind is None:
        raise CheckpointError(f"{value} has no text")
    left, right = (format_size(side, names) for side in value.args)
    return f"{left} {kind} {right}"


@lru_cache(maxsize=4096)
def parse_relation(text: str, names: frozenset[str], where: str = "") -> Relation:
    """Read a relation between sizes; nothing is evaluated as code.

    Args:
        text: expressions of sizes compared by ``== != <= >= < >``, joined by ``and`` and then by ``or``.
        names: of the sizes there are.
        where: for messages.

    Raises:
        CheckpointError: it is not in the grammar, names an unknown size, or is too long.
    """
    if len(text) > _LONGEST:
        raise CheckpointError(f"{where}: {text[:60]!r}... is too long for a relation between sizes")
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    cases = tuple(
        tuple(_parsed(part, symbols, where) for part in case.split(" and ")) for case in text.split(" or ")
    )
    return Relation(text, cases)


def _parsed(text: str, symbols: Mapping[str, sympy.Symbol], where: str) -> Comparison:
    for operator in _COMPARE:
        left, separator, right = text.partition(operator)
        if separator:
            return (
                parse_size(left.strip(), symbols, where),
                operator,
                parse_size(right.strip(), symbols, where),
            )
    raise CheckpointError(f"{where}: {text[:60]!r} is not a relation between sizes")


def constraints_among(
    constraints: tuple[str, ...], names: frozenset[str], kept: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the constraints that refer only to remaining sizes.

    Args:
        constraints: as texts.
        names: of all sizes they may refer to.
        kept: the remaining sizes.
    """
    return tuple(text for text in constraints if parse_relation(text, names).names <= set(kept))


def constraints_with(
    constraints: tuple[str, ...], names: frozenset[str], sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """Return the constraints with some sizes replaced by numbers, which satisfy them."""
    remaining = []
    for text in constraints:
        relation = parse_relation(text, names)
        if relation.names <= set(sizes):
            continue
        values = {sympy.Symbol(n, integer=True, positive=True): v for n, v in sizes.items()}
        remaining.append(relation.written(lambda e: e.subs(values)) if relation.names & set(sizes) else text)  # noqa: B023
    return tuple(remaining)


def rename_in(text: str, names: frozenset[str], old: str, new: str) -> str | None:
    """Return a constraint with one size replaced by another, or None if it then always holds."""
    relation = parse_relation(text, names)
    if old not in relation.names:
        return text
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in (old, new)}
    substitution = {symbols[old]: symbols[new]}
    changed = relation.written(lambda e: e.xreplace(substitution))
    trivial = all(
        left.xreplace(substitution) == right.xreplace(substitution) and operator in ("==", "<=", ">=")
        for case in relation.cases[:1]
        for left, operator, right in case
    )
    return None if trivial else changed
