"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .along import last_mixed
from .library import composite_operator
from .spec import OperatorSpec, Trait
from .work import NORM_FLOPS, Call, Work, moved


def _work(call: Call) -> Work:
    """FLOPs: 7 per element."""
    return moved(call, NORM_FLOPS * call.output.numel)


@composite_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps, *, bool float32=True, bool weight_before_cast=False)"
    " -> Tensor",
    spec=OperatorSpec(work=_work, dimensions=last_mixed, traits=Trait.NORM),
)
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, float32: bool = True, weight_before_cast: bool = False
) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467).

    Args:
        x: (..., size), any floating type.
        weight: broadcastable to the last dimension, or None.
        eps: added to the mean square.
        float32: compute in at least float32, as models do in training.
        weight_before_cast: multiply by the weight before returning to the type of ``x``
            (OLMo, Gemma); otherwise after (Llama).

    Returns:
        The shape of ``x``; its type, promoted with the weight's where the weight comes last.
    """
    wide = x.to(torch.float32) if float32 and x.dtype in (torch.float16, torch.bfloat16) else x
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return scaled.to(x.dtype)
    if weight_before_cast:
        return (scaled * weight.to(wide.dtype)).to(x.dtype)
    return scaled.to(x.dtype) * weight
