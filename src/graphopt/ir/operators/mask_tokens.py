"""Mask tokens: positions of a row that stand for tokens still unknown, and what is computed at these positions only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import composite_operator
from .spec import OperatorSpec, Trait
from .work import Call, Work, moved, product


def _lora_work(call: Call) -> Work:
    """FLOPs: 2 · rank · (in + out) a token, and two per element of the result; at all positions, marked or not."""
    rank, inner = call.tensor("down").shape
    rows = product(call.tensor("x").shape[:-1])
    return moved(call, rows * 2 * rank * (inner + call.output.shape[-1]) + 2 * call.output.numel)


@composite_operator(
    "marked_embedding(Tensor embedded, Tensor table, Tensor marks) -> Tensor",
    spec=OperatorSpec(traits=Trait.MARKED),
)
def marked_embedding(embedded: Tensor, table: Tensor, marks: Tensor) -> Tensor:
    """Return embeddings with the vectors of mask tokens at marked positions.

    Args:
        embedded: (batch, tokens, size).
        table: (mask tokens, size).
        marks: (batch, tokens), integers: the number of the mask token, counted from 1; 0 for ordinary tokens.
    """
    vectors = F.embedding((marks - 1).clamp(min=0), table).to(embedded.dtype)
    return torch.where(marks.unsqueeze(-1) > 0, vectors, embedded)


@composite_operator(
    "gated_lora(Tensor y, Tensor x, Tensor down, Tensor up, Tensor marks, float scale) -> Tensor",
    spec=OperatorSpec(work=_lora_work, traits=Trait.MARKED),
)
def gated_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor, marks: Tensor, scale: float) -> Tensor:
    """Return ``y + scale * up (down x)`` at marked positions, and ``y`` itself, bit for bit, elsewhere.

    Args:
        y: (batch, tokens, out), the result of a linear on x.
        x: (batch, tokens, in).
        down: (rank, in).
        up: (out, rank).
        marks: (batch, tokens), integers, 0 where nothing is added.
        scale: factor on the term that is added.
    """
    return torch.where(marks.unsqueeze(-1) > 0, y + scale * F.linear(F.linear(x, down), up), y)
