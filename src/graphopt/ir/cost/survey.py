"""Which distinct calls a program makes when it runs, and in whose storage each value lies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from ..operators.traits import Trait, has, named
from ..operators.work import Call, Operand, Size, Work, minimum
from ..running.fold import depends_on_weights_alone
from ..schema import arguments, operator_name
from ..sizes import expression
from .formulas import known, work

if TYPE_CHECKING:
    from ..program import Program

VIEWS = named(Trait.VIEW | Trait.BITS) | {"aten.detach"}
"""Operators that return their first operand's storage under other sizes."""

# these never write anything out, whatever their operand
_RESHAPES = named(Trait.RESHAPE) - {"aten.squeeze", "aten.unsqueeze"}
_REPEATS = named(Trait.REPEAT)
_PARTS = named(Trait.PART)


@dataclass
class Survey:
    """The calls of a program at run time; what depends on weights alone was computed before.

    Attributes:
        calls: distinct calls.
        symbolic: the work of each, in expressions of sizes.
        call_of: nodes that compute something, in execution order, and their call's index.
        operands: the tensors that each node returns.
        base: the node in whose storage a node's value lies.
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
        found = [0] * len(self.calls)
        for index in self.call_of.values():
            found[index] += 1
        return found

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
        found: dict[str, int] = {}
        for call, count in zip(self.calls, self.counts(), strict=True):
            if not known(call):
                found[call.name] = found.get(call.name, 0) + count
        return found


def survey(program: Program) -> Survey:
    """Return the calls of a program, found at most once per version of its graph; linear in its size."""
    found: Survey = program.derived("cost_survey", lambda: _Surveyor(program).run())
    return found


def _stored_bits(node: fx.Node) -> int | None:
    """Return in how many bits an element of a value is stored, where a rounding says so."""
    rounding = node if has(node, Trait.ROUNDING) else None
    if rounding is None and node.op == "call_function" and all(has(u, Trait.ROUNDING) for u in node.users):
        rounding = next(iter(node.users), None)
    if rounding is None:
        return None
    return int("".join(c for c in str(arguments(rounding)["dtype"]) if c.isdigit()))


class _Surveyor:
    def __init__(self, program: Program):
        self.program = program
        self.found = Survey(constant=depends_on_weights_alone(program))
        self.index: dict[Any, int] = {}
        self.sizes: dict[Any, Size] = {}

    def run(self) -> Survey:
        for node in self.program.graph.nodes:
            self.visit(node)
        self.found.symbolic = [work(call) for call in self.found.calls]
        return self.found

    def visit(self, node: fx.Node) -> None:
        found = self.found
        if node.op == "output":
            return
        constant = node in found.constant
        operands = self.read(node.meta.get("val"), constant)
        bits = _stored_bits(node)
        if bits is not None:
            operands = tuple(replace(operand, bits=bits) for operand in operands)
        found.base[node] = node
        if node.op == "call_function" and operands:
            name = operator_name(node.target)
            source = next((n for n in node.all_input_nodes if found.operands.get(n)), None)
            if has(node, Trait.ROUNDING) and source is not None:
                # how a value is stored is no work of its own
                found.base[node] = found.base[source]
            elif name in VIEWS and source is not None and not self.copies(name, source):
                found.base[node] = found.base[source]
                operands = operands if constant else self.viewed(name, source, operands)
            elif not constant:
                found.call_of[node] = self.call(node, name, operands)
        found.operands[node] = operands

    def copies(self, name: str, source: fx.Node) -> bool:
        """A reshape cannot merge an expanded dimension with another without writing it out."""
        return name in _RESHAPES and self.found.operands[source][0].stored is not None

    def viewed(self, name: str, source: fx.Node, results: tuple[Operand, ...]) -> tuple[Operand, ...]:
        whole = self.found.operands[source][0]
        stored = whole.stored
        if name in _REPEATS and stored is None and whole.shape != results[0].shape:
            stored = whole.numel
        if stored is not None and name in _PARTS:
            return tuple(
                replace(r, weight=whole.weight, stored=minimum(stored, r.numel), bits=whole.bits)
                for r in results
            )
        return tuple(replace(r, weight=whole.weight, stored=stored, bits=whole.bits) for r in results)

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
        places = {source: place for place, source in enumerate(sources)}
        inputs = tuple(self.found.operands[source] for source in sources)
        # the same operand given twice is read once, so its place is part of the key
        arguments_key = (self.freeze(node.args, places), self.freeze(node.kwargs, places))
        key = (node.target, arguments_key, inputs, outputs)
        if key not in self.index:
            self.index[key] = len(self.found.calls)
            tensors = {p: replace(i[0], position=p) for p, i in enumerate(inputs) if i}
            by_name = {k: self.argument(v, places, tensors) for k, v in arguments(node).items()}
            pointwise = has(node, Trait.POINTWISE)
            self.found.calls.append(Call(name, by_name, tuple(tensors.values()), outputs, pointwise))
        return self.index[key]

    def freeze(self, value: Any, places: dict[fx.Node, int]) -> Any:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            return ("size", self.size(held)) if isinstance(held, torch.SymInt) else ("operand", places[value])
        if isinstance(value, (list, tuple)):
            return tuple(self.freeze(item, places) for item in value)
        if isinstance(value, dict):
            return tuple((name, self.freeze(item, places)) for name, item in value.items())
        # 1, 1.0 and True are equal keys and different arguments; slices have no hash
        return (type(value), repr(value) if isinstance(value, slice) else value)

    def argument(self, value: Any, places: dict[fx.Node, int], tensors: dict[int, Operand]) -> Any:
        if isinstance(value, fx.Node):
            if places[value] in tensors:
                return tensors[places[value]]
            held = value.meta.get("val")
            return self.size(held) if isinstance(held, (int, torch.SymInt)) else held
        if isinstance(value, (list, tuple)):
            return tuple(self.argument(item, places, tensors) for item in value)
        return value
