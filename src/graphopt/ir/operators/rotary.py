"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .along import last_mixed
from .library import composite_operator
from .spec import OperatorSpec
from .work import Call, Work, moved


def _shape(x: Tensor, cos: Tensor, sin: Tensor, **options: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


def _work(call: Call) -> Work:
    """FLOPs: 3 per element, two multiplications and an addition."""
    return moved(call, 3 * call.output.numel)


@composite_operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor",
    spec=OperatorSpec(shape=_shape, work=_work, dimensions=last_mixed),
)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return ``x * cos + rotated(x) * sin``, which rotates pairs of channels (RoFormer, arXiv 2104.09864).

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
