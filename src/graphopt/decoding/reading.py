"""Outputs at some of a step's tokens alone: of a prompt the last token's logits are read, and a head is much of the work.

What follows from a token's own values only (heads, norms, the last layer's feed-forward) is computed for tokens that are
read; what other tokens attend to, for all. Where the one becomes the other is found in the graph by where the entries of
each dimension come from, so no head has to be recognised.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from ..ir.operators.traits import Trait, has
from ..ir.ranks.dimensions import sources_of
from ..ir.running.evaluate import needed_for
from ..ir.schema import arguments
from ..ir.sizes import expression
from .step import Step


def rows_read(step: Step, value: torch.Tensor) -> torch.Tensor:
    """Return the entries of the tokens that are read, of (batch, tokens, ...); all if the step names none."""
    if step.read is None:
        return value
    rows = torch.arange(step.read.shape[0], device=value.device)[:, None]
    return value[rows, step.read]


def tokens_read(step: Step, count: int) -> int:
    """Return the number of tokens that are read, in place of the number of all."""
    return count if step.read is None else step.read.shape[1]


def read_late(
    graph: fx.Graph, step: fx.Node, tokens: torch.Tensor, roots: Sequence[fx.Node],
    whole: Collection[fx.Node], supplied: Collection[fx.Node], early: bool = True,
) -> list[fx.Node]:  # fmt: skip
    """Compute roots for the tokens that a step reads, and what only they need as well.

    Args:
        graph: is changed.
        step: its placeholder.
        tokens: (batch, tokens), the shape of what the program reads.
        roots: values that are read; those of other shapes than (batch, tokens, ...) are computed as they are.
        whole: nodes that are computed for all tokens.
        supplied: values that are given, for all tokens.
        early: leave out tokens as early as can be; else at the roots, which cuts nothing in two.

    Returns:
        What takes the place of each root.
    """
    shape = (expression(tokens.shape[0]), expression(tokens.shape[1]))
    needed = needed_for([*roots, *whole], dict.fromkeys(supplied))
    full = {n for n in [*whole, *roots] if n in whole or not _by_token(n, shape)}
    # of each node that is computed for some tokens, the operands of which only these entries are read
    follows: dict[fx.Node, set[fx.Node]] = {}
    wanted = {n for n in roots if n not in full}
    for node in reversed(graph.nodes):
        if node not in needed or (node not in full and node not in wanted):
            continue
        alone = early and node not in full and node not in supplied
        operands = _operands(node, shape) if alone else None
        if operands is None:
            full.add(node)
            if node not in supplied:
                full.update(node.all_input_nodes)
            continue
        follows[node] = operands
        wanted |= operands
        full.update(n for n in node.all_input_nodes if n not in operands)
    taken: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n in wanted and n in full]:
        with graph.inserting_after(node):
            taken[node] = graph.call_function(rows_read, (step, node))
        taken[node].meta = {k: v for k, v in node.meta.items() if k != "input"}
    counts: dict[fx.Node, fx.Node] = {}
    for node, operands in follows.items():
        for count in [n for n in node.all_input_nodes if _is_size(n, shape[1])]:
            if count not in counts:
                with graph.inserting_after(count):
                    counts[count] = graph.call_function(tokens_read, (step, count))
                counts[count].meta = dict(count.meta)
            node.replace_input_with(count, counts[count])
        for operand in operands & taken.keys():
            node.replace_input_with(operand, taken[operand])
    return [taken.get(n, n) for n in roots]


def _by_token(node: fx.Node, shape: tuple[Any, Any]) -> bool:
    """Tell whether a value is (batch, tokens, ...)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    return (expression(value.shape[0]), expression(value.shape[1])) == shape


def _is_size(node: fx.Node, size: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and bool(expression(value) == size)


def _operands(node: fx.Node, shape: tuple[Any, Any]) -> set[fx.Node] | None:
    """Return the operands of which a token's result reads that token's entries alone; None if others may matter."""
    if node.op != "call_function" or not _by_token(node, shape) or has(node, Trait.RANDOM):
        return None
    if not shape[1].free_symbols:
        return None  # a number in a shape may be that of the tokens
    sized = has(node, Trait.RESHAPE | Trait.REPEAT | Trait.NEW)
    for size in node.all_input_nodes:
        value = size.meta.get("val")
        counts = isinstance(value, torch.SymInt) and shape[1].free_symbols & expression(value).free_symbols
        # of numbers computed from that of the tokens, only the size of a result has another in its place
        if counts and not (sized and _is_size(size, shape[1])):
            return None
    if has(node, Trait.RESHAPE):
        source = arguments(node)["self"]
        return {source} if _by_token(source, shape) else None
    sources = sources_of(node, 1)
    if sources is None:
        return None
    followed = {n for n, along in sources.items() if along is not None}
    for operand in followed:
        along = sources[operand]
        assert along is not None
        if (along.dim, along.divisor, along.factor) != (1, 1, 1) or not _by_token(operand, shape):
            return None
    return followed
