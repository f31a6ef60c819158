"""Operators controlled by run-time settings: the number of experts (arXiv 2509.23012), widths, skipped layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import composite_operator


def _taking_part(chosen: Tensor, k: Tensor) -> Tensor:
    rank = torch.arange(chosen.shape[-1], device=chosen.device, dtype=torch.float64)
    return rank < k.to(chosen.device)


@composite_operator("active_experts(Tensor experts, Tensor k, int absent) -> Tensor")
def active_experts(experts: Tensor, k: Tensor, absent: int) -> Tensor:
    """Return the experts of each token with all but the first ``k`` replaced by ``absent``.

    Args:
        experts: (tokens, most), integers, the best expert first.
        k: a scalar, float64, from 1 to ``most``.
        absent: a number that is no expert's index.
    """
    return torch.where(_taking_part(experts, k), experts, torch.full_like(experts, absent))


@composite_operator("active_weights(Tensor weights, Tensor k, bool renormalised) -> Tensor")
def active_weights(weights: Tensor, k: Tensor, renormalised: bool) -> Tensor:
    """Return the routing weights of each token with all but the first ``k`` set to zero.

    Args:
        weights: (tokens, most), the best expert's first.
        k: a scalar, float64, from 1 to ``most``.
        renormalised: scale the remaining weights to the original sum, for models that normalise their weights.
    """
    remaining = torch.where(_taking_part(weights, k), weights, torch.zeros_like(weights))
    if not renormalised:
        return remaining
    total = remaining.sum(-1, keepdim=True)
    return remaining * (
        weights.sum(-1, keepdim=True) / torch.where(total == 0, torch.ones_like(total), total)
    )


@composite_operator("skipped(Tensor before, Tensor after, Tensor phase) -> Tensor")
def skipped(before: Tensor, after: Tensor, phase: Tensor) -> Tensor:
    """Return the residual stream after some layers at phase 0, and before them at phase 1.

    Args:
        before: the input of the layers.
        after: their output, of the same shape.
        phase: a scalar, float64: 0 during prefill, 1 during decoding.
    """
    return torch.where(phase.to(before.device) >= 0.5, before, after)


@composite_operator("choose_width(Tensor logits, Tensor delta) -> Tensor")
def choose_width(logits: Tensor, delta: Tensor) -> Tensor:
    """Return the first choice at which the cumulative probability of a router reaches ``delta``; choices ascend in cost.

    Args:
        logits: (..., choices).
        delta: a scalar, float64: at 0 every token takes the first choice, at 1 the last; with two choices, 0.5 takes
            the more probable one.

    Returns:
        (...), integers.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    summed = logits.to(exact).softmax(-1).cumsum(-1)[..., :-1]
    limit = delta.to(device=logits.device)
    # rounding may let the sum reach one before the last choice
    return ((summed < limit) | (limit >= 1)).sum(-1)


@composite_operator("softened_weights(Tensor weights, Tensor k, bool renormalised, float epsilon) -> Tensor")
def softened_weights(weights: Tensor, k: Tensor, renormalised: bool, epsilon: float) -> Tensor:
    """Return the routing weights with all but the first ``k`` set to ``epsilon`` (arXiv 2509.23012).

    Shapes stay the same, and experts beyond ``k`` still receive a small gradient.

    Args:
        weights: (tokens, most), the best expert's first.
        k: a scalar, float64, from 1 to ``most``.
        renormalised: scale all weights to their original sum.
        epsilon: weight of the experts beyond k.
    """
    softened = torch.where(_taking_part(weights, k), weights, torch.full_like(weights, epsilon))
    if not renormalised:
        return softened
    return softened * (weights.sum(-1, keepdim=True) / softened.sum(-1, keepdim=True))
