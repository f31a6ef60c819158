"""Removal of blocks and layers from the residual stream, including those obtained before an earlier edit."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import UsageError
from ..program import Program, program_method
from ..schema import operator_name
from .blocks import Block, Layer
from .rows import shaped_like


@program_method("remove")
def remove(program: Program, block: Block | Layer) -> None:
    """Remove a block or a layer, so that the stream bypasses it.

    Raises:
        UsageError: it is not part of the program, or no longer.
    """
    blocks = [present(program, b) for b in (block.outermost if isinstance(block, Layer) else [block])]
    if len(blocks) > 1 or _is_all_of_its_addition(blocks[0]):
        writes = blocks[-1].writes
        with program.edit.before(writes):
            stream = shaped_like(program, blocks[0].reads, writes)
        program.bypass(writes, with_=stream)
        return
    (block,) = blocks
    terms = set(block.terms)
    summands = [leaf for leaf in _summands(block.add, terms) if leaf not in terms]
    with program.edit.before(block.add):
        total = summands[0]
        for term in summands[1:]:
            total = program.edit.call(torch.ops.aten.add.Tensor, total, term)
    program.edit.replace(block.add, total)


def _is_all_of_its_addition(block: Block) -> bool:
    """Tell whether the addition adds nothing to the stream but this block's terms."""
    terms = set(block.terms)
    leaves = _summands(block.add, terms | {block.reads})
    others = [leaf for leaf in leaves if leaf not in terms and leaf is not block.reads]
    return not block.parallel and (not others or not terms <= set(leaves))


def present(program: Program, block: Block) -> Block:
    """Return the current version of a block, since edits may have changed what it reads and writes.

    Raises:
        UsageError: it is not part of the program, or no longer.
    """
    if block.add.graph is not program.graph:
        raise UsageError(
            f"{block.name} is a block of another program", hint="use the blocks of the copy: copy.anatomy"
        )
    ends = (block.reads, block.writes, block.add, *block.terms)
    inside = (block.add, *block.nodes)
    if not any(n._erased for n in ends) and any(block.reads in n.all_input_nodes for n in inside):
        return block
    blocks = program.anatomy.blocks
    for candidate in blocks:
        if any(term in block.terms and not term._erased for term in candidate.terms):
            return candidate
    for candidate in blocks:
        if candidate.add is block.add and not candidate.parallel and not block.parallel:
            return candidate
    raise UsageError(
        f"{block.name} is no longer part of the program: an edit removed or replaced it",
        hint="read program.anatomy again after an edit",
    )


def _summands(node: fx.Node, terms: set[fx.Node]) -> list[fx.Node]:
    summands: list[fx.Node] = []
    for operand in node.all_input_nodes:
        nested = (
            operator_name(operand.target) == "aten.add" and len(operand.users) == 1 and operand not in terms
        )
        summands.extend(_summands(operand, terms) if nested else [operand])
    return summands
