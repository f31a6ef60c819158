"""What dials choose while a program runs: experts (arXiv 2509.23012), the width of nested ones, layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import dialect_operator


def _taking_part(chosen: Tensor, k: Tensor) -> Tensor:
    rank = torch.arange(chosen.shape[-1], device=chosen.device, dtype=torch.float64)
    return rank < k.to(chosen.device)


@dialect_operator("active_experts(Tensor experts, Tensor k, int absent) -> Tensor")
def active_experts(experts: Tensor, k: Tensor, absent: int) -> Tensor:
    """Keep the first ``k`` experts of each token, the best first; the others become ``absent``, which no expert has.

    Args:
        experts: (tokens, most), integers.
        k: a number, float64, from 1 to ``most``.
        absent: a number that is no expert's.
    """
    return torch.where(_taking_part(experts, k), experts, torch.full_like(experts, absent))


@dialect_operator("active_weights(Tensor weights, Tensor k, bool renormalised) -> Tensor")
def active_weights(weights: Tensor, k: Tensor, renormalised: bool) -> Tensor:
    """Keep the first ``k`` routing weights of each token and zero the others.

    Args:
        weights: (tokens, most), the best expert's first.
        k: a number, float64, from 1 to ``most``.
        renormalised: scale those that are left to the sum that all had, as models do that divide by it.
    """
    remaining = torch.where(_taking_part(weights, k), weights, torch.zeros_like(weights))
    if not renormalised:
        return remaining
    total = remaining.sum(-1, keepdim=True)
    return remaining * (weights.sum(-1, keepdim=True) / torch.where(total == 0, torch.ones_like(total), total))


@dialect_operator("skipped(Tensor before, Tensor after, Tensor phase) -> Tensor")
def skipped(before: Tensor, after: Tensor, phase: Tensor) -> Tensor:
    """Return a stream's value after some layers at phase 0, and before them at phase 1.

    Args:
        before: what the layers read.
        after: what they wrote, of the same shape.
        phase: a number, float64: 0 while a prompt is read, 1 while tokens are added to it.
    """
    return torch.where(phase.to(before.device) >= 0.5, before, after)


@dialect_operator("choose_width(Tensor logits, Tensor delta) -> Tensor")
def choose_width(logits: Tensor, delta: Tensor) -> Tensor:
    """Return the first way up to which a router's probabilities sum to ``delta``, its ways ordered by cost.

    Args:
        logits: (..., ways).
        delta: a number, float64: at 0 every token takes the first way, at 1 the last; with two ways, 0.5 takes the
            likelier one.

    Returns:
        (...), integers.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    summed = logits.to(exact).softmax(-1).cumsum(-1)[..., :-1]
    limit = delta.to(device=logits.device)
    # rounding may let a sum reach one before all ways are in it
    return ((summed < limit) | (limit >= 1)).sum(-1)


@dialect_operator("softened_weights(Tensor weights, Tensor k, bool renormalised, float epsilon) -> Tensor")
def softened_weights(weights: Tensor, k: Tensor, renormalised: bool, epsilon: float) -> Tensor:
    """As :func:`active_weights`, but what is beyond ``k`` counts ``epsilon`` instead of nothing (arXiv 2509.23012).

    Shapes stay, and a trickle of gradient reaches the experts that a step leaves out.

    Args:
        weights: (tokens, most), the best expert's first.
        k: a number, float64, from 1 to ``most``.
        renormalised: scale all to the sum that they had.
        epsilon: weight of an expert beyond k.
    """
    softened = torch.where(_taking_part(weights, k), weights, torch.full_like(weights, epsilon))
    if not renormalised:
        return softened
    return softened * (weights.sum(-1, keepdim=True) / softened.sum(-1, keepdim=True))
