"""Tables of rotary embeddings by position, evaluated from what a program computes for its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.facts import KVCache
from ...ir.program import Program
from ...ir.running.evaluate import evaluate
from ...ir.running.region import Region, cut
from ...ir.sizes import expression

MOST_BYTES = 1 << 27
"""Largest table that is written: beyond it, rows are computed for each token, as the program does."""


class NoTable(ValueError):
    """A value is no table by position; the message says why."""


def half_table(
    program: Program, node: fx.Node, positions: fx.Node, count: int, interleaved: bool
) -> torch.Tensor:
    """Return the distinct half of a cosine or sine at positions 0 to ``count - 1``, in the program's own arithmetic.

    Args:
        program: not changed.
        node: (batch, 1, tokens, size) or (batch, tokens, 1, size).
        positions: the input of positions, (batch, tokens).
        count: number of rows.
        interleaved: channels 2i and 2i + 1 are rotated together, else i and i + size / 2.

    Returns:
        (count, size / 2)

    Raises:
        NoTable: the value depends on more than each token's position, or the channels that are rotated together differ.
    """
    value = node.meta["val"]
    size = value.shape[-1]
    if value.dim() != 4 or not isinstance(size, int):
        raise NoTable("the rotation has another shape than one angle for each token and channel")
    if count * size * value.dtype.itemsize > MOST_BYTES:
        raise NoTable(f"a table of {count:,} positions would take more than {MOST_BYTES:,} bytes")
    region = cut(program, [node], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
    tensors = [n for n in region.leaves if isinstance(n.meta.get("val"), torch.Tensor)]
    if tensors != [positions]:
        raise NoTable("the rotation depends on more than positions")
    batch, tokens = positions.meta["val"].shape
    rows = batch if isinstance(batch, int) else 1
    length = tokens if isinstance(tokens, int) else -(-count // rows)

    def at(numbers: torch.Tensor, rows: int = rows, length: int = length, slots: int = count) -> torch.Tensor:
        """Return the value at each of some positions, computed in pieces of the size that the program takes."""
        pieces = []
        for piece in torch.split(numbers, rows * length):
            filled = torch.nn.functional.pad(piece, (0, rows * length - len(piece)))
            result = _run(program, region, positions, filled.reshape(rows, length), slots)
            if result.shape not in ((rows, 1, length, size), (rows, length, 1, size)):
                raise NoTable("the rotation is not the same for all heads")
            pieces.append(result.reshape(rows * length, size)[: len(piece)])
        return torch.cat(pieces)

    try:
        table = at(torch.arange(count))
        # a rotation may change with the longest position of a row, as that of long contexts does
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 4 * max(length, 1)]
        few = torch.cat([order[:3], torch.tensor([0, 1, 2, count // 2, count - 1]) % count])
        alone = {"length": 1} if not isinstance(tokens, int) else {}
        same = torch.equal(at(few, **alone), table[few])
        # nor may it change with the number of slots
        fewer = torch.arange(max(count // 2, 1))
        same = same and torch.equal(at(fewer, slots=len(fewer)), table[fewer])
        if not isinstance(batch, int) and not isinstance(tokens, int) and count > 1:
            pair = torch.tensor([0, count - 1, count // 2, count - 1, 0, 0])
            same = same and torch.equal(at(pair, rows=2, length=3), table[pair])
        elif isinstance(tokens, int):
            same = same and torch.equal(at(order), table[order])
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, NoTable):
            raise
        raise NoTable("the rotation cannot be computed for positions alone") from error
    if not same:
        raise NoTable("the rotation of a token depends on other tokens' positions")
    first, second = (table[:, ::2], table[:, 1::2]) if interleaved else table.chunk(2, dim=-1)
    if not torch.equal(first, second):
        raise NoTable("channels that are rotated together have different angles")
    return first.contiguous()


def _run(
    program: Program, region: Region, positions: fx.Node, values: torch.Tensor, slots: int
) -> torch.Tensor:
    capacity = program.facts[KVCache].capacity
    sizes = {symbol: slots for symbol, name in program.symbols.items() if name == capacity}
    sizes |= {
        expression(symbolic): int(number)
        for symbolic, number in zip(positions.meta["val"].shape, values.shape, strict=True)
        if isinstance(symbolic, torch.SymInt)
    }
    load: Callable[[str], torch.Tensor] = lambda name: program.weights[name].source.load()  # noqa: E731
    computed: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in region.graph.nodes:
            if node.op == "output":
                result: torch.Tensor = computed[node.args[0][0]]
                return result
            if node.op != "placeholder":
                computed[node] = evaluate(node, computed)
            elif node.name in program.weights:
                computed[node] = load(node.name)
            elif isinstance(node.meta["val"], torch.Tensor):
                computed[node] = values.to(node.meta["val"].dtype)
            else:
                size = expression(node.meta["val"]).subs(sizes)
                if not size.is_Integer:
                    raise NoTable("the rotation depends on other sizes")
                computed[node] = int(size)
    raise AssertionError("a region without an output")
