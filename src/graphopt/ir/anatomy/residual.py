"""Residual streams: additions ``s + f(s)``, and the chains they form."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    "aten.relu", "aten.mul", "aten.add"
}  # fmt: skip


@dataclass(eq=False)
class Addition:
    """A sum on the stream: the stream's value before, the terms added, and the sum itself."""

    node: fx.Node
    base: fx.Node
    terms: list[fx.Node]
    inside: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)


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
    """Return the additions on residual streams, in execution order."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    constant = depends_on_weights_alone(program)
    inner: set[fx.Node] = set()
    additions: list[Addition] = []
    # outermost sums first, so that a sum of several branches is split once
    for node in reversed(list(program.graph.nodes)):
        if node in inner or not _is_sum(node, constant):
            continue
        leaves = _leaves(node, constant, inner)
        addition = _base(node, leaves, order)
        if addition is not None:
            additions.append(addition)
        else:
            inner.difference_update(_sums(node))
    additions.reverse()
    return Residual(additions, order)


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


def _leaves(node: fx.Node, constant: set[fx.Node], inner: set[fx.Node]) -> list[fx.Node]:
    """Return the terms of a sum; terms that are sums and have no other reader are split as well."""
    leaves: list[fx.Node] = []
    for operand in node.args:
        assert isinstance(operand, fx.Node)
        if _is_sum(operand, constant) and len(operand.users) == 1:
            inner.add(operand)
            leaves.extend(_leaves(operand, constant, inner))
        else:
            leaves.append(operand)
    return leaves


def _sums(node: fx.Node) -> set[fx.Node]:
    sums: set[fx.Node] = set()
    for operand in node.args:
        if is_operator(operand, "aten.add") and len(operand.users) == 1:  # type: ignore[union-attr]
            sums.add(operand)  # type: ignore[arg-type]
            sums |= _sums(operand)  # type: ignore[arg-type]
    return sums


def _base(node: fx.Node, leaves: list[fx.Node], order: dict[fx.Node, int]) -> Addition | None:
    """Return the addition if one leaf is an ancestor of the others, with mixing operators in between."""
    for base in sorted(leaves, key=lambda n: order[n]):
        terms = [leaf for leaf in leaves if leaf is not base]
        inside = {term: between(base, term, order) for term in terms}
        # without a mixing operator, x + f(x) is arithmetic and not a block
        mixing = [t for t in terms if any(has(n, Trait.MIXING) for n in inside[t])]
        if mixing and len(mixing) == len(terms):
            return Addition(node, base, sorted(terms, key=lambda n: order[n]), inside)
        if mixing and len(leaves) > 2:
            # terms from elsewhere (an embedding added again, another stream) are ignored
            return Addition(
                node, base, sorted(mixing, key=lambda n: order[n]), {t: inside[t] for t in mixing}
            )
    return None


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
