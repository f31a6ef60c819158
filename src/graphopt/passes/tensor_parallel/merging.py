"""Merging reductions whose results are added: parallel blocks, shared experts beside an MoE layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.schema import is_operator
from ..shared.cutting import all_reduce

_MOVING = Trait.RESHAPE | Trait.REORDER


def merge_sums(program: Program) -> int:
    """Reduce values that are added together at once; return how many reductions that saves."""
    saved = 0
    inner: set[fx.Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if (
            node in inner
            or node._erased
            or not is_operator(node, "aten.add")
            or node.kwargs
            or len(node.args) != 2
        ):
            continue
        leaves = _leaves(node, inner)
        chains = {leaf: partial_behind(leaf) for leaf in leaves}
        reduced = [leaf for leaf in leaves if chains[leaf] is not None]
        if len(reduced) < 2 or any(r.meta["val"].shape != node.meta["val"].shape for r in reduced):
            continue
        with program.edit.before(node):
            total = None
            for leaf in reduced:
                chain = chains[leaf]
                assert chain is not None
                term = apply_chain(program, *chain)
                total = term if total is None else program.edit.call(torch.ops.aten.add.Tensor, total, term)
            assert total is not None
            value = all_reduce(program, total)
            for other in (leaf for leaf in leaves if leaf not in reduced):
                value = program.edit.call(torch.ops.aten.add.Tensor, other, value)
        program.edit.replace(node, value)
        saved += len(reduced) - 1
    return saved


def _leaves(node: fx.Node, inner: set[fx.Node]) -> list[fx.Node]:
    leaves: list[fx.Node] = []
    for operand in node.args:
        nested = is_operator(operand, "aten.add") and not operand.kwargs and len(operand.users) == 1  # type: ignore[union-attr]
        if nested and all(isinstance(a, fx.Node) for a in operand.args):  # type: ignore[union-attr]
            assert isinstance(operand, fx.Node)
            inner.add(operand)
            leaves.extend(_leaves(operand, inner))
        else:
            assert isinstance(operand, (fx.Node, int, float))
            if not isinstance(operand, fx.Node):
                return []
            leaves.append(operand)
    return leaves


Step = tuple[fx.Node, int]


def partial_behind(leaf: fx.Node) -> tuple[fx.Node, list[Step]] | None:
    """Return the partial value behind a reduced one and the scalings and views in between; None if there is none.

    Each step is an operator and the index of its changing operand. Values that other nodes read too are not
    decomposed.
    """
    steps: list[Step] = []
    node = leaf
    while len(node.users) == 1:
        if is_operator(node, "graphopt.all_reduce"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return source, steps[::-1]
        index = _scaled(node)
        if index is None:
            return None
        steps.append((node, index))
        operand = node.args[index]
        assert isinstance(operand, fx.Node)
        node = operand
    return None


def _scaled(node: fx.Node) -> int | None:
    """Return the operand in which an operator is linear, if the other one is replicated."""
    if has(node, _MOVING) or is_operator(node, "aten.div"):
        return 0
    if is_operator(node, "aten.mul"):
        behind = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _reduced(a)]
        return behind[0] if len(behind) == 1 else None
    return None


def _reduced(node: Any) -> bool:
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if is_operator(node, "graphopt.all_reduce"):
            return True
        if not has(node, _MOVING) and not is_operator(node, "aten.mul", "aten.div"):
            return False
        node = node.args[0]
    return False


def apply_chain(program: Program, value: fx.Node, steps: list[Step]) -> fx.Node:
    """Apply the scalings and views of a chain to another value."""
    for node, operand in steps:
        args = list(node.args)
        args[operand] = value
        value = program.edit.call(node.target, *args, **node.kwargs)
    return value


__all__ = ["apply_chain", "merge_sums", "partial_behind"]
