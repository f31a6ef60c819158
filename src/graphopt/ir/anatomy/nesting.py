"""Residual additions inside one another: which lie within which, and which are left out since they cross."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from ..operators.traits import Trait, has
from .residual import Addition


@dataclass
class Nesting:
    """Additions of which any two are disjoint or one lies within the other.

    Attributes:
        additions: in execution order; those within another come before it.
        outer: the addition that each lies directly within.
        owner: the innermost addition of every value: of what is computed between its base and its terms, and of its sum.
            Values that several compute from alike, such as a norm that they share, are the first one's.
    """

    additions: list[Addition]
    outer: dict[Addition, Addition] = field(default_factory=dict)
    owner: dict[fx.Node, Addition] = field(default_factory=dict)

    @cached_property
    def within(self) -> dict[Addition, list[Addition]]:
        """The additions directly within each that contains others, in execution order."""
        within: dict[Addition, list[Addition]] = {}
        for addition in self.additions:
            if addition in self.outer:
                within.setdefault(self.outer[addition], []).append(addition)
        return within


def nest(additions: list[Addition]) -> Nesting:
    """Return the nesting of additions.

    An addition joins two ways from its base, one directly and one through what it adds, so its region has one entry
    and one exit unless the direct way of another begins within it and ends beyond it, or the reverse. Of two
    that cross in this manner, the one goes that crosses more; then the larger, then the later.
    """
    kept = list(additions)
    crossings = _crossings(kept)
    while crossings:
        position = {addition: i for i, addition in enumerate(kept)}
        worst = max(crossings, key=lambda a: (len(crossings[a]), len(a.region), position[a]))
        for other in crossings.pop(worst):
            crossings[other].discard(worst)
            if not crossings[other]:
                del crossings[other]
        kept.remove(worst)
    nesting = _nested(kept)
    absorbed = [inner for inner in kept if _is_all_of_it(nesting, inner)]
    return nesting if not absorbed else _nested([a for a in kept if a not in absorbed])


def _regions_of(additions: list[Addition]) -> dict[fx.Node, list[Addition]]:
    """Return the additions in whose region each value lies."""
    regions: dict[fx.Node, list[Addition]] = {}
    for addition in additions:
        for node in addition.region:
            regions.setdefault(node, []).append(addition)
    return regions


def _crossings(additions: list[Addition]) -> dict[Addition, set[Addition]]:
    regions = _regions_of(additions)
    crossings: dict[Addition, set[Addition]] = {}
    for addition in additions:
        for other in {*regions.get(addition.base, ()), *regions.get(addition.node, ())}:
            if other is not addition and not _lies_within(addition, other):
                crossings.setdefault(addition, set()).add(other)
                crossings.setdefault(other, set()).add(addition)
    return crossings


def _lies_within(inner: Addition, outer: Addition) -> bool:
    begins = inner.base in outer.region or inner.base is outer.base
    return begins and (inner.node in outer.region or inner.node is outer.node)


def _nested(additions: list[Addition]) -> Nesting:
    regions = _regions_of(additions)
    nesting = Nesting(additions)
    first = {addition: i for i, addition in enumerate(additions)}
    for addition in additions:
        around = {*regions.get(addition.base, ()), *regions.get(addition.node, ())}
        around |= {a for a in additions if a.node is addition.node} if addition.repeated else set()
        around = {a for a in around if a is not addition and _lies_within(addition, a)}
        around = {a for a in around if len(a.region) > len(addition.region)}
        if around:
            nesting.outer[addition] = min(around, key=lambda a: (len(a.region), first[a]))
    depth: dict[Addition, int] = {}
    for addition in reversed(additions):
        outer = nesting.outer.get(addition)
        depth[addition] = 0 if outer is None else depth[outer] + 1
    for node, around_node in regions.items():
        deepest = max(depth[a] for a in around_node)
        nesting.owner[node] = next(a for a in around_node if depth[a] == deepest)
    for addition in additions:
        if addition.node not in nesting.owner or depth[nesting.owner[addition.node]] < depth[addition]:
            nesting.owner[addition.node] = addition
    return nesting


def _is_all_of_it(nesting: Nesting, inner: Addition) -> bool:
    """Tell whether a contribution is nothing but an addition within it, after a norm or none: ``x + (h + f(h))``."""
    outer = nesting.outer.get(inner)
    if outer is None or inner.repeated:
        return False
    terms = [t for t in outer.terms if inner.node is t or inner.node in outer.inside[t]]
    if len(terms) != 1:
        return False
    rest = set(outer.inside[terms[0]]) - inner.region - {inner.node}
    return not any(has(n, Trait.MIXING) for n in rest)
