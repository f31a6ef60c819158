"""Segments of an exported graph, one per layer, and the match of two equal ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.sizes import expression
from ...ir.weights import InMemory
from .kinds import Choice
from .record import CannotStamp

OUTSIDE = -1


@dataclass
class Match:
    """How the segment of a template corresponds to that of another layer.

    Args:
        partners: each node of the template, weights included, and its partner.
        shared: values that both read.
        stream: what the template reads from the layer before it, and what its partner reads there.
        leaves: the template's value that goes on to the next layer.
    """

    leaves: fx.Node
    partners: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shared: dict[fx.Node, None] = field(default_factory=dict)
    stream: tuple[fx.Node, fx.Node] | None = None


class Segments:
    """Which layer each node of a program belongs to: the last one that it depends on."""

    def __init__(self, program: Program, choice: Choice, layer_of: Mapping[str, int]):
        self.program = program
        self.choice = choice
        self.level: dict[fx.Node, int] = {}
        self.members: dict[int, list[fx.Node]] = {}
        by_name = {layer.name: layer.number for layer in choice.layers}
        parameters: set[fx.Node] = set()
        inputs: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                weight = program.weights.get(node.name)
                names = weight.all_names if weight is not None else ()
                level = max((layer_of.get(n, OUTSIDE) for n in names), default=OUTSIDE)
                if weight is None:
                    inputs.add(node)
                elif weight.kind == "parameter":
                    parameters.add(node)
            else:
                level = max((self.level[n] for n in node.all_input_nodes), default=OUTSIDE)
                for known in (parameters, inputs):
                    if any(n in known for n in node.all_input_nodes):
                        known.add(node)
                if node in parameters and node in inputs:
                    # an operator without weights, such as a norm, belongs to the layer that called it; masks and tables,
                    # which layers share, are called in the first one too, but not on the stream
                    level = max(level, _called_in(node, by_name))
            self.level[node] = level
            self.members.setdefault(level, []).append(node)

    def calls(self, number: int) -> list[fx.Node]:
        """Return the calls of a layer's segment in execution order."""
        return [n for n in self.members.get(number, []) if n.op == "call_function"]

    def leaving(self, number: int) -> list[fx.Node]:
        """Return the values of a segment that others read, apart from sizes, which all layers share."""
        return [
            n
            for n in self.members.get(number, [])
            if any(self.level.get(u, OUTSIDE) != number for u in n.users)
            and not isinstance(n.meta.get("val"), (int, torch.SymInt))
        ]


def _called_in(node: fx.Node, by_name: Mapping[str, int]) -> int:
    stack = node.meta.get("nn_module_stack") or {}
    return max((by_name.get(str(entry[0]), OUTSIDE) for entry in stack.values()), default=OUTSIDE)


def match(segments: Segments, first: int, second: int, renamed: Mapping[str, str]) -> Match:
    """Match the segments of two equal layers.

    Args:
        segments: of the exported program.
        first: number of the template.
        second: number of the other layer; where it is the last of its list, its segment may hold more.
        renamed: names of the template's tensors and what they are called in the other layer.

    Raises:
        CannotStamp: they differ.
    """
    name = segments.choice.layers[first].name
    leaving = segments.leaving(first)
    if len(leaving) != 1:
        raise CannotStamp(f"{len(leaving)} values leave {name} in the exported graph")
    leaves = leaving[0]
    own = segments.calls(first)
    candidates: Iterable[fx.Node] = segments.leaving(second)
    if segments.choice.is_last(second):
        candidates = [n for n in segments.calls(second) if n.target == leaves.target]
    # of candidates that fail, the one that went furthest says why
    reasons: list[tuple[int, str]] = [(0, "")]
    for candidate in candidates:
        matching = _Matching(segments, first, second, renamed, Match(leaves))
        if not matching.pair(leaves, candidate):
            reasons.append((len(matching.result.partners), matching.reason))
            continue
        missing = [n for n in own if n not in matching.result.partners]
        if missing:
            reasons.append((len(own), f"{missing[0].name} has no partner"))
        elif matching.result.stream is None:
            reasons.append((len(own), "no value comes from the layer before"))
        elif not segments.choice.is_last(second) and len(segments.calls(second)) != len(own):
            reasons.append((len(own), "they have different numbers of operators"))
        else:
            return matching.result
    other = segments.choice.layers[second].name
    raise CannotStamp(f"{name} and {other} differ in the exported graph: {max(reasons)[1]}")


class _Matching:
    """Compares two values and everything that they are computed from."""

    def __init__(
        self, segments: Segments, first: int, second: int, renamed: Mapping[str, str], result: Match
    ):
        self.segments = segments
        self.first, self.second = first, second
        self.renamed = renamed
        self.result = result
        self.taken: dict[fx.Node, fx.Node] = {}
        self.reason = ""

    def pair(self, one: fx.Node, other: fx.Node) -> bool:
        """Pair two nodes and their operands; depth first without recursion, since layers can be long."""
        pending = [(one, other)]
        while pending:
            a, b = pending.pop()
            if a in self.result.partners:
                if self.result.partners[a] is not b:
                    return self.fail(a, b)
                continue
            if self.segments.level[a] != self.first:
                if not self.outer(a, b):
                    return self.fail(a, b)
                continue
            if self.segments.level[b] != self.second or self.taken.get(b, a) is not a:
                if _same_size(a, b):
                    self.result.partners[a] = b
                    continue
                return self.fail(a, b)
            self.result.partners[a], self.taken[b] = b, a
            if a.op == "placeholder" or b.op == "placeholder":
                if not self.weight(a, b):
                    return self.fail(a, b)
                continue
            operands: list[tuple[fx.Node, fx.Node]] = []
            if not _same_call(a, b, operands):
                return self.fail(a, b)
            if not same_shape(a, b):
                return self.fail(a, b)
            pending += operands
        return True

    def fail(self, one: fx.Node, other: fx.Node) -> bool:
        self.reason = f"{one.name} is not {other.name}"
        return False

    def outer(self, one: fx.Node, other: fx.Node) -> bool:
        if one is other or self.constants(one, other):
            self.result.shared[one] = None
            return True
        if self.segments.level[other] == self.second:
            # what is inside one of them is outside the other
            return False
        if self.result.stream is not None:
            return self.result.stream == (one, other)
        self.result.stream = (one, other)
        return True

    def constants(self, one: fx.Node, other: fx.Node) -> bool:
        """Return whether both are equal numbers that the code makes, or computed from such alike: layers share them."""
        weights = self.segments.program.weights
        pending = [(one, other)]
        while pending:
            one, other = pending.pop()
            if one is other:
                continue
            a, b = weights.get(one.name), weights.get(other.name)
            if a is not None and b is not None:
                if not (a.kind == b.kind == "constant" and _equal_constants(a.source, b.source)):
                    return False
            elif (
                one.op != "call_function"
                or one.target != other.target
                or not _same((one.args, one.kwargs), (other.args, other.kwargs), pending)
            ):
                return False
        return True

    def weight(self, one: fx.Node, other: fx.Node) -> bool:
        if one.op != other.op:
            return False
        weights = self.segments.program.weights
        a, b = weights[one.name], weights[other.name]
        named = {self.renamed.get(n, n) for n in a.all_names} & set(b.all_names)
        return bool(named) and a.source.shape == b.source.shape and a.source.dtype == b.source.dtype


def _equal_constants(one: Any, other: Any) -> bool:
    return (
        isinstance(one, InMemory)
        and isinstance(other, InMemory)
        and bool(torch.equal(one.load(), other.load()))
    )


def _same_call(one: fx.Node, other: fx.Node, operands: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Compare operators and plain arguments of two calls; nodes in them are appended to ``operands`` in pairs."""
    return one.target == other.target and _same((one.args, one.kwargs), (other.args, other.kwargs), operands)


def _same(one: Any, other: Any, operands: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Compare arguments; nodes in them are appended to ``operands`` in pairs."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        operands.append((one, other))
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b, operands) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k], operands) for k in one)
    return bool(one == other) or (isinstance(one, float) and one != one and other != other)


def _values(node: fx.Node) -> Iterator[Any]:
    value = node.meta.get("val")
    yield from value if isinstance(value, (list, tuple)) else (value,)


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Return whether two values have the same types and sizes, those that vary included."""
    return all(
        not isinstance(a, torch.Tensor)
        or (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and list(map(str, a.shape)) == list(map(str, b.shape))
        )
        for a, b in zip(_values(one), _values(other), strict=True)
    )


def _same_size(one: fx.Node, other: fx.Node) -> bool:
    """Return whether two nodes are one size, read from different values."""
    a, b = one.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, (torch.SymInt, int))
        and isinstance(b, (torch.SymInt, int))
        and bool(expression(a) == expression(b))
    )
