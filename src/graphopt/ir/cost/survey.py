"""The distinct calls that a program makes when it runs, and the storage of each value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from ..operators.traits import Trait, has, named
from ..operators.work import Call, Operand, Size, Work, minimum
from ..quantised.stored import stored_bytes
from ..running.fold import depends_on_weights_alone
from ..schema import arguments, operator_name
from ..sizes import expression
from ..weights import numel
from .formulas import known, work

if TYPE_CHECKING:
    from ..program import Program

VIEWS = named(Trait.VIEW | Trait.BITS) | {"aten.detach"}
"""Operators that return a view of their first operand."""

# squeeze and unsqueeze never copy, whatever their operand
_RESHAPES = named(Trait.RESHAPE) - {"aten.squeeze", "aten.unsqueeze"}
_REPEATS = named(Trait.REPEAT)
_PARTS = named(Trait.PART)


@dataclass
class Survey:
    """The calls of a program at run time; what depends on weights alone is computed beforehand.

    Attributes:
        calls: distinct calls.
        symbolic: the work of each call, in expressions of sizes.
        call_of: nodes that compute something, in execution order, and the index of their call.
        operands: the tensors that each node returns.
        base: the node whose storage holds a node's value.
        constant: nodes that depend on weights alone.
    """

    calls: list[Call] = field(default_factory=list)
    symbolic: list[Work] = field(default_factory=list)
    call_of: dict[fx.Node, int] = field(default_factory=dict)
    operands: dict[fx.Node, tuple[Operand, ...]] = field(default_factory=dict)
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)

    def counts(self) -> list[int]:
        """Return how often each distinct call is made."""
        totals = [0] * len(self.calls)
        for index in self.call_of.values():
            totals[index] += 1
        return totals

    def symbols(self) -> set[sympy.Symbol]:
        """Return every symbol that some size depends on."""
        sizes = {
            size
            for operands in self.operands.values()
            for operand in operands
            for size in operand.shape
            if not isinstance(size, int)
        }
        return {symbol for size in sizes for symbol in size.free_symbols}

    def unknown(self) -> dict[str, int]:
        """Return operators without a formula and how often they are called."""
        by_name: dict[str, int] = {}
        for call, count in zip(self.calls, self.counts(), strict=True):
            if not known(call):
                by_name[call.name] = by_name.get(call.name, 0) + count
        return by_name


def survey(program: Program) -> Survey:
    """Return the calls of a program, computed at most once per version of its graph; linear in its size."""
    result: Survey = program.derived("cost_survey", lambda: _Surveyor(program).run())
    return result


def _stored_bits(node: fx.Node) -> int | None:
    """Return the number of bits in which an element of a value is stored, where it is fake-quantised."""
    rounding = node if has(node, Trait.ROUNDING) else None
    if rounding is None and node.op == "call_function" and all(has(u, Trait.ROUNDING) for u in node.users):
        rounding = next(iter(node.users), None)
    if rounding is None:
        return None
    return int("".join(c for c in str(arguments(rounding)["dtype"]) if c.isdigit()))


class _Surveyor:
    def __init__(self, program: Program):
        self.program = program
        self.result = Survey(constant=depends_on_weights_alone(program))
        self.index: dict[Any, int] = {}
        self.sizes: dict[Any, Size] = {}

    def run(self) -> Survey:
        for node in self.program.graph.nodes:
            self.visit(node)
        self.result.symbolic = [work(call) for call in self.result.calls]
        return self.result

    def visit(self, node: fx.Node) -> None:
        result = self.result
        if node.op == "output":
            return
        constant = node in result.constant
        operands = self.read(node.meta.get("val"), constant)
        bits = _stored_bits(node) or self.coded_bits(node)
        if bits is not None:
            operands = tuple(replace(operand, bits=bits) for operand in operands)
        result.base[node] = node
        if node.op == "call_function" and operands:
            name = operator_name(node.target)
            source = next((n for n in node.all_input_nodes if result.operands.get(n)), None)
            if has(node, Trait.ROUNDING) and source is not None:
                # fake quantisation is not counted as work
                result.base[node] = result.base[source]
            elif name in VIEWS and source is not None and not self.copies(name, source):
                result.base[node] = result.base[source]
                operands = operands if constant else self.viewed(name, source, operands)
            elif not constant:
                result.call_of[node] = self.call(node, name, operands)
        result.operands[node] = operands

    def coded_bits(self, node: fx.Node) -> Fraction | None:
        """Return the bits in which an entry of a weight is kept on average, if it is kept as codes."""
        weight = self.program.weights.get(node.name) if node.op == "placeholder" else None
        if weight is None:
            return None
        kept = stored_bytes(weight.source)
        return None if kept == weight.bytes else Fraction(8 * kept, numel(weight.source.shape))

    def copies(self, name: str, source: fx.Node) -> bool:
        """Tell whether a reshape copies: merging an expanded dimension with another has to."""
        return name in _RESHAPES and self.result.operands[source][0].stored is not None

    def viewed(self, name: str, source: fx.Node, results: tuple[Operand, ...]) -> tuple[Operand, ...]:
        operand = self.result.operands[source][0]
        stored = operand.stored
        if name in _REPEATS and stored is None and operand.shape != results[0].shape:
            stored = operand.numel
        if stored is not None and name in _PARTS:
            return tuple(
                replace(r, weight=operand.weight, stored=minimum(stored, r.numel), bits=operand.bits)
                for r in results
            )
        return tuple(replace(r, weight=operand.weight, stored=stored, bits=operand.bits) for r in results)

    def read(self, value: Any, weight: bool) -> tuple[Operand, ...]:
        if isinstance(value, torch.Tensor):
            return (Operand(tuple(self.size(s) for s in value.shape), value.dtype, weight),)
        if isinstance(value, (list, tuple)):
            return tuple(operand for item in value for operand in self.read(item, weight))
        return ()

    def size(self, size: int | torch.SymInt) -> Size:
        if isinstance(size, int):
            return size
        value = expression(size)
        if value not in self.sizes:
            self.sizes[value] = int(value) if value.is_Integer else value
        return self.sizes[value]

    def call(self, node: fx.Node, name: str, outputs: tuple[Operand, ...]) -> int:
        sources = node.all_input_nodes
        positions = {source: position for position, source in enumerate(sources)}
        inputs = tuple(self.result.operands[source] for source in sources)
        # an operand passed twice is read once, so positions of operands are part of the key
        arguments_key = (self.freeze(node.args, positions), self.freeze(node.kwargs, positions))
        key = (node.target, arguments_key, inputs, outputs)
        if key not in self.index:
            self.index[key] = len(self.result.calls)
            tensors = {p: replace(i[0], position=p) for p, i in enumerate(inputs) if i}
            by_name = {k: self.argument(v, positions, tensors) for k, v in arguments(node).items()}
            pointwise = has(node, Trait.POINTWISE)
            self.result.calls.append(Call(name, by_name, tuple(tensors.values()), outputs, pointwise))
        return self.index[key]

    def freeze(self, value: Any, positions: dict[fx.Node, int]) -> Any:
        if isinstance(value, fx.Node):
            size = value.meta.get("val")
            return (
                ("size", self.size(size)) if isinstance(size, torch.SymInt) else ("operand", positions[value])
            )
        if isinstance(value, (list, tuple)):
            return tuple(self.freeze(item, positions) for item in value)
        if isinstance(value, dict):
            return tuple((name, self.freeze(item, positions)) for name, item in value.items())
        # 1, 1.0 and True are equal keys and different arguments; slices have no hash
        return (type(value), repr(value) if isinstance(value, slice) else value)

    def argument(self, value: Any, positions: dict[fx.Node, int], tensors: dict[int, Operand]) -> Any:
        if isinstance(value, fx.Node):
            if positions[value] in tensors:
                return tensors[positions[value]]
            size = value.meta.get("val")
            return self.size(size) if isinstance(size, (int, torch.SymInt)) else size
        if isinstance(value, (list, tuple)):
            return tuple(self.argument(item, positions, tensors) for item in value)
        return value
