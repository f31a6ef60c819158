"""Fused operators for computations that are limited by memory bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import gated_by
from .library import composite_operator
from .norm import rms_norm
from .spec import OperatorSpec
from .work import ACTIVATION_FLOPS, NORM_FLOPS, Call, Work, moved, product


def _add_rms_norm_work(call: Call) -> Work:
    """FLOPs: 8 per element. Bytes: two values read and two written."""
    x = call.tensor("x")
    work = moved(call, (NORM_FLOPS + 1) * x.numel)
    return Work(work.flops, work.weight_bytes, 4 * x.bytes)


def _gated_product_work(call: Call) -> Work:
    """FLOPs: 5 per element."""
    return moved(call, (ACTIVATION_FLOPS + 1) * call.output.numel)


def _linear_top_k_work(call: Call) -> Work:
    """FLOPs: 2 · rows · size · vocabulary. Bytes: operands and the k entries returned, not the logits."""
    x, weight = call.tensor("x"), call.tensor("weight")
    rows = product(x.shape[:-1])
    work = moved(call, rows * (2 * x.shape[-1] + 1) * weight.shape[0])
    return Work(work.flops, work.weight_bytes, x.bytes + rows * call.arguments["k"] * (x.dtype.itemsize + 8))


@composite_operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, *, bool float32=True, "
    "bool weight_before_cast=False) -> (Tensor, Tensor)",
    spec=OperatorSpec(work=_add_rms_norm_work),
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, float32: bool = True,
    weight_before_cast: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sum of the residual stream and a block's output, and the RMS norm of that sum.

    Args:
        x: (..., size).
        residual: the same shape and type.
        weight: (size,), or None.
        eps: as in ``rms_norm``, like the other arguments.

    Returns:
        ``x + residual``, and ``rms_norm`` of it.
    """
    summed = x + residual
    return summed, rms_norm(summed, weight, eps, float32=float32, weight_before_cast=weight_before_cast)


@composite_operator(
    'gated_product(Tensor gate, Tensor up, *, str activation="silu", float limit=0.0, float alpha=1.0) -> Tensor',
    spec=OperatorSpec(work=_gated_product_work),
)
def gated_product(
    gate: Tensor, up: Tensor, *, activation: str = "silu", limit: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return ``activation(gate) * up``.

    Args:
        gate: (..., width).
        up: the same shape.
        activation: one of ``ACTIVATIONS``.
        limit: clamp of swiglu_clamped and silu_clamped; cap on the gate of silu_softcapped.
        alpha: slope of swiglu_clamped; cap on the other half of silu_softcapped.
    """
    return gated_by(gate, up, activation, limit, alpha)


@composite_operator(
    "linear_top_k(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)",
    spec=OperatorSpec(work=_linear_top_k_work),
)
def linear_top_k(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of ``x weight^T + bias``, in descending order, and their indices.

    Args:
        x: (..., size).
        weight: (vocabulary, size).
        bias: (vocabulary,), or None.
        k: how many.

    Returns:
        (..., k) values, and (..., k) indices as int64; the order of equal values is unspecified.
    """
    top = torch.topk(F.linear(x, weight, bias), k, dim=-1)
    return top.values, top.indices
