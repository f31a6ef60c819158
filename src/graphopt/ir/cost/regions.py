"""Which part of a program an operator belongs to: a block of its anatomy, embedding, head, or other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from ..program import Program

EMBEDDING, HEAD, OTHER = "embedding", "head", "other"


def regions(program: Program) -> dict[fx.Node, str]:
    """Return the region of every node: the name of a block, ``embedding``, ``head`` or ``other``.

    A block includes its addition to the stream, and whatever only it reads, such as the keys and values of
    cross-attention. The embedding computes the start of a stream; the head follows the streams;
    masks and rotary tables that several blocks share are ``other``.
    """
    region_of: dict[fx.Node, str] = program.derived("cost_regions", lambda: _find(program))
    return region_of


def _find(program: Program) -> dict[fx.Node, str]:
    anatomy = program.anatomy
    region_of: dict[fx.Node, str] = {}
    for block in anatomy.blocks:
        for node in block.nodes:
            region_of.setdefault(node, block.name)
    for block in anatomy.blocks:
        region_of.setdefault(block.add, block.name)
        region_of.setdefault(block.writes, block.name)
    nodes = list(program.graph.nodes)
    before = {stream.start for stream in anatomy.streams}
    feeds: set[fx.Node] = set()
    for node in reversed(nodes):
        users = list(node.users)
        if any(user in before for user in users):
            before.add(node)
        if any(user in region_of or user in feeds for user in users):
            feeds.add(node)
    blocks = set(region_of)
    after: set[fx.Node] = set()
    for node in nodes:
        if any(source in blocks or source in after for source in node.all_input_nodes):
            after.add(node)
    for node in reversed(nodes):
        if node in region_of:
            continue
        if node in before:
            region_of[node] = EMBEDDING
        elif node in after and node not in feeds:
            region_of[node] = HEAD
        else:
            readers = {region_of[user] for user in node.users}
            region_of[node] = readers.pop() if len(readers) == 1 else OTHER
    return region_of
