"""Activations between the projections of a feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped", "silu_clamped", "silu_softcapped",
    "gelu_sigmoid", "tanh",
)  # fmt: skip


def activate(
    hidden: Tensor, activation: str, gated: bool, interleaved: bool, limit: float, alpha: float
) -> Tensor:
    """Apply the activation of an FFN, and its gate where it has one, to (..., inner or 2 * inner)."""
    if not gated:
        return gated_by(hidden, None, activation, limit, alpha)
    if interleaved:
        return gated_by(hidden[..., ::2], hidden[..., 1::2], activation, limit, alpha)
    gate, up = hidden.chunk(2, dim=-1)
    return gated_by(gate, up, activation, limit, alpha)


def gated_by(gate: Tensor, up: Tensor | None, activation: str, limit: float, alpha: float) -> Tensor:
    """Return ``activation(gate) * up``, or the activation alone where there is no ``up``."""
    if activation == "swiglu_clamped":
        assert up is not None
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit) + 1
        return up * (gate * torch.sigmoid(gate * alpha))
    if activation == "silu_softcapped":
        # limit bounds the gate's linear factor, alpha the other half, each as c * tanh(x / c)
        active = limit * torch.tanh(gate / limit) * torch.sigmoid(gate)
        return active if up is None else active * (alpha * torch.tanh(up / alpha))
    if activation == "silu_clamped":
        gate, up = gate.clamp(max=limit), None if up is None else up.clamp(min=-limit, max=limit)
    if activation in ("silu", "silu_clamped"):
        active = F.silu(gate)
    elif activation == "gelu":
        active = F.gelu(gate)
    elif activation == "gelu_tanh" and alpha == 1.0:
        active = F.gelu(gate, approximate="tanh")
    elif activation == "gelu_tanh":
        # models that write out the square root of 2 / pi round it
        active = 0.5 * gate * (1 + torch.tanh(alpha * gate * (1 + 0.044715 * gate * gate)))
    elif activation == "gelu_sigmoid":
        active = gate * torch.sigmoid(gate * 1.702)
    elif activation == "relu2":
        active = F.relu(gate).square()
    elif activation == "relu":
        active = F.relu(gate)
    elif activation == "tanh":
        active = torch.tanh(gate)
    else:
        raise ValueError(f"there is no activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    return active if up is None else active * up
