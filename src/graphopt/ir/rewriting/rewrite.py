"""The subgraph rewriter: pattern, replacement and condition are all written as functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from ..errors import UsageError
from ..infer import signature_of
from ..running.fold import depends_on_weights_alone
from .match import Match, Matcher, Miss, candidates
from .pattern import Call, Pattern, from_function
from .stamping import stamp
from .tracing import Trace, trace

if TYPE_CHECKING:
    from ..program import Program


@dataclass
class Rewrites:
    """The result of a rewrite: the new values, and the sites it refused, with reasons."""

    values: list[fx.Node] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)


class Rule:
    """A local rewrite: what is matched, under which condition, and what takes its place.

    Args:
        pattern: a function of tensors and plain values, or a :class:`~graphopt.ir.rewriting.pattern.Pattern`.
        replacement: a function of the same parameters, or of names that the pattern captures; see :func:`rewrite`.
        where: called with each match; returns True, or False or the reason to leave it alone.
    """

    def __init__(
        self,
        pattern: Callable[..., Any] | Pattern,
        replacement: Callable[..., Any],
        where: Callable[[Match], bool | str] | None = None,
    ):
        self.roots: list[Pattern] = [pattern] if isinstance(pattern, Pattern) else []
        self.names: list[str] | None = None
        if not isinstance(pattern, Pattern):
            self.roots, self.names = from_function(pattern)
        self.replacement, self.where = replacement, where
        self._matcher = Matcher(self.roots)

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the nodes whose operator could be the pattern's result, in execution order."""
        return candidates(program.graph, self.roots[0])

    def at(self, program: Program, node: fx.Node) -> Match | str:
        """Match the pattern's first result with a node; otherwise return why the rule does not apply there."""
        match = self._matcher.at(node)
        if isinstance(match, Miss):
            return match.reason
        answer = True if self.where is None else self.where(match)
        if answer is not True:
            return answer if isinstance(answer, str) else "where() said no"
        return _unsafe(program, match) or match

    def apply(
        self, program: Program, match: Match, traces: dict[Any, Trace] | None = None
    ) -> list[fx.Node] | str:
        """Put the replacement in the place of a match; return its values, or why there is no place for them.

        Args:
            program: edited in place.
            match: from :meth:`at`, in the program as it is.
            traces: of this rule, kept from one match to the next: equal shapes and types are recorded once.
        """
        anchor = _insertion_point(match)
        if isinstance(anchor, str):
            return anchor
        return _apply(program, match, self.replacement, self.names, anchor, {} if traces is None else traces)


def rewrite(
    program: Program,
    pattern: Callable[..., Any] | Pattern,
    replacement: Callable[..., Any],
    where: Callable[[Match], bool | str] | None = None,
) -> Rewrites:
    """Replace every occurrence of ``pattern`` by ``replacement``.

    Args:
        program: edited in place; ``program.copy()`` first keeps the original.
        pattern: a function of tensors and plain values, or a :class:`~graphopt.ir.rewriting.pattern.Pattern`. It is
            matched on operators with their arguments normalised, commutative operands in any order. Values
            inside it that something else reads are never rewritten.
        replacement: takes the same parameters (or names captured by the pattern) and returns as many
            tensors, of the same shapes and types. It is run once for each combination of shapes and types,
            on tensors without values: it must have no side effects, and must not branch on values or on
            sizes that vary.
        where: called with each match; returns True, or False or the reason to leave it alone.

    Returns:
        The new values, and for each near miss its node and reason.

    Raises:
        UsageError: the replacement cannot be recorded, see :func:`~graphopt.ir.rewriting.tracing.trace`.
        VerificationError: a replacement has another shape or type than what it replaces.
    """
    rule = Rule(pattern, replacement, where)
    result = Rewrites()
    traces: dict[Any, Trace] = {}
    for node in rule.candidates(program):
        if node._erased:
            continue
        match = rule.at(program, node)
        values = match if isinstance(match, str) else rule.apply(program, match, traces)
        if isinstance(values, str):
            result.refused.append((node.name, values))
        else:
            result.values.extend(values)
    return result


def _unsafe(program: Program, match: Match) -> str:
    from ..schema import is_mutable

    for node in match.inside:
        if is_mutable(node.target):
            return f"{node.name} writes in place"
    checkpoint_nodes = set(program.checkpoint.values())
    for node in match.inside:
        if node in checkpoint_nodes and node not in match.roots:
            return f"{node.name} is a tensor of the checkpoint"
    return ""


def _apply(
    program: Program,
    match: Match,
    replacement: Callable[..., Any],
    names: list[str] | None,
    anchor: fx.Node,
    traces: dict[Any, Trace],
) -> list[fx.Node]:
    import inspect

    parameters = names if names is not None else list(inspect.signature(replacement).parameters)
    missing = [name for name in parameters if name not in match.captured]
    if missing:
        raise UsageError(f"the replacement asks for {', '.join(missing)}, which the pattern does not capture")
    arguments = tuple(match.captured[name] for name in parameters)
    traced = _traced(program, replacement, arguments, traces)
    traced.require(program, match.roots, f"the pattern {len(match.roots)}")
    with program.edit.before(anchor):
        results = stamp(program.edit, traced, arguments)
    results = results if traced.several else [results]
    for old, new in zip(match.roots, results, strict=True):
        program.edit.replace(old, new)
    return list(results)


def _traced(
    program: Program, replacement: Callable[..., Any], arguments: tuple[Any, ...], traces: dict[Any, Trace]
) -> Trace:
    """Record a replacement, once for all arguments of the same shapes and types."""
    key = signature_of(arguments)
    if key is None:
        return trace(program, replacement, arguments)
    if key not in traces:
        traces[key] = trace(program, replacement, arguments)
    return traces[key]


def _insertion_point(match: Match) -> fx.Node | str:
    """Return the node to insert before, or why no position lies after what a match reads and before its readers."""
    last = max(match.roots)
    readers = [u for root in match.roots for u in root.users if u not in match.inside]
    if len(match.roots) == 1 or not readers or min(readers) > last:
        return last
    # insert before the first reader, after everything that the match reads
    first = min(readers)
    late: dict[fx.Node, None] = {}
    work = [v for v in match.captured.values() if isinstance(v, fx.Node) and v not in match.inside]
    while work:
        node = work.pop()
        if node in match.inside or node is first:
            return "one of its results is read before everything that it reads is computed"
        if node > first and node not in late:
            late[node] = None
            work.extend(node.all_input_nodes)
    for node in sorted(late):
        first.prepend(node)
    return first


__all__ = ["Call", "Match", "Rewrites", "Rule", "depends_on_weights_alone", "rewrite"]
