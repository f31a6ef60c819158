"""Residual streams: additions ``s + f(s)``, and the chains they form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_value
from ..operators.traits import Trait, has, named
from ..running.fold import depends_on_weights_alone
from ..schema import is_operator
from .blocks import Block, Stream

if TYPE_CHECKING:
    from ..program import Program

_TRANSPARENT = named(Trait.NORM | Trait.VIEW | Trait.IDENTITY | Trait.CAST) | {
    "aten.relu", "aten.mul", "aten.div", "aten.add"
}  # fmt: skip


@dataclass(eq=False)
class Addition:
    """A sum on the stream.

    Attributes:
        node: the sum.
        base: the stream's value before it.
        terms: what is added.
        inside: for each term what is computed between the base and it, in order.
        carry: what is computed from the base alone and added in its place, where the stream is scaled or its copies
            are mixed on the way, as between hyper-connections.
        repeated: one of several at the same sum, as for ``a + b + f(b)`` where ``b`` is computed from ``a``.
    """

    node: fx.Node
    base: fx.Node
    terms: list[fx.Node]
    inside: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    repeated: bool = False
    carry: fx.Node | None = None

    @cached_property
    def region(self) -> set[fx.Node]:
        """Everything between the base and the terms."""
        return {node for nodes in self.inside.values() for node in nodes}


@dataclass
class Residual:
    """All additions found, in order."""

    additions: list[Addition]
    order: dict[fx.Node, int]

    def streams(self, blocks: list[Block]) -> list[Stream]:
        """Return the streams: chains of blocks, each of which reads what the previous one wrote."""
        streams: list[Stream] = []
        owner: dict[fx.Node, Stream] = {}
        by_add: dict[fx.Node, list[Block]] = {}
        for block in blocks:
            by_add.setdefault(block.add, []).append(block)
        for members in by_add.values():
            previous = origin(members[0].reads, owner)
            if previous is None:
                previous = Stream(members[0].reads, [])
                streams.append(previous)
            previous.blocks.extend(members)
            owner[members[0].add] = previous
            owner[members[0].writes] = previous
            owner[members[0].reads] = previous
        return streams


def origin(node: fx.Node, owner: dict[fx.Node, Stream]) -> Stream | None:
    """Return the stream that a value comes from through norms and reshapes; None if there is none."""
    for _ in range(12):
        if node in owner:
            return owner[node]
        if is_operator(node, "graphopt.skipped"):
            node = node.args[1]  # type: ignore[assignment]
            continue
        if not is_operator(node, *_TRANSPARENT):
            return None
        # through a constant factor or offset, follow the one operand that is computed
        operands = [
            a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)
        ]
        changing = [o for o in operands if o.op == "call_function"]
        if len(changing) != 1:
            return None
        node = changing[0]
    return None


def find_residual(program: Program) -> Residual:
    """Return the additions on residual streams, in execution order; those within another come before it."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    sums = _Sums(order, depends_on_weights_alone(program))
    taken_apart: set[fx.Node] = set()
    additions: list[Addition] = []
    for node in program.graph.nodes:
        if sums.can_open(node):
            sums.split(node)  # in order, so that long sums are not split recursively
    # outermost sums first, so that a sum of several branches is split once
    for node in reversed(list(program.graph.nodes)):
        if node in taken_apart or not sums.is_sum(node):
            continue
        found = sums.split(node) or sums.carried(node) or sums.with_others(node)
        if found is not None:
            taken_apart |= found.opened
            additions.extend(reversed(found.additions))
    additions.reverse()
    return Residual(additions, order)


@dataclass
class _Split:
    """The additions at a sum, inner ones first, its terms, and the sums that were taken apart to find them."""

    additions: list[Addition]
    items: list[fx.Node]
    opened: set[fx.Node]


class _Sums:
    """Sums taken apart into a base and terms that are computed from it."""

    def __init__(self, order: dict[fx.Node, int], constant: set[fx.Node]):
        self.order, self.constant = order, constant
        self.found: dict[fx.Node, _Split | None] = {}

    def is_sum(self, node: Any) -> bool:
        return _is_sum(node, self.constant)

    def split(self, node: fx.Node) -> _Split | None:
        """Return the additions at a sum; None if no term is the base of the others."""
        if node not in self.found:
            self.found[node] = self._split(node)
        return self.found[node]

    def _split(self, node: fx.Node) -> _Split | None:
        items, opened = self._plain(_operands(node))
        addition = self._from_one_base(node, items)
        if addition is not None:
            return _Split(self._chained(addition), items, opened)
        # (x + f(x)) + g(x): a term that is an addition itself stays one unless the others are computed from its base
        for item in items:
            inner = self.split(item) if self.can_open(item) else None
            if inner is not None:
                others = [other for other in items if other is not item]
                addition = self._from_one_base(node, [*inner.items, *others])
                if addition is not None and addition.base is inner.additions[-1].base:
                    return _Split(
                        self._chained(addition), [*inner.items, *others], {*opened, *inner.opened, item}
                    )
        return None

    def with_others(self, node: fx.Node) -> _Split | None:
        """Return the addition at a sum with terms from elsewhere: an embedding added again, another stream."""
        items, opened = self._plain(_operands(node))
        if len(items) < 3:
            return None
        for base in sorted(items, key=lambda n: -self.order[n]):
            inside = self._inside(base, items)
            if inside:
                addition = Addition(node, base, sorted(inside, key=lambda n: self.order[n]), inside)
                return _Split([addition], items, opened)
        return None

    def carried(self, node: fx.Node) -> _Split | None:
        """Return the addition at a sum to which the stream comes scaled, or with its copies mixed.

        The way of the stream has no projection on it: only factors, and products with another matrix of values that
        leave its size as it is.
        """
        items, opened = self._plain(_operands(node))
        for item in items:
            others = [other for other in items if other is not item]
            base: fx.Node | None = item
            way: list[fx.Node] = []
            while base is not None and len(way) < 12:
                inside = self._inside(base, others, all_of=True) if way else {}
                if inside:
                    terms = sorted(others, key=lambda n: self.order[n])
                    # how the copies are mixed is computed with the first term
                    mixed = {*inside[terms[0]], *between(base, item, self.order)}
                    inside[terms[0]] = sorted(mixed, key=lambda n: self.order[n])
                    return _Split([Addition(node, base, terms, inside, carry=item)], items, opened)
                way.append(base)
                base = _carried_from(base, node)
        return None

    def can_open(self, item: fx.Node) -> bool:
        return self.is_sum(item) and len(item.users) == 1

    def _plain(self, items: list[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
        """Return the items with sums that are no additions of their own replaced by their terms, and those sums."""
        result: list[fx.Node] = []
        opened: set[fx.Node] = set()
        work = list(reversed(items))
        while work:
            item = work.pop()
            if self.can_open(item) and self.split(item) is None:
                opened.add(item)
                work.extend(reversed(_operands(item)))
            else:
                result.append(item)
        return result, opened

    def _inside(
        self, base: fx.Node, items: list[fx.Node], *, all_of: bool = False
    ) -> dict[fx.Node, list[fx.Node]]:
        """Return what lies between a base and the items that are computed from it with mixing operators.

        Args:
            base: a value.
            items: values; the base may be among them.
            all_of: return nothing where an item is not computed from the base in this manner.
        """
        inside: dict[fx.Node, list[fx.Node]] = {}
        for item in items:
            if item is base:
                continue
            nodes = between(base, item, self.order)
            # without a mixing operator, x + f(x) is arithmetic and not a block
            if any(has(n, Trait.MIXING) for n in nodes):
                inside[item] = nodes
            elif all_of:
                return {}
        return inside

    def _from_one_base(self, node: fx.Node, items: list[fx.Node]) -> Addition | None:
        base = min(items, key=lambda n: self.order[n])
        inside = self._inside(base, items, all_of=True)
        return Addition(node, base, sorted(inside, key=lambda n: self.order[n]), inside) if inside else None

    def _chained(self, addition: Addition) -> list[Addition]:
        """Return an addition after those at the same sum in which a term is the base of later terms."""
        chained = []
        for term in reversed(addition.terms):
            later = [t for t in addition.terms if t is not term and term in addition.inside[t]]
            inside = self._inside(term, later)
            if inside:
                terms = sorted(inside, key=lambda n: self.order[n])
                chained.append(Addition(addition.node, term, terms, inside, repeated=True))
                addition.repeated = True
        return [*chained, addition]


def _is_sum(node: Any, constant: set[fx.Node]) -> bool:
    if not is_operator(node, "aten.add") or len(node.args) != 2 or node.kwargs:
        return False
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    if first in constant or second in constant:
        return False
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.dim() < 2:
        return False
    return same_value(first.meta["val"], second.meta["val"]) or _same_width(first, second)


def _same_width(first: fx.Node, second: fx.Node) -> bool:
    """Tell whether two values have the same shape; a float32 stream may have contributions of a narrower type."""
    a, b = first.meta["val"], second.meta["val"]
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dtype.is_floating_point
        and b.dtype.is_floating_point
        and a.dim() == b.dim()
        and all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True))
    )


def mixes_copies(base: fx.Node, term: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether a term is its base with copies mixed by a matrix that is computed from it, without a projection."""
    node: fx.Node | None = term
    mixed = False
    for _ in range(12):
        if node is base or node is None:
            break
        mixed |= has(node, Trait.PRODUCT) and any(operand in inside for operand in node.all_input_nodes)
        node = _carried_from(node, term)
    return node is base and mixed


def _carried_from(node: fx.Node, total: fx.Node) -> fx.Node | None:
    """Return the operand that an operator scales, moves or mixes the copies of, on the way to a sum."""
    if has(node, Trait.RESHAPE | Trait.REORDER | Trait.CAST | Trait.IDENTITY):
        return node.all_input_nodes[0]
    if is_operator(node, "aten.linear"):
        # over another dimension than that of the channels, which a permutation brought to the end
        channels, (rows, columns) = total.meta["val"].shape[-1], node.args[1].meta["val"].shape  # type: ignore[union-attr]
        return node.all_input_nodes[0] if rows == columns != channels else None
    if not (is_operator(node, "aten.mul", "aten.div") or has(node, Trait.PRODUCT)):
        return None
    size = sorted(str(s) for s in node.meta["val"].shape)
    alike = [
        operand
        for operand in node.all_input_nodes
        if isinstance(operand.meta.get("val"), torch.Tensor)
        and sorted(str(s) for s in operand.meta["val"].shape) == size
    ]
    return alike[0] if len(alike) == 1 else None


def _operands(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.args if isinstance(operand, fx.Node)]


def between(base: fx.Node, term: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """Return the nodes on paths from ``base`` to ``term``, in order, without ``base``; possibly none."""
    limit = order[base]
    seen: set[fx.Node] = set()
    work = [term]
    reached = False
    while work:
        node = work.pop()
        if node is base:
            reached = True
            continue
        if node in seen or order[node] < limit:
            continue
        seen.add(node)
        work.extend(node.all_input_nodes)
    if not reached:
        return []
    descending = {base}
    nodes: list[fx.Node] = []
    for node in sorted(seen, key=lambda n: order[n]):
        if any(source in descending for source in node.all_input_nodes):
            descending.add(node)
            nodes.append(node)
    return nodes
