"""Ranges of the values that ranks send on calibration data: moving averages of each feature's extremes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir import groups
from ...ir.facts import OwnRank
from ...ir.program import Program
from ...ir.ranks.rank_programs import rank_copies, ranks_of, runnable
from ...ir.running.execute import interpret
from ...ir.schema import arguments
from ...measure.metrics import Batch

if TYPE_CHECKING:
    from ...measure.context import Context

FLOOR = 1e-8


@dataclass
class Extremes:
    """Moving averages of the smallest and largest value of each feature, by rank.

    ``m <- (1 - rate) m + rate * min over a sequence``, likewise the largest; the first sequence sets them
    (arXiv 2411.07942; a rate of 0.01).
    """

    rate: float
    low: dict[int, torch.Tensor] = field(default_factory=dict)
    high: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, rank: int, sequence: torch.Tensor) -> None:
        """Count one sequence (positions, features)."""
        low, high = sequence.float().amin(0), sequence.float().amax(0)
        if rank in self.low:
            low = torch.lerp(self.low[rank], low, self.rate)
            high = torch.lerp(self.high[rank], high, self.rate)
        self.low[rank], self.high[rank] = low, high

    def largest(self, ranks: int) -> torch.Tensor:
        """Return max(|m|, |M|), (ranks, features)."""
        return torch.stack([torch.maximum(self.low[r].abs(), self.high[r].abs()) for r in range(ranks)])


def calibrate(
    program: Program, context: Context, sums: list[fx.Node], rate: float
) -> dict[str, torch.Tensor]:
    """Return the ranges of each rank's terms of each all-reduce, and of the results.

    Returns:
        By name of the all-reduce, the largest absolute values, (ranks, features); under ``<name>.sum`` those of the
        result, (features,).
    """
    ranks = ranks_of(program)
    running, copies = _running(program)
    watched: dict[fx.Node, list[tuple[str, int]]] = {}
    extremes: dict[str, Extremes] = {}
    for node in sums:
        for rank, copy in enumerate(copies(arguments(node)["x"])):
            watched.setdefault(copy, []).append((node.name, rank))
        watched.setdefault(copies(node)[0], []).append((f"{node.name}.sum", 0))
        extremes[node.name], extremes[f"{node.name}.sum"] = Extremes(rate), Extremes(rate)
    batches = context.batches()
    context.progress.start(f"calibrating {len(sums)} sums", len(batches))
    for batch in batches:

        def record(node: fx.Node, value: Any, batch: Batch = batch) -> Any:
            for name, rank in watched.get(node, ()):
                for sequence in _sequences(value, batch):
                    extremes[name].add(rank, sequence)
            return value

        interpret(running, context.bound(program, batch), hook=record)
        context.progress.step()
    context.progress.done()
    alone = OwnRank not in running.facts
    scales = {}
    for node in sums:
        largest = extremes[node.name].largest(ranks if alone else 1)
        scales[node.name] = largest if alone else _gathered(largest)
        scales[f"{node.name}.sum"] = extremes[f"{node.name}.sum"].largest(1)[0]
    return scales


def _running(program: Program) -> tuple[Program, Any]:
    running = runnable(program)
    if OwnRank not in running.facts:
        return running, rank_copies(program).__getitem__
    by_name = {n.name: n for n in running.graph.nodes}
    return running, lambda node: [by_name[node.name]]


def _gathered(local: torch.Tensor) -> torch.Tensor:
    bound = groups.group_for(groups.world_size())
    assert bound is not None
    return groups.all_gather(local, bound)


def _sequences(value: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Return the rows of a batch, without padding."""
    flat = value.reshape(-1, value.shape[-1])
    mask = batch.get("attention_mask")
    if mask is None or mask.numel() != flat.shape[0]:
        return [value.reshape(-1, value.shape[-1])] if value.dim() < 3 else list(value)
    rows = flat.reshape(*mask.shape, -1)
    return [row[row_mask] for row, row_mask in zip(rows, mask.bool(), strict=True) if bool(row_mask.any())]


def clipped(
    parts: list[torch.Tensor], scales: torch.Tensor, order: torch.Tensor, kept: int, bits: int
) -> float:
    """Return the share of transmitted integers that are clipped."""
    top = 1 << (bits - 1)
    outside = total = 0
    for values, scale in zip(parts, scales, strict=True):
        ratio = torch.round(values.index_select(-1, order)[..., kept:].float() / scale)
        outside += int(((ratio < -top) | (ratio > top - 1)).sum())
        total += ratio.numel()
    return outside / max(total, 1)


__all__ = ["FLOOR", "Extremes", "calibrate", "clipped"]
