"""Outputs at some of a step's tokens alone: of a prompt the last token's logits are read, and a head is much of the work.

What follows from a token's own values only (heads, norms, the last layer's feed-forward) is computed for tokens that are
read; what other tokens attend to, for all. Where the one becomes the other is found in the graph by where the entries of
each dimension come from, so no head has to be recognised. Where upper layers read the cache of a lower one, what they
attend with is needed for tokens that are read alone too: a prompt ends in the middle of the model (YOCO, arXiv 2405.05254).
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
from .step import Step, attend, attend_where_read


def rows_read(step: Step, value: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return the entries of the tokens that are read, which lie along a dimension; all if the step names none."""
    if step.read is None:
        return value
    rows = torch.arange(step.read.shape[0], device=value.device)[:, None]
    return value.movedim(dim, 1)[rows, step.read].movedim(1, dim)


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
    full = {n for n in [*whole, *roots] if n in whole or not _by_token(n, 1, shape)}
    # of each node that is computed for some tokens, the operands of which only these entries are read, and along which
    # dimension of theirs
    follows: dict[fx.Node, dict[fx.Node, int]] = {}
    wanted: dict[fx.Node, set[int]] = {n: {1} for n in roots if n not in full}
    for node in reversed(graph.nodes):
        dims = wanted.get(node, set())
        if node not in needed or (node not in full and not dims):
            continue
        alone = early and node not in full and node not in supplied and len(dims) == 1
        operands = _operands(node, next(iter(dims)), shape) if alone else None
        if operands is None:
            full.add(node)
            if node not in supplied:
                full.update(node.all_input_nodes)
            continue
        follows[node] = operands
        for operand, dim in operands.items():
            wanted.setdefault(operand, set()).add(dim)
        full.update(n for n in node.all_input_nodes if n not in operands)
        if node.target is attend:
            node.target = attend_where_read
    taken: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in [n for n in graph.nodes if n in wanted and n in full]:
        for dim in sorted(wanted[node]):
            with graph.inserting_after(node):
                call = graph.call_function(rows_read, (step, node, dim))
            call.meta = {k: v for k, v in node.meta.items() if k != "input"}
            taken[node, dim] = call
    counts: dict[fx.Node, fx.Node] = {}
    for node, operands in follows.items():
        for count in [n for n in node.all_input_nodes if _is_size(n, shape[1])]:
            if count not in counts:
                with graph.inserting_after(count):
                    counts[count] = graph.call_function(tokens_read, (step, count))
                counts[count].meta = dict(count.meta)
            node.replace_input_with(count, counts[count])
        for operand, dim in operands.items():
            if (operand, dim) in taken:
                node.replace_input_with(operand, taken[operand, dim])
    return [taken.get((n, 1), n) for n in roots]


def _by_token(node: fx.Node, dim: int, shape: tuple[Any, Any]) -> bool:
    """Tell whether a value has the batch first, and the tokens along a dimension."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() <= dim:
        return False
    return (expression(value.shape[0]), expression(value.shape[dim])) == shape


def _is_size(node: fx.Node, size: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and bool(expression(value) == size)


def _operands(node: fx.Node, dim: int, shape: tuple[Any, Any]) -> dict[fx.Node, int] | None:
    """Return the operands of which a token's result reads that token's entries alone, and the dimension of tokens.

    None if other entries may matter.
    """
    if node.op != "call_function" or not _by_token(node, dim, shape) or has(node, Trait.RANDOM):
        return None
    if not shape[1].free_symbols:
        return None  # a number in a shape may be that of the tokens
    if node.target is attend:
        _, query, _, _, bias, *_ = node.args
        # keys, values and sinks are read whole; a bias is of all tokens
        return {query: 2} if dim == 2 and bias is None and isinstance(query, fx.Node) else None
    sized = has(node, Trait.RESHAPE | Trait.REPEAT | Trait.NEW)
    for size in node.all_input_nodes:
        value = size.meta.get("val")
        counts = isinstance(value, torch.SymInt) and shape[1].free_symbols & expression(value).free_symbols
        # of numbers computed from that of the tokens, only the size of a result has another in its place
        if counts and not (sized and _is_size(size, shape[1])):
            return None
    if has(node, Trait.RESHAPE):
        source = arguments(node)["self"]
        return {source: 1} if dim == 1 and _by_token(source, 1, shape) else None
    sources = sources_of(node, dim)
    if sources is None:
        return None
    followed: dict[fx.Node, int] = {}
    for operand, along in sources.items():
        if along is None:
            continue
        if (
            (along.divisor, along.factor) != (1, 1)
            or not _by_token(operand, along.dim, shape)
            or not along.dim
        ):
            return None
        followed[operand] = along.dim
    return followed
