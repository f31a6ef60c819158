"""How many of the chosen experts take part: a dial on the width of top-k routing (arXiv 2509.23012)."""

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
    left = torch.where(_taking_part(weights, k), weights, torch.zeros_like(weights))
    if not renormalised:
        return left
    total = left.sum(-1, keepdim=True)
    return left * (weights.sum(-1, keepdim=True) / torch.where(total == 0, torch.ones_like(total), total))
