"""Formatting and parsing of sizes: ``batch``, ``2*sequence + 1``; nothing is ever evaluated as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from .errors import CheckpointError, VerificationError

if TYPE_CHECKING:
    from .program import Program


class SizeTextError(CheckpointError):
    """A size that the grammar of sizes cannot express, such as one computed through fractions."""


_TOKEN = re.compile(r"\s*(?:(\d{1,18})|([^\W\d]\w{0,199})|(//|[-+*%(),]))")
_FUNCTIONS = {"max": 2, "min": 2}
# functions that compute a size, or a number from sizes, by the name of the expression's class
COMBINE: dict[str, Any] = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod, "Max": torch.sym_max, "Min": torch.sym_min,
    "ToFloat": torch.sym_float, "FloatPow": operator.pow, "PowByNatural": operator.pow,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
}  # fmt: skip
_LENGTH, _DEPTH, _DIVISIONS = 2000, 40, 60


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as a sympy expression."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def format_size(size: int | torch.SymInt | sympy.Expr, names: Mapping[sympy.Symbol, str]) -> int | str:
    """Return a size as an integer or as text in the grammar that :func:`parse_size` reads."""
    value = size if isinstance(size, sympy.Basic) else expression(size)
    if value.is_Integer:
        return int(value)
    return _print(value, names)


def _print(value: Any, names: Mapping[sympy.Symbol, str]) -> str:
    if value.is_Integer:
        return str(int(value))
    if value.is_Symbol:
        return names.get(value, str(value))
    parts = [_print(part, names) for part in value.args]
    kind = type(value).__name__
    if isinstance(value, sympy.Add):
        return "(" + " + ".join(parts) + ")"
    if isinstance(value, sympy.Mul):
        return "(" + "*".join(parts) + ")"
    if isinstance(value, sympy.Pow) and value.exp.is_Integer and 0 < int(value.exp) <= 8:
        return "(" + "*".join([parts[0]] * int(value.exp)) + ")"
    if kind in ("FloorDiv", "CleanDiv"):
        return f"({parts[0]} // {parts[1]})"
    if kind in ("Mod", "PythonMod"):
        return f"({parts[0]} % {parts[1]})"
    if kind in ("Max", "Min"):
        text = parts[0]
        for part in parts[1:]:
            text = f"{kind.lower()}({text}, {part})"
        return text
    raise SizeTextError(f"the size {value} cannot be written as text; the grammar has + - * // % max min")


class _Parser:
    def __init__(self, text: str, symbols: Mapping[str, sympy.Symbol]):
        if len(text) > _LENGTH:
            raise ValueError("too long")
        self.tokens: list[str] = []
        position = 0
        stripped = text.rstrip(" ")
        while position < len(stripped):
            match = _TOKEN.match(stripped, position)
            if match is None:
                raise ValueError(f"unexpected {stripped[position]!r}")
            self.tokens.append(match.group().strip())
            position = match.end()
        # the time to simplify nested divisions grows fast with their number
        if sum(token in ("//", "%") for token in self.tokens) > _DIVISIONS:
            raise ValueError("too many divisions")
        self.symbols = symbols
        self.next = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.next] if self.next < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise ValueError(f"expected {expected or 'a value'}, found {token or 'the end'!r}")
        self.next += 1
        return token

    def sum(self) -> sympy.Expr:
        self.depth += 1
        if self.depth > _DEPTH:
            raise ValueError("nested too deeply")
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        self.depth -= 1
        return value

    def product(self) -> sympy.Expr:
        from torch.utils._sympy.functions import FloorDiv, Mod

        value = self.factor()
        while self.peek() in ("*", "//", "%"):
            operator = self.take()
            other = self.factor()
            if operator != "*" and other == 0:
                raise ValueError("division by zero")
            value = (
                value * other if operator == "*" else (FloorDiv if operator == "//" else Mod)(value, other)
            )
        return value

    def factor(self) -> sympy.Expr:
        token = self.take()
        if token == "-":
            # not left to the interpreter's limit, which libraries raise
            self.depth += 1
            if self.depth > _DEPTH:
                raise ValueError("nested too deeply")
            value = -self.factor()
            self.depth -= 1
            return value
        if token == "(":
            value = self.sum()
            self.take(")")
            return value
        if token.isdigit():
            return sympy.Integer(int(token))
        if token in _FUNCTIONS and self.peek() == "(":
            self.take("(")
            first = self.sum()
            self.take(",")
            second = self.sum()
            self.take(")")
            from torch.utils._sympy.functions import Max, Min

            return (Max if token == "max" else Min)(first, second)
        if token in self.symbols:
            return self.symbols[token]
        raise ValueError(f"unknown size {token!r}")


def parse_size(size: object, symbols: Mapping[str, sympy.Symbol], where: str = "") -> sympy.Expr:
    """Read a size written by :func:`format_size`.

    Raises:
        CheckpointError: the text is not in the grammar, names an unknown symbol, or is too long or too deeply nested.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise CheckpointError(f"{where}: a size must be an integer or text, not {type(size).__name__}")
    if isinstance(size, int):
        return sympy.Integer(size)
    parser = None
    try:
        parser = _Parser(size, symbols)
        value = parser.sum()
        if parser.next != len(parser.tokens):
            raise ValueError(f"unexpected {parser.peek()!r}")
    except (ValueError, RecursionError, ArithmeticError, AssertionError) as error:
        short_text = size if len(size) <= 60 else size[:57] + "..."
        raise CheckpointError(f"{where}: {short_text!r} is not a size: {error}") from None
    return value


def node_of_size(program: Program, value: sympy.Expr) -> int | float | fx.Node:
    """Return a node, or a number, that computes an expression of the sizes of a program's inputs.

    Raises:
        VerificationError: it is not such an expression, or has an operation that :data:`COMBINE` does not list.
    """
    if value.is_Integer or value.is_Float:
        return int(value) if value.is_Integer else float(value)
    for node in program.input_nodes.values():
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and expression(size) == value:
                return program.edit.call(torch.ops.aten.sym_size.int, node, dim)
    combine = COMBINE.get(type(value).__name__)
    if combine is None:
        raise VerificationError(
            f"the size {format_size(value, program.symbols)} cannot be computed from the sizes of inputs",
            hint="use -1 in reshape, or a size read from a value with torch.ops.aten.sym_size",
        )
    total, *operands = (node_of_size(program, part) for part in value.args)
    if not operands:
        return program.edit.call(combine, total)
    for part in operands:
        total = program.edit.call(combine, total, part)
    return total
