"""Dominators of drawn graphs, against the definition: every path passes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphopt.ir.anatomy.dominance import dominates, immediate_dominators

# the sources of each vertex, among the earlier ones
GRAPHS = st.integers(1, 9).flatmap(
    lambda count: st.tuples(*(st.sets(st.integers(0, max(i - 1, 0)), max_size=3) for i in range(count)))
)


def paths(vertex: int, sources: list[set[int]]) -> list[set[int]]:
    """Return the vertices of every path from a beginning to a vertex."""
    if not sources[vertex]:
        return [{vertex}]
    return [path | {vertex} for source in sources[vertex] for path in paths(source, sources)]


@given(GRAPHS)
def test_dominators_are_on_all_paths(drawn: tuple[set[int], ...]) -> None:
    sources = [{s for s in each if s < i} for i, each in enumerate(drawn)]
    found = immediate_dominators(range(len(sources)), lambda vertex: sources[vertex])
    for vertex in range(len(sources)):
        common = set.intersection(*paths(vertex, sources))
        assert {v for v in range(len(sources)) if dominates(found, v, vertex)} == common
        assert found[vertex] == max(common - {vertex}, default=None)


def test_sources_that_are_not_given_are_ignored() -> None:
    sources = {"a": [], "b": ["a", "mask"], "c": ["b", "a"]}
    assert immediate_dominators(["a", "b", "c"], lambda v: sources[v]) == {"a": None, "b": "a", "c": "a"}
