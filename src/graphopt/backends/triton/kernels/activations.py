"""Activations of feed-forwards on float32 tiles; as :func:`graphopt.ir.operators.activations.gated_by`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _most(x, y):
    # as in torch: NaN if either operand is NaN
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _least(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(gate, up, limit, alpha, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Return ``activation(gate) * up``, or the activation alone if not GATED."""
    # torch.compile passes scalars in double precision
    limit, alpha = tl.cast(limit, tl.float32), tl.cast(alpha, tl.float32)
    if ACTIVATION == "swiglu_clamped":
        gate = _least(gate, limit)
        up = _least(_most(up, -limit), limit) + 1
        active = gate * tl.sigmoid(gate * alpha)
    elif ACTIVATION == "silu_softcapped":
        active = limit * _tanh(gate / limit) * tl.sigmoid(gate)
        up = alpha * _tanh(up / alpha)
    elif ACTIVATION == "silu_clamped":
        gate = _least(gate, limit)
        up = _least(_most(up, -limit), limit)
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # alpha of 1 stands for the exact square root of 2 / pi
        slope = tl.where(alpha == 1.0, 0.7978845608028654, alpha)
        active = 0.5 * gate * (1 + _tanh(slope * gate * (1 + 0.044715 * gate * gate)))
    elif ACTIVATION == "gelu_sigmoid":
        active = gate * tl.sigmoid(1.702 * gate)
    elif ACTIVATION == "relu2":
        active = _most(gate, 0.0) * _most(gate, 0.0)
    elif ACTIVATION == "relu":
        active = _most(gate, 0.0)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        active = _tanh(gate)
    if GATED:
        active = active * up
    return active
