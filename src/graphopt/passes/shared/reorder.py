"""Reordering heads, from the last projection of an attention back to the weights that produce them."""

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
        """Number of entries; the size does not change."""
        return len(self.order)

    def at(self, dim: int, factor: int = 1, divisor: int = 1) -> Order | None:
        """Return the same order on another dimension, where each entry is ``factor / divisor`` entries; None if none."""
        if len(self.order) * factor % divisor:
            return None
        if factor >= divisor:
            if factor % divisor:
                return None
            entries = factor // divisor
            return Order(dim, tuple(o * entries + i for o in self.order for i in range(entries)))
        if divisor % factor:
            return None
        entries = divisor // factor
        starts = self.order[::entries]
        expanded = tuple(s + i for s in starts for i in range(entries))
        if expanded != self.order or any(s % entries for s in starts):
            return None
        return Order(dim, tuple(s // entries for s in starts))


@dataclass
class Reorderer(Cutter):
    """Creates values with entries in another order."""

    tables: dict[tuple[int, ...], fx.Node] = field(default_factory=dict)

    def is_all(self, cut: Any) -> bool:
        """Tell whether the order is the present one."""
        return bool(cut.order == tuple(range(len(cut.order))))

    def take(self, node: fx.Node, cut: Any) -> fx.Node:
        """Return the entries of a value in the new order, by index."""
        if cut.order not in self.tables:
            names = {w.name for w in self.program.weights.values()}
            number = next(n for n in range(10**6) if f"order_of_heads.{n}" not in names)
            self.tables[cut.order] = self.program.edit.add_weight(
                f"order_of_heads.{number}", torch.tensor(cut.order), kind="constant", persistent=False
            )
        return self.program.edit.call(aten.index_select.default, node, cut.dim, self.tables[cut.order])

    def mark(self, node: fx.Node, cut: Any) -> None:
        """Do nothing: an order changes no shape and needs no mark."""

    def keys(self, cut: Any, key_value_heads: int) -> Any:
        """Return the order of key-value heads, each of which moves with its whole group of queries; else the reason."""
        group = len(cut.order) // key_value_heads
        head_order = cut.at(1, 1, group)
        return head_order if head_order is not None else "queries of one key-value head would be separated"


def reorder_heads(program: Program, block: Block, units: list[int]) -> None:
    """Put the heads of an attention into another order without changing its output.

    Args:
        program: changed in place.
        block: an attention with a linear that reads its heads.
        units: new order of its key-value heads, each with the queries that share it.

    Raises:
        ValueError: the heads cannot be followed back to weights.
    """
    out = block.parts["o"]
    args = arguments(out)
    width = int(args["weight"].meta["val"].shape[1])
    head_width = width // len(units)
    last = args["input"].meta["val"].dim() - 1
    order = Order(last, tuple(u * head_width + i for u in units for i in range(head_width)))
    reorderer = Reorderer(program)
    with program.edit.before(out):
        x = reorderer.part(args["input"], order)
        columns = order.at(1)
        assert columns is not None
        weight = reorderer.part(args["weight"], columns)
        new_out = program.edit.call(out.target, x, weight, *out.args[2:], **out.kwargs)
    inside = set(block.nodes)
    stuck = [(node, reason) for node, reason in reorderer.in_full if node in inside]
    if stuck:
        raise ValueError(f"{stuck[0][0].name}: {stuck[0][1]}")
    program.edit.replace(out, new_out)
    to_checkpoint(program, reorderer)


def to_checkpoint(program: Program, reorderer: Reorderer) -> None:
    """Map the checkpoint's tensors to the reordered ones, where nothing else reads the original ones."""
    reordered = {
        node: new_node
        for (node, _), new_node in reorderer.parts.items()
        if is_operator(new_node, "aten.index_select")
    }
    joined = {
        tensor: _joined_slices(program, tensor, reordered) for tensor in set(program.checkpoint.values())
    }
    follow(
        program, reordered | {tensor: new_node for tensor, new_node in joined.items() if new_node is not None}
    )


def _joined_slices(program: Program, tensor: fx.Node, reordered: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """Return the concatenation of a tensor's reordered slices, if it is read only in such slices; else None."""
    parts: list[tuple[int, int, fx.Node]] = []
    for user in tensor.users:
        if (
            not is_operator(user, "aten.slice")
            or user not in reordered
            or set(user.users) != {reordered[user]}
        ):
            return None
        args = arguments(user)
        size = int(tensor.meta["val"].shape[0])
        if args["dim"] != 0 or args["step"] != 1:
            return None
        end = size if args["end"] is None else min(args["end"], size)
        parts.append((args["start"] or 0, end, reordered[user]))
    parts.sort(key=lambda part: part[0])
    edges = [0, *(end for _, end, _ in parts)]
    if (
        not parts
        or [start for start, _, _ in parts] != edges[:-1]
        or edges[-1] != int(tensor.meta["val"].shape[0])
    ):
        return None
    with program.edit.after(max(part for _, _, part in parts)):
        return program.edit.call(aten.cat.default, [part for _, _, part in parts], 0)
