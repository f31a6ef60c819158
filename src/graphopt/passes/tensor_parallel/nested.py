"""Feed-forwards of several widths over ranks: each rank has a share of every range of channels between two widths."""

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
    """Return the site of a feed-forward with several widths, or why it is not cut."""
    for core in _cores(block):
        found = arguments(core)
        uneven = [w for w in found["widths"] if w % ranks]
        if uneven:
            return f"its width of {uneven[0]} does not divide over {ranks} ranks"
        if found["down_bias"] is not None and min(found["widths"]) == 0:
            return "tokens that skip it skip its bias as well"
    return Site(block.name, width=int(block.sizes["width"]) // ranks)


def _cores(block: Block) -> list[fx.Node]:
    return [block.parts[name] for name in ("core", "other_core") if name in block.parts]


def cut_nested(program: Program, cutter: Cutter, block: Block, ranks: int) -> None:
    """Cut it, so that all ranks shrink alike where a token gets less than the whole width."""
    call = program.edit.call
    for core in _cores(block):
        found = dict(arguments(core))
        bias, found["down_bias"] = found["down_bias"], None
        with program.edit.before(core):
            for name in ("up", "gate", "up_bias", "gate_bias", "down"):
                if found[name] is not None:
                    dim = 1 if name == "down" else 0
                    found[name] = _shares(program, cutter, found[name], dim, found["widths"], ranks)
            found["widths"] = [w // ranks for w in found["widths"]]
            args, kwargs = normal_call(core.target, found)
            total = all_reduce(program, call(core.target, *args, **kwargs))
            if bias is not None:
                total = call(aten.add.Tensor, total, bias)
        program.edit.replace(core, total)


def _shares(
    program: Program, cutter: Cutter, tensor: fx.Node, dim: int, widths: list[int], ranks: int
) -> fx.Node:
    """A rank's share of each range between two widths, one after the other."""
    ends = sorted({int(w) for w in widths} - {0})
    parts = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        whole = first == 0 and end == int(tensor.meta["val"].shape[dim])
        piece = tensor if whole else program.edit.call(aten.slice.Tensor, tensor, dim, first, end)
        cut = even(end - first, ranks, dim)
        parts.append(cutter.part(piece, Shard(dim, cut.starts, cut.length, cut.total)))
    return parts[0] if len(parts) == 1 else program.edit.call(aten.cat.default, parts, dim)


__all__ = ["cut_nested", "nested_site"]
