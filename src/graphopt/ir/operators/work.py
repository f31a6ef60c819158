"""Inputs and results of cost formulas: operands, calls and work, in numbers or symbolic sizes; shared arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = int | sympy.Expr
"""A size or a count: a number, or an expression of the program's size symbols."""


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes, 1 for none."""
    return math.prod(sizes)


def minimum(first: Size, second: Size) -> Size:
    """Return the smaller of two sizes."""
    if isinstance(first, int) and isinstance(second, int):
        return min(first, second)
    return first if first == second else sympy.Min(first, second)


def maximum(first: Size, second: Size) -> Size:
    """Return the larger of two sizes."""
    if isinstance(first, int) and isinstance(second, int):
        return max(first, second)
    return first if first == second else sympy.Max(first, second)


def half(even: Size) -> Size:
    """Return half of a size known to be even, exactly."""
    return even // 2 if isinstance(even, int) else even / 2


NORM_FLOPS = 7
"""Operations per element of a norm (LLM-Viewer)."""

SOFTMAX_FLOPS = 5
"""Operations per score of a softmax (LLM-Viewer)."""

ACTIVATION_FLOPS = 4
"""Operations per element of SiLU, GELU and the like: negate, exponential, add, divide."""


@dataclass(frozen=True)
class Operand:
    """A tensor as formulas see it.

    Attributes:
        shape: sizes, numbers or expressions.
        dtype: element type.
        weight: known before the program runs: a weight, a value folded from weights, or a view of one.
        stored: elements in memory where an expanded view shows them more than once; None for all of them.
        bits: of an element as it is stored, where that is fewer than its type has, scales included; None otherwise.
        position: index among the call's operands; -1 outside of a call.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    weight: bool = False
    stored: Size | None = None
    bits: int | Fraction | None = None
    position: int = -1

    @property
    def numel(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    @property
    def distinct(self) -> Size:
        """Number of elements in memory, each counted once."""
        return self.numel if self.stored is None else self.stored

    @property
    def bytes(self) -> Size:
        """Bytes of all elements."""
        return self.bytes_of(self.numel)

    def bytes_of(self, elements: Size) -> Size:
        """Return the bytes of this many elements."""
        if isinstance(self.bits, Fraction):
            if isinstance(elements, int):
                return math.ceil(elements * self.bits / 8)
            return elements * sympy.Rational(self.bits.numerator, 8 * self.bits.denominator)
        if self.bits is None or self.bits % 8 == 0:
            return elements * (self.dtype.itemsize if self.bits is None else self.bits // 8)
        return half(elements * (self.bits // 4))

    def at(self, number: Callable[[Size], int]) -> Operand:
        """Return the operand with numbers for sizes."""
        stored = None if self.stored is None else number(self.stored)
        return replace(self, shape=tuple(number(size) for size in self.shape), stored=stored)


@dataclass(frozen=True)
class Work:
    """What a call costs: floating-point operations, and bytes moved to and from memory.

    Attributes:
        flops: operations; a multiplication and an addition count as two.
        weight_bytes: bytes of weights read.
        activation_bytes: bytes of other operands read and of results written.
    """

    flops: Size = 0
    weight_bytes: Size = 0
    activation_bytes: Size = 0

    @property
    def bytes(self) -> Size:
        """All bytes moved."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        name: the operator: ``aten.linear``.
        arguments: by name in the operator's schema; tensors are operands.
        inputs: the tensors read, each once.
        outputs: the tensors returned.
        pointwise: torch calls the operator elementwise.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    pointwise: bool = False

    def tensor(self, name: str) -> Operand:
        """Return a tensor argument by name."""
        operand = self.arguments[name]
        assert isinstance(operand, Operand), f"{self.name}: {name} is not a tensor"
        return operand

    @property
    def output(self) -> Operand:
        """The first tensor returned."""
        return self.outputs[0]

    @property
    def kind(self) -> str:
        """Element type of the arithmetic: the result's, or the first operand's if that is no float."""
        dtype = self.output.dtype
        if not dtype.is_floating_point and self.inputs:
            dtype = self.inputs[0].dtype
        return str(dtype).removeprefix("torch.")

    def at(self, number: Callable[[Size], int]) -> Call:
        """Return the call with numbers for sizes."""
        return replace(
            self,
            arguments={name: _at(value, number) for name, value in self.arguments.items()},
            inputs=tuple(operand.at(number) for operand in self.inputs),
            outputs=tuple(operand.at(number) for operand in self.outputs),
        )


def _at(value: Any, number: Callable[[Size], int]) -> Any:
    if isinstance(value, Operand):
        return value.at(number)
    if isinstance(value, sympy.Expr):
        return number(value)
    if isinstance(value, tuple):
        return tuple(_at(item, number) for item in value)
    return value


def moved(call: Call, flops: Size = 0, read: Mapping[str, Size] | None = None) -> Work:
    """Return the work of a call that reads its operands once and writes its results once.

    Args:
        call: the call.
        flops: floating-point operations.
        read: number of elements read of an argument, by its name, where not all of them are.
    """
    partly = {call.tensor(name).position: elements for name, elements in (read or {}).items()}
    weights: Size = 0
    others: Size = sum(result.bytes for result in call.outputs)
    for operand in call.inputs:
        elements = partly.get(operand.position, operand.distinct)
        if operand.weight:
            weights = weights + operand.bytes_of(elements)
        else:
            others = others + operand.bytes_of(elements)
    return Work(flops, weights, others)


def _ramp(rows: Size, window: int | None) -> Size:
    """Return the sum of ``min(row, window)`` over rows 1, 2, ..."""
    if window is None:
        return half(rows * (rows + 1))
    full = minimum(rows, window)
    return half(full * (full + 1)) + (rows - full) * window


def visible_pairs(queries: Size, keys: Size, causal: bool, window: int | None) -> Size:
    """Return the number of (query, key) pairs in attention, per head and sequence.

    Queries are aligned with the last keys: causal over n positions, n (n + 1) / 2 pairs. ``window`` counts
    positions seen, including the query's own, to both sides when not causal. Masks and segments are values, not
    sizes, so the pairs they hide are counted.
    """
    if not causal and window is None:
        return queries * keys
    seeing = minimum(queries, keys)
    left = _ramp(keys, window) - _ramp(maximum(keys - queries, 0), window)
    return left if causal else left + _ramp(seeing, window) - seeing


def attention_work(call: Call, q: str, k: str, v: str, pairs: Size, keys: Size) -> Work:
    """Return the work of fused attention over ``pairs`` (query, key) pairs that reads ``keys`` keys."""
    query, key, value = call.tensor(q), call.tensor(k), call.tensor(v)
    rows = product(query.shape[:-2]) * pairs
    flops = rows * (2 * query.shape[-1] + 2 * value.shape[-1] + SOFTMAX_FLOPS)
    if keys == key.shape[-2]:
        return moved(call, flops)
    read = {n: product(t.shape[:-2]) * keys * t.shape[-1] for n, t in ((k, key), (v, value))}
    return moved(call, flops, read)
