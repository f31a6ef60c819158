"""Importance scores of the hidden channels of feed-forwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.program import Program
from ...ir.running.execute import interpret
from ...ir.schema import arguments
from ...measure.metrics import Batch, valid

if TYPE_CHECKING:
    from ...measure.context import Context

SCORES = ("activation", "wanda", "contribution", "norm", "peak", "random")


def hidden_scores(
    program: Program, context: Context, blocks: list[Block], score: str
) -> dict[str, torch.Tensor]:
    """Return one score per hidden channel by block name; higher means more important.

    Here h are the inputs of the last projection W, over calibration positions that are not padding:

    - ``activation``: sum of |h_j| (Flextron, arXiv 2406.10260).
    - ``norm``: root mean square of h_j (CFSP as released, arXiv 2409.13199).
    - ``wanda``: root mean square of h_j times mean |W_ij| (after Wanda, arXiv 2306.11695).
    - ``contribution``: mean |h_j| times the norm of W's column (recalled from Puzzle, arXiv 2411.19146).
    - ``peak``: largest minus smallest weight of the channel's row, summed over gate and up; no data (arXiv 2512.22671).
    - ``random``: a control.
    """
    if score == "random":
        return {b.name: torch.rand(int(b.sizes["width"]), generator=context.rng) for b in blocks}
    if score == "peak":
        return {b.name: _peaks(program, b) for b in blocks}
    totals = _moments(program, context, blocks)
    scores = {}
    for block in blocks:
        total, squares, count = totals[block.name]
        if score == "activation":
            scores[block.name] = total
        elif score == "norm":
            scores[block.name] = (squares / count).sqrt()
        else:
            matrix = _weight_value(program, arguments(block.parts["down"])["weight"]).double().abs()
            if score == "wanda":
                scores[block.name] = (squares / count).sqrt() * matrix.mean(0)
            else:
                scores[block.name] = total / count * matrix.square().sum(0).sqrt()
    return scores


def _moments(
    program: Program, context: Context, blocks: list[Block]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Return the sum of |h|, the sum of h squared and the number of positions, by block."""
    hidden = {b.name: arguments(b.parts["down"])["input"] for b in blocks}
    moments: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    context.progress.start(f"hidden channels of {len(blocks)} feed-forwards", len(context.batches()))
    for batch, values in context.record(program, dict.fromkeys(hidden.values())):
        for name, node in hidden.items():
            rows = _rows(values[node.name], batch).double()
            zero = torch.zeros(rows.shape[1], dtype=torch.float64)
            total, squares, count = moments.get(name, (zero, zero, 0))
            moments[name] = (total + rows.abs().sum(0), squares + rows.square().sum(0), count + len(rows))
        context.progress.step()
    context.progress.done()
    return moments


def _rows(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    where = valid(batch, value)
    return value.reshape(-1, value.shape[-1]) if where is None else value[where]


def _peaks(program: Program, block: Block) -> torch.Tensor:
    total: torch.Tensor | None = None
    for part in dict.fromkeys(block.parts[n] for n in ("gate", "up") if n in block.parts):
        matrix = _weight_value(program, arguments(part)["weight"]).float()
        width = int(block.sizes["width"])
        for rows in torch.split(matrix, width):  # gate and up in one matrix are its two halves
            span = rows.amax(1) - rows.amin(1)
            total = span if total is None else total + span
    assert total is not None
    return total


def _weight_value(program: Program, node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = interpret(program, {}, record=[node], stop=True)[node.name]
    return value


def importance_of_blocks(program: Program, context: Context, blocks: list[Block]) -> dict[str, float]:
    """Return the mean angle between a block's input and output, in half turns (CFSP's coarse importance)."""
    totals = dict.fromkeys((b.name for b in blocks), 0.0)
    count = 0
    nodes = dict.fromkeys(n for b in blocks for n in (b.reads, b.writes))
    for batch, values in context.record(program, nodes):
        for block in blocks:
            first, second = (_rows(values[n.name], batch).double() for n in (block.reads, block.writes))
            cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).clamp(-1, 1)
            totals[block.name] += float((torch.arccos(cosine) / math.pi).mean())
        count += 1
    return {name: value / max(count, 1) for name, value in totals.items()}
