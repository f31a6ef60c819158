"""Pattern matching on the graph, in time linear in its size, with reasons for near misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..schema import arguments, operator_name
from .pattern import Call, Either, Exactly, Listed, Pattern, Wild


@dataclass(frozen=True)
class Miss:
    """Why a candidate did not match, and at which node."""

    reason: str
    node: fx.Node | None = None


@dataclass
class Match:
    """An occurrence of a pattern: the values of its names, and the nodes inside."""

    roots: tuple[fx.Node, ...]
    captured: dict[str, Any]
    inside: dict[fx.Node, Call]

    def __getitem__(self, name: str) -> Any:
        return self.captured[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a name, or the default where an alternative without it matched."""
        return self.captured.get(name, default)


@dataclass
class _State:
    captured: dict[str, Any]
    inside: dict[fx.Node, Call]

    def bound(self, name: str, value: Any) -> _State | None:
        if name in self.captured:
            return self if _same(self.captured[name], value) else None
        return _State({**self.captured, name: value}, self.inside)

    def entered(self, node: fx.Node, pattern: Call) -> _State:
        return _State(self.captured, {**self.inside, node: pattern})


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, fx.Node) or isinstance(second, fx.Node):
        return first is second
    return bool(first == second)


@dataclass
class Matcher:
    """Matches one pattern with one or several results."""

    roots: list[Pattern]
    _best: tuple[int, Miss | None] = (-1, None)

    def at(self, node: fx.Node) -> Match | Miss:
        """Return the match whose first result is ``node``, or the miss that got furthest."""
        self._best = (-1, None)
        for state in self._value(self.roots[0], node, _State({}, {})):
            for complete, roots in self._others(state, (node,), self.roots[1:]):
                leak = leaking(complete.inside, roots)
                if leak is None:
                    return Match(roots, complete.captured, complete.inside)
                self._fail(len(complete.inside), f"{leak.name} is read outside the match", leak)
        return self._best[1] or Miss("no match", node)

    def _fail(self, depth: int, reason: str, node: fx.Node | None) -> None:
        if depth > self._best[0]:
            self._best = (depth, Miss(reason, node))

    def _others(
        self, state: _State, roots: tuple[fx.Node, ...], remaining: list[Pattern]
    ) -> Iterator[tuple[_State, tuple[fx.Node, ...]]]:
        if not remaining:
            yield state, roots
            return
        for candidate in _readers(state, remaining[0]):
            if candidate not in roots:
                for after in self._value(remaining[0], candidate, state):
                    yield from self._others(after, (*roots, candidate), remaining[1:])

    def _value(self, pattern: Any, value: Any, state: _State) -> Iterator[_State]:
        if isinstance(pattern, Call):
            yield from self._call(pattern, value, state)
        elif isinstance(pattern, Wild):
            answer = True if pattern.where is None else pattern.where(value)
            if answer is True:
                after = state.bound(pattern.name, value)
                if after is not None:
                    yield after
                else:
                    bound = state.captured[pattern.name]
                    self._fail(len(state.inside), f"{pattern.name} would be {bound} and {value}", None)
            else:
                node = value if isinstance(value, fx.Node) else None
                self._fail(len(state.inside), answer or f"{pattern.name} does not qualify", node)
        elif isinstance(pattern, Either):
            for option in pattern.options:
                yield from self._value(option, value, state)
        elif isinstance(pattern, Listed):
            if isinstance(value, (list, tuple)) and len(value) == len(pattern.items):
                yield from self._all(list(zip(pattern.items, value, strict=True)), state)
        elif not isinstance(value, fx.Node):
            literal = pattern if isinstance(pattern, Exactly) else Exactly(pattern)
            if literal.matches(value):
                yield state
            else:
                self._fail(len(state.inside), f"{value!r} where {literal.value!r} was expected", None)

    def _all(self, pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        for after in self._value(pairs[0][0], pairs[0][1], state):
            yield from self._all(pairs[1:], after)

    def _call(self, pattern: Call, node: Any, state: _State) -> Iterator[_State]:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return
        name = operator_name(node.target)
        if name not in pattern.operators:
            self._fail(len(state.inside), f"{name} where {' or '.join(pattern.operators)} was expected", node)
            return
        if state.inside.get(node) is pattern:
            # a value that the pattern uses twice is matched once
            yield state
            return
        args = arguments(node)
        names = list(args)
        if len(pattern.positional) > len(names):
            return
        patterns = dict(zip(names, pattern.positional, strict=False)) | pattern.named
        if any(key not in args for key in patterns):
            return
        if not pattern.loose:
            extra = next((k for k in names if k not in patterns and not _is_default(node, k, args[k])), None)
            if extra is not None:
                self._fail(len(state.inside), f"{name} has {extra}={args[extra]}", node)
                return
        if pattern.where is not None:
            answer = pattern.where(node)
            if answer is not True:
                self._fail(len(state.inside), answer or f"{name} does not qualify", node)
                return
        inner = state.entered(node, pattern)
        if pattern.name:
            bound = inner.bound(pattern.name, node)
            if bound is None:
                return
            inner = bound
        orders = [patterns]
        if pattern.commutes() and args.get("alpha", 1) == 1:
            first, second = names[:2]
            orders.append({**patterns, first: patterns[second], second: patterns[first]})
        for order in orders:
            yield from self._all([(p, args[k]) for k, p in order.items()], inner)


# arguments that choose a backend and do not change the result
_BACKEND_ARGUMENTS = ("cudnn_enable", "cudnn_enabled")


def _is_default(node: fx.Node, name: str, value: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    if name in _BACKEND_ARGUMENTS:
        return True
    for argument in schema.arguments:
        if argument.name == name:
            return (
                argument.has_default_value()
                and not isinstance(value, fx.Node)
                and argument.default_value == value
            )
    return False


def leaking(inside: dict[fx.Node, Call], roots: tuple[fx.Node, ...]) -> fx.Node | None:
    """Return a node inside a match whose value is read outside it, if there is one."""
    for node, pattern in inside.items():
        if node in roots or pattern.shared:
            continue
        if any(user not in inside for user in node.users):
            return node
    return None


def _readers(state: _State, pattern: Pattern) -> list[fx.Node]:
    """Return candidates for a further result: nodes that read a captured value, within the pattern's depth."""
    certain = [state.captured.get(name) for name in pattern.names()]
    level = [v for v in certain if isinstance(v, fx.Node)]
    if level:
        # of several values that it reads, the one with the fewest readers leaves the fewest candidates
        level = [min(level, key=lambda node: len(node.users))]
    else:
        level = [v for v in state.captured.values() if isinstance(v, fx.Node)]
    seen: dict[fx.Node, None] = {}
    for _ in range(pattern.depth()):
        following: list[fx.Node] = []
        for node in level:
            for user in node.users:
                if user not in seen:
                    seen[user] = None
                    following.append(user)
        level = following
    return list(seen)


def find(graph: fx.Graph, *patterns: Pattern) -> Iterator[Match]:
    """Yield the matches of a pattern in execution order; the graph may be edited in between.

    Args:
        graph: searched by the operator of the first pattern.
        patterns: one per result.
    """
    matcher = Matcher(list(patterns))
    for node in candidates(graph, patterns[0]):
        if not node._erased:
            match = matcher.at(node)
            if isinstance(match, Match):
                yield match


def candidates(graph: fx.Graph, pattern: Pattern) -> list[fx.Node]:
    """Return the nodes whose operator is one that computes the pattern's result."""
    operators = _root_operators(pattern)
    return [n for n in graph.nodes if n.op == "call_function" and operator_name(n.target) in operators]


def _root_operators(pattern: Pattern) -> set[str]:
    if isinstance(pattern, Call):
        return set(pattern.operators)
    if isinstance(pattern, Either):
        return set().union(*(_root_operators(option) for option in pattern.options))
    return set()
