"""Embeddings and heads: the operators before and after the residual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..operators.traits import Trait, has
from ..schema import is_operator
from .blocks import Anatomy

if TYPE_CHECKING:
    from ..program import Program


def find_embedding(program: Program, anatomy: Anatomy) -> list[fx.Node]:
    """Return the operators that embed inputs into a stream: table lookups, patch convolutions, projections."""
    starts = [stream.start for stream in anatomy.streams]
    operators: dict[fx.Node, None] = {}
    work, seen = list(starts), set()
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if has(node, Trait.CONVOLUTION) or is_operator(node, "aten.embedding", "aten.linear"):
            operators[node] = None
            if is_operator(node, "aten.embedding"):
                continue
        work.extend(node.all_input_nodes)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(operators, key=lambda n: order[n])


def find_head(program: Program, anatomy: Anatomy) -> list[fx.Node]:
    """Return the linears between the last value of a stream and the outputs."""
    inside = {node for block in anatomy.blocks for node in block.nodes}
    ends = {stream.blocks[-1].writes for stream in anatomy.streams if stream.blocks}
    ends |= {block.add for block in anatomy.blocks}
    linears: dict[fx.Node, None] = {}
    work, seen = list(program.output_node.all_input_nodes), set()
    while work:
        node = work.pop()
        if node in seen or node in ends or node in inside:
            continue
        seen.add(node)
        if is_operator(node, "aten.linear"):
            linears[node] = None
        work.extend(node.all_input_nodes)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(linears, key=lambda n: order[n])
