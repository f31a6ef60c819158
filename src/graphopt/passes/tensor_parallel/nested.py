"""Sharding feed-forwards with several widths: each rank has a share of every range of channels between two widths."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.program import Program
from ...ir.ranks.placement import Shard
from ...ir.schema import arguments, normal_call
from ..framework.plan import Site
from ..shared.cutting import Cutter, all_reduce, even

aten = torch.ops.aten


def nested_site(block: Block, ranks: int) -> Site | str:
    """Return the site of a feed-forward with several widths, or why it is not sharded."""
    for core in _cores(block):
        args = arguments(core)
        uneven = [w for w in args["widths"] if w % ranks]
        if uneven:
            return f"its width of {uneven[0]} does not divide over {ranks} ranks"
        if args["down_bias"] is not None and min(args["widths"]) == 0:
            return "tokens that skip it skip its bias as well"
    return Site(block.name, width=int(block.sizes["width"]) // ranks)


def _cores(block: Block) -> list[fx.Node]:
    return [block.parts[name] for name in ("core", "other_core") if name in block.parts]


def cut_nested(program: Program, cutter: Cutter, block: Block, ranks: int) -> None:
    """Shard it so that all ranks shrink equally if a token uses less than the full width."""
    call = program.edit.call
    for core in _cores(block):
        operands = dict(arguments(core))
        bias, operands["down_bias"] = operands["down_bias"], None
        with program.edit.before(core):
            for name in ("up", "gate", "up_bias", "gate_bias", "down"):
                if operands[name] is not None:
                    dim = 1 if name == "down" else 0
                    operands[name] = _shares(program, cutter, operands[name], dim, operands["widths"], ranks)
            operands["widths"] = [w // ranks for w in operands["widths"]]
            args, kwargs = normal_call(core.target, operands)
            total = all_reduce(program, call(core.target, *args, **kwargs))
            if bias is not None:
                total = call(aten.add.Tensor, total, bias)
        program.edit.replace(core, total)


def _shares(
    program: Program, cutter: Cutter, tensor: fx.Node, dim: int, widths: list[int], ranks: int
) -> fx.Node:
    """Return a rank's share of each range between two widths, in order."""
    ends = sorted({int(w) for w in widths} - {0})
    shares = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        is_complete = first == 0 and end == int(tensor.meta["val"].shape[dim])
        piece = tensor if is_complete else program.edit.call(aten.slice.Tensor, tensor, dim, first, end)
        shard = even(end - first, ranks, dim)
        shares.append(cutter.part(piece, Shard(dim, shard.starts, shard.length, shard.total)))
    return shares[0] if len(shares) == 1 else program.edit.call(aten.cat.default, shares, dim)


__all__ = ["cut_nested", "nested_site"]
