"""Dominators of directed acyclic graphs: through which values all paths to a value pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Vertex = TypeVar("Vertex", bound=Hashable)


def immediate_dominators(
    vertices: Sequence[Vertex], sources: Callable[[Vertex], Iterable[Vertex]]
) -> dict[Vertex, Vertex | None]:
    """Return the last vertex, other than itself, that all paths from the beginnings to a vertex pass.

    One sweep does, since the graph has no cycles (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001).

    Args:
        vertices: in topological order.
        sources: from which edges lead to a vertex; those that are not given vertices are ignored, and a vertex without any
            is a beginning.

    Returns:
        By vertex; None for beginnings, and where paths from several beginnings meet.
    """
    depth: dict[Vertex, int] = {}
    dominators: dict[Vertex, Vertex | None] = {}
    for vertex in vertices:
        before = [source for source in sources(vertex) if source in depth]
        nearest: Vertex | None = before[0] if before else None
        for source in before[1:]:
            nearest = _common(nearest, source, depth, dominators)
        dominators[vertex] = nearest
        depth[vertex] = 0 if nearest is None else depth[nearest] + 1
    return dominators


def _common(
    first: Vertex | None,
    second: Vertex | None,
    depth: dict[Vertex, int],
    dominators: dict[Vertex, Vertex | None],
) -> Vertex | None:
    while first is not None and second is not None and first != second:
        if depth[first] >= depth[second]:
            first = dominators[first]
        else:
            second = dominators[second]
    return first if first == second else None


def dominates(dominators: dict[Vertex, Vertex | None], first: Vertex, second: Vertex) -> bool:
    """Tell whether all paths to ``second`` pass ``first``; every vertex dominates itself."""
    current: Vertex | None = second
    while current is not None:
        if current == first:
            return True
        current = dominators[current]
    return False
