"""Selecting hidden channels of a feed-forward, from its last projection back to the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from ..shared.reorder import Order, Reorderer, to_checkpoint


@dataclass(frozen=True)
class Selection(Order):
    """Some entries of a dimension: entry i of the result is entry ``order[i]`` of ``total``."""

    total: int = 0

    def at(self, dim: int, factor: int = 1, divisor: int = 1) -> Selection | None:
        """Return the same selection on another dimension; None if it would split entries."""
        moved = super().at(dim, factor, divisor)
        if moved is None or self.total * factor % divisor:
            return None
        return Selection(dim, moved.order, self.total * factor // divisor)


class Taker(Reorderer):
    """Creates values with only the selected entries."""

    def is_all(self, cut: Selection) -> bool:
        """Tell whether all entries are selected in their present order."""
        return cut.order == tuple(range(cut.total))


def take_channels(program: Program, blocks: list[Block], chosen: dict[str, torch.Tensor]) -> None:
    """Keep only some hidden channels of feed-forwards, in the given order.

    Args:
        program: changed in place.
        blocks: feed-forwards, in graph order; those that share weights must be given together.
        chosen: the channels to keep, by block name.

    Raises:
        ValueError: a channel cannot be traced back to weights.
    """
    taker = Taker(program)
    for block in blocks:
        down = block.parts["down"]
        args = arguments(down)
        total = int(args["weight"].meta["val"].shape[1])
        last = args["input"].meta["val"].dim() - 1
        selection = Selection(last, tuple(int(i) for i in chosen[block.name]), total)
        before = len(taker.in_full)
        with program.edit.before(down):
            x = taker.part(args["input"], selection)
            columns = selection.at(1)
            assert columns is not None
            weight = taker.part(args["weight"], columns)
            new_down = program.edit.call(down.target, x, weight, *down.args[2:], **down.kwargs)
        inside = set(block.nodes)
        stuck = [(node, reason) for node, reason in taker.in_full[before:] if node in inside]
        if stuck:
            raise ValueError(f"{block.name}: {stuck[0][0].name}: {stuck[0][1]}")
        program.edit.replace(down, new_down)
    to_checkpoint(program, taker)


def tied(blocks: list[Block]) -> list[list[Block]]:
    """Return feed-forwards grouped by the weights of their last projection."""
    groups: dict[fx.Node, list[Block]] = {}
    for block in blocks:
        groups.setdefault(arguments(block.parts["down"])["weight"], []).append(block)
    return list(groups.values())


def refusal(block: Block) -> str:
    """Return why the hidden channels of a feed-forward cannot be chosen; an empty string if they can."""
    down = block.parts.get("down")
    if "core" in block.parts:
        return "it has several widths already; extract-width leaves one of them"
    if down is None or not is_operator(down, "aten.linear"):
        return "no linear reads its hidden channels"
    hidden = arguments(down)["input"]
    others = [u.name for u in hidden.users if u is not down]
    if others:
        return f"its hidden channels are read by {others[0]} as well"
    return ""
