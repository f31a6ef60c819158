"""Anatomy: the structure of a model, derived from dataflow and never from names of classes or parameters."""

from __future__ import annotations

from ..program import Program, program_method
from ..running.evaluate import needed_for
from .blocks import Anatomy, Block, Branches, Layer, Stream
from .branches import find_branches
from .ends import find_embedding, find_head
from .kinds import classify, mixtures_beside
from .layers import find_layers
from .nesting import nest
from .residual import Addition, find_residual

__all__ = ["Anatomy", "Block", "Branches", "Layer", "Stream", "find_anatomy"]


@program_method("anatomy")
def find_anatomy(program: Program) -> Anatomy:
    """Return the anatomy of a canonical graph; linear in its size."""
    anatomy = Anatomy()
    residual = find_residual(program)
    anatomy.branches = find_branches(program, {add.node for add in residual.additions})
    linear_sums = {group.writes for group in anatomy.branches}
    nesting = nest([addition for addition in residual.additions if addition.node not in linear_sums])
    blocks: dict[Addition, list[Block]] = {}
    for addition in nesting.additions:
        inner = [block for within in nesting.within.get(addition, ()) for block in blocks[within]]
        blocks[addition] = classify(program, addition, nesting, inner)
        anatomy.blocks.extend(blocks[addition])
    anatomy.beside = mixtures_beside(program, anatomy.blocks)
    counts: dict[str, int] = {}
    for block in (*anatomy.blocks, *anatomy.beside):
        block.index = counts.get(block.kind, 0)
        counts[block.kind] = block.index + 1
    contained = {id(inner) for block in anatomy.blocks for inner in block.inner}
    outside = [block for block in anatomy.blocks if id(block) not in contained]
    streams = {
        id(block): [part for s in residual.streams(group) for part in _by_output(program, s)]
        for block, group in ((None, outside), *((b, b.inner) for b in anatomy.blocks if b.inner))
    }
    anatomy.streams = [stream for group in streams.values() for stream in group]
    anatomy.layers = find_layers(streams[id(None)], lambda block: streams.get(id(block), []))
    for index, layer in enumerate(anatomy.layers):
        layer.index = index
        for block in layer.blocks:
            block.layer = index
    anatomy.embedding = find_embedding(program, anatomy)
    anatomy.head = find_head(program, anatomy)
    return anatomy


def _by_output(program: Program, stream: Stream) -> list[Stream]:
    """Split a stream into the blocks that the first output depends on, and the others (attached heads)."""
    values = list(program.outputs.values())
    if len(values) < 2:
        return [stream]
    main_nodes = program.derived("first output", lambda: needed_for(values[:1], {}))
    main: list[Block] = []
    beside: list[Block] = []
    for block in stream.blocks:
        (main if block.add in main_nodes else beside).append(block)
    if not main or not beside:
        return [stream]
    return [Stream(stream.start, main), Stream(beside[0].reads, beside)]
