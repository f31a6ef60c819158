"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import dialect_operator


@dialect_operator("rotary(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels: ``x * cos + rotated(x) * sin`` (RoFormer, arXiv 2104.09864).

    Args:
        x: (..., size) with an even size.
        cos: broadcastable to ``x``.
        sin: broadcastable to ``x``.
        interleaved: pairs are channels (0, 1), (2, 3), ... (GPT-J); otherwise
            (0, size / 2), (1, size / 2 + 1), ... (Llama).

    Returns:
        The shape of ``x``.
    """
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    return x * cos + rotated * sin
