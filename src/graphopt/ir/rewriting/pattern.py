"""Patterns over the graph: operators with arguments by schema, alternatives, optional nodes, conditions."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..schema import operator_name
from .spelling import NOTHING, OPERATORS, REFLECTED, SPLITS, SWAPS, clean_arguments, packet_of, swapped

COMMUTATIVE = frozenset(
    {"aten.add", "aten.mul", "aten.bitwise_and", "aten.bitwise_or", "aten.maximum", "aten.minimum", "aten.eq"}
)

# the result of a predicate: True, or False or the reason
Answer = bool | str


class Pattern:
    """Base of all patterns."""

    def depth(self) -> int:
        """Return the length of the longest chain of nodes the pattern spans."""
        return 0

    def names(self) -> set[str]:
        """Return the names of the values that every match of the pattern reads."""
        return set()


@dataclass(frozen=True, eq=False)
class Wild(Pattern):
    """Any node or plain value; two wildcards of the same name must match the same value."""

    name: str
    where: Callable[[Any], Answer] | None = None

    def names(self) -> set[str]:
        """Names captured inside."""
        return {self.name}


@dataclass(frozen=True, eq=False)
class Exactly(Pattern):
    """A plain value; floats are compared with a relative tolerance of 1e-6."""

    value: Any

    def matches(self, other: Any) -> bool:
        """Tell whether a plain value is this one."""
        if isinstance(self.value, float) and isinstance(other, (int, float)) and not isinstance(other, bool):
            return math.isclose(self.value, float(other), rel_tol=1e-6, abs_tol=1e-12)
        if isinstance(self.value, int) and isinstance(other, (list, tuple)) and len(other) == 1:
            # one dimension may be given by itself
            return self.matches(other[0])
        if isinstance(self.value, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(self.value) == len(other) and all(
                Exactly(a).matches(b) for a, b in zip(self.value, other, strict=True)
            )
        return bool(self.value == other) and isinstance(self.value, bool) == isinstance(other, bool)


@dataclass(frozen=True, eq=False)
class Listed(Pattern):
    """A list argument, item by item."""

    items: tuple[Any, ...]

    def depth(self) -> int:
        """Return how many calls lie between the root and the farthest leaf."""
        return max((p.depth() for p in self.items if isinstance(p, Pattern)), default=0)

    def names(self) -> set[str]:
        """Names captured inside."""
        return set().union(*(p.names() for p in self.items if isinstance(p, Pattern)))


@dataclass(frozen=True, eq=False)
class Call(Pattern):
    """A call of one of several operators, with any overload.

    ``positional`` and ``named`` are patterns or plain values; arguments not mentioned must have their
    default unless ``loose``. Operands of commutative operators match in any order. With ``shared``, nodes outside
    the match may read the result too.
    """

    operators: tuple[str, ...]
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    loose: bool = False
    shared: bool = False
    where: Callable[[Any], Answer] | None = None

    def depth(self) -> int:
        """Return how many calls lie between the root and the farthest leaf."""
        inner = [*self.positional, *self.named.values()]
        return 1 + max((p.depth() for p in inner if isinstance(p, Pattern)), default=0)

    def names(self) -> set[str]:
        """Names captured inside."""
        inner = [*self.positional, *self.named.values()]
        return set().union(*(p.names() for p in inner if isinstance(p, Pattern)))

    def commutes(self) -> bool:
        """Tell whether the first two operands may be swapped."""
        return self.operators[0] in COMMUTATIVE and len(self.positional) >= 2


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first alternative that matches."""

    options: tuple[Any, ...]

    def depth(self) -> int:
        """Return how many calls lie between the root and the farthest leaf."""
        return max(p.depth() for p in self.options if isinstance(p, Pattern))

    def names(self) -> set[str]:
        """Names captured inside."""
        options = [p.names() if isinstance(p, Pattern) else set() for p in self.options]
        return set.intersection(*options) if options else set()


def call(*operators: str, **options: Any) -> Callable[..., Call]:
    """Return a function that builds calls: ``call("aten.mul")(x, y)``; names without a dot are ATen's."""
    full = tuple(name if "." in name or name == "getitem" else f"aten.{name}" for name in operators)

    def make(*positional: Any, **named: Any) -> Call:
        return Call(full, positional, named, **options)

    return make


def from_function(function: Callable[..., Any]) -> tuple[list[Pattern], list[str]]:
    """Return the patterns that a function of tensors describes, one per result, and its parameters.

    Parameters become wildcards, which match tensors and plain arguments (an epsilon, a size).
    """
    try:
        parameters = list(inspect.signature(function).parameters)
    except ValueError:
        name = getattr(function, "__name__", "it")
        raise UsageError(
            f"the parameters of {name} are not known",
            hint=f"write it as a function: lambda x: torch.{name}(x)",
        ) from None
    results = function(*(_Sketch(Wild(name)) for name in parameters))
    if isinstance(results, _Sketch):
        results = (results,)
    roots = [_pattern(result) for result in results]
    if not all(isinstance(root, Call) for root in roots):
        raise UsageError("a pattern must compute something from its parameters")
    return roots, parameters


class _Sketch:
    """A symbolic value inside a pattern function: torch functions called on it become patterns."""

    def __init__(self, pattern: Pattern):
        self.pattern = pattern

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = clean_arguments(function, args, kwargs or {})
        return _sketch(operator_name(packet_of(function)), args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        operator = operator_name(packet_of(name))

        def method(*args: Any, **kwargs: Any) -> Any:
            listed = name in ("reshape", "view", "permute", "expand")
            whole = len(args) == 1 and isinstance(args[0], _Sketch)
            if listed and args and not whole and not isinstance(args[0], (list, tuple)):
                args = (list(args),)
            return _sketch(operator, (self, *args), kwargs)

        return method

    @property
    def T(self) -> _Sketch:
        return _sketch("aten.permute", (self, [1, 0]), {})

    @property
    def mT(self) -> _Sketch:
        return _sketch("aten.mT", (self,), {})

    def __rtruediv__(self, other: float) -> Any:
        inverse = self.reciprocal()
        return inverse if other == 1 else inverse * other

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return _sketch("getitem", (self, index), {})
        raise UsageError("in a pattern, write slices as torch.narrow, select or split")


def _sketch(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Sketch:
    if operator in NOTHING and len(args) == 1:
        return _Sketch(_pattern(args[0]))
    if operator in SWAPS and not kwargs:
        ends = SWAPS[operator] or args[1:3]
        return _sketch("aten.permute", (args[0], _Sketch(_swap(*ends))), {})
    if operator in SPLITS and len(args) > 1 and isinstance(args[1], (list, tuple, int)):
        sizes = args[1] if isinstance(args[1], (list, tuple)) else _Sketch(_split_sizes(operator, args[1]))
        return _sketch("aten.split_with_sizes", (args[0], sizes, *args[2:]), kwargs)
    pattern = Call((operator,), tuple(_pattern(a) for a in args), {k: _pattern(v) for k, v in kwargs.items()})
    return _Sketch(pattern)


_NUMBERS = itertools.count()


def _swap(first: int, second: int) -> Wild:
    def answer(order: Any) -> Answer:
        rank = len(order)
        fits = all(-rank <= dim < rank for dim in (first, second))
        dims = [int(d) % rank for d in order]
        return (fits and dims == swapped(rank, first, second)) or f"the permutation {list(order)}"

    return Wild(f"(order {next(_NUMBERS)})", answer)


def _split_sizes(operator: str, number: int) -> Wild:
    """Match the sizes of a split into parts of this size, or into this many parts."""

    def answer(sizes: Any) -> Answer:
        size = number if operator == "aten.split" else sizes[0]
        fits = operator == "aten.split" or len(sizes) == number
        even = all(s == size for s in sizes[:-1]) and sizes[-1] <= size
        return (fits and even) or f"parts of sizes {list(sizes)}"

    return Wild(f"(sizes {next(_NUMBERS)})", answer)


def _pattern(value: Any) -> Any:
    if isinstance(value, _Sketch):
        return value.pattern
    if isinstance(value, (list, tuple)):
        return Listed(tuple(_pattern(item) for item in value))
    return Exactly(value)


def _operate(name: str, reflected: bool) -> Callable[..., Any]:
    def operate(self: _Sketch, *others: Any) -> Any:
        return _sketch(f"aten.{name}", (self, *others) if not reflected else (*others, self), {})

    return operate


def _give_operators() -> None:
    for dunder, operator in OPERATORS.items():
        if dunder != "__eq__":
            setattr(_Sketch, dunder, _operate(operator, False))
    for dunder, operator in REFLECTED.items():
        # both commute, so the sketch comes first as tensors do in the graph
        setattr(_Sketch, dunder, _operate(operator, False))


_give_operators()
