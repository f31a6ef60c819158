"""Heads in another order, from the last projection of an attention back to the weights that make them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from .cutting import Cutter
from .weight_mapping import follow

aten = torch.ops.aten


@dataclass(frozen=True)
class Order:
    """Entries of a dimension in another order: entry i of the result is entry ``order[i]``."""

    dim: int
    order: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many there are; the size stays."""
        return len(self.order)

    def at(self, dim: int, factor: int = 1, divisor: int = 1) -> Order | None:
        """Return the same order on another dimension, each entry now ``factor / divisor`` entries; None if none."""
        if len(self.order) * factor % divisor:
            return None
        if factor >= divisor:
            if factor % divisor:
                return None
            each = factor // divisor
            return Order(dim, tuple(o * each + i for o in self.order for i in range(each)))
        if divisor % factor:
            return None
        each = divisor // factor
        starts = self.order[::each]
        whole = tuple(s + i for s in starts for i in range(each))
        if whole != self.order or any(s % each for s in starts):
            return None
        return Order(dim, tuple(s // each for s in starts))


@dataclass
class Reorderer(Cutter):
    """Makes values with entries in another order."""

    tables: dict[tuple[int, ...], fx.Node] = field(default_factory=dict)

    def is_all(self, cut: Any) -> bool:
        """Tell whether the order is the one that there is."""
        return bool(cut.order == tuple(range(len(cut.order))))

    def take(self, node: fx.Node, cut: Any) -> fx.Node:
        """Take the entries of a value one by one."""
        if cut.order not in self.tables:
            taken = {w.name for w in self.program.weights.values()}
            number = next(n for n in range(10**6) if f"order_of_heads.{n}" not in taken)
            self.tables[cut.order] = self.program.edit.add_weight(
                f"order_of_heads.{number}", torch.tensor(cut.order), kind="constant", persistent=False
            )
        return self.program.edit.call(aten.index_select.default, node, cut.dim, self.tables[cut.order])

    def mark(self, node: fx.Node, cut: Any) -> None:
        """An order shows in no shape and needs no mark."""

    def keys(self, cut: Any, key_value_heads: int) -> Any:
        """Return the order of key-value heads: whole groups of queries move with theirs."""
        group = len(cut.order) // key_value_heads
        moved = cut.at(1, 1, group)
        return moved if moved is not None else "queries of one key-value head would be torn apart"


def reorder_heads(program: Program, block: Block, units: list[int]) -> None:
    """Put the heads of an attention into another order; what it computes stays the same.

    Args:
        program: is changed.
        block: an attention with a linear that reads its heads.
        units: new order of its key-value heads, each with the queries that share it.

    Raises:
        ValueError: the heads cannot be followed back to weights.
    """
    out = block.parts["o"]
    found = arguments(out)
    width = int(found["weight"].meta["val"].shape[1])
    each = width // len(units)
    last = found["input"].meta["val"].dim() - 1
    order = Order(last, tuple(u * each + i for u in units for i in range(each)))
    reorderer = Reorderer(program)
    with program.edit.before(out):
        x = reorderer.part(found["input"], order)
        columns = order.at(1)
        assert columns is not None
        weight = reorderer.part(found["weight"], columns)
        made = program.edit.call(out.target, x, weight, *out.args[2:], **out.kwargs)
    inside = set(block.nodes)
    stuck = [(node, reason) for node, reason in reorderer.whole if node in inside]
    if stuck:
        raise ValueError(f"{stuck[0][0].name}: {stuck[0][1]}")
    program.edit.replace(out, made)
    to_checkpoint(program, reorderer)


def to_checkpoint(program: Program, reorderer: Reorderer) -> None:
    """Let the checkpoint's tensors be the reordered ones, where nothing else reads them as they were."""
    taken = {
        node: made for (node, _), made in reorderer.made.items() if is_operator(made, "aten.index_select")
    }
    joined = {held: _joined(program, held, taken) for held in set(program.checkpoint.values())}
    follow(program, taken | {held: made for held, made in joined.items() if made is not None})


def _joined(program: Program, held: fx.Node, taken: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A tensor that is read in parts, each reordered: the parts, one after the other."""
    parts: list[tuple[int, int, fx.Node]] = []
    for user in held.users:
        if not is_operator(user, "aten.slice") or user not in taken or set(user.users) != {taken[user]}:
            return None
        found = arguments(user)
        size = int(held.meta["val"].shape[0])
        if found["dim"] != 0 or found["step"] != 1:
            return None
        end = size if found["end"] is None else min(found["end"], size)
        parts.append((found["start"] or 0, end, taken[user]))
    parts.sort(key=lambda part: part[0])
    edges = [0, *(end for _, end, _ in parts)]
    if (
        not parts
        or [start for start, _, _ in parts] != edges[:-1]
        or edges[-1] != int(held.meta["val"].shape[0])
    ):
        return None
    with program.edit.after(max(part for _, _, part in parts)):
        return program.edit.call(aten.cat.default, [part for _, _, part in parts], 0)
