"""Anatomy: the structure of a model, derived from dataflow and never from names of classes or parameters."""

from __future__ import annotations

from ..program import Program, program_method
from ..running.evaluate import needed_for
from .blocks import Anatomy, Block, Branches, Layer, Stream
from .branches import find_branches
from .ends import find_embedding, find_head
from .kinds import classify, mixtures_beside
from .layers import group_layers
from .residual import find_residual

__all__ = ["Anatomy", "Block", "Branches", "Layer", "Stream", "find_anatomy"]


@program_method("anatomy")
def find_anatomy(program: Program) -> Anatomy:
    """Return the anatomy of a canonical graph; linear in its size."""
    anatomy = Anatomy()
    residual = find_residual(program)
    anatomy.branches = find_branches(program, {add.node for add in residual.additions})
    linear_sums = {group.writes for group in anatomy.branches}
    for addition in residual.additions:
        if addition.node in linear_sums:
            continue
        for block in classify(program, addition):
            anatomy.blocks.append(block)
    anatomy.beside = mixtures_beside(program, anatomy.blocks)
    counts: dict[str, int] = {}
    for block in (*anatomy.blocks, *anatomy.beside):
        block.index = counts.get(block.kind, 0)
        counts[block.kind] = block.index + 1
    anatomy.streams = [part for s in residual.streams(anatomy.blocks) for part in _by_output(program, s)]
    anatomy.layers = [layer for stream in anatomy.streams for layer in group_layers(stream)]
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
