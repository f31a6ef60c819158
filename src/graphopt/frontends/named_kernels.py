"""Scans and short convolutions that transformers computes by functions with names of kernels, as our operators.

Written out, a scan loops over tokens or over chunks, whose number a tracer fixes. The library marks these functions by
the names of the kernels that may replace them; so they are known by what they compute, whatever model calls them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional as F

_NO_MEMORY = 1e-30
"""A decay whose logarithm is finite and that leaves nothing of a state."""

NORM_EPS = 1e-6
"""Added to the sum of squares where keys and queries of the delta rule are normalised."""


def kernel_of(function: Any) -> str | None:
    """Return the name of the kernel that may replace a function of transformers; None if there is none."""
    if not isinstance(function, FunctionType) or "func_name" not in function.__code__.co_freevars:
        return None
    assert function.__closure__ is not None
    cell = function.__closure__[function.__code__.co_freevars.index("func_name")]
    name = cell.cell_contents
    return name if isinstance(name, str) else None


@contextlib.contextmanager
def named_kernels() -> Iterator[None]:
    """Let functions with known kernel names call our operators while the context is open."""
    before: list[tuple[Any, str, FunctionType]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformers.models.") or ".modeling_" not in name:
            continue
        for attribute, function in list(vars(module).items()):
            kernel = kernel_of(function)
            if kernel in _KERNELS:
                before.append((module, attribute, function))
                setattr(module, attribute, _called_by_name(_KERNELS[kernel], function))
        for owner in [v for v in vars(module).values() if isinstance(v, type)]:
            for attribute, replacement in _METHODS.items():
                function = vars(owner).get(attribute)
                if isinstance(function, FunctionType) and owner.__module__ == name:
                    before.append((owner, attribute, function))
                    setattr(owner, attribute, _called_by_name(replacement, function))
    try:
        yield
    finally:
        for owner, attribute, function in before:
            setattr(owner, attribute, function)


def _called_by_name(replacement: Callable[..., Any], function: FunctionType) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        result = replacement(**given)
        return function(*args, **kwargs) if result is NotImplemented else result

    return either


def _convolution(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: Any, activation: str | None, **others: Any
) -> Any:
    from transformers.activations import ACT2FN

    if others.get("seq_idx") is not None or others.get("cu_seqlens") is not None:
        return NotImplemented
    y = torch.ops.graphopt.causal_conv1d(hidden_states.to(weight.dtype), weight.unsqueeze(1), bias)
    if activation is not None:
        y = ACT2FN[activation](y)
    return y.to(hidden_states.dtype)


def _state_space(
    hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: Any,
    dt_bias: Any, initial_states: Any, dt_softplus: bool, dt_limit: tuple[float, float],
    return_final_states: bool, **others: Any,
) -> Any:  # fmt: skip
    """Compute the scan of Mamba 2: a state for each head, one decay for all of it."""
    if initial_states is not None or return_final_states or others.get("seq_idx") is not None:
        return NotImplemented
    if others.get("z") is not None:
        return NotImplemented
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, dt_limit[0], dt_limit[1]).to(_wide(dt))
    x, k, q = (_of_heads(t.to(_wide(t))) for t in (hidden_states, B, C))
    v = x * dt.permute(0, 2, 1).unsqueeze(-1)
    y = torch.ops.graphopt.linear_attention(q, k, v, (A.to(dt.dtype) * dt).permute(0, 2, 1))
    if D is not None:
        y = y + D[:, None, None] * x
    return y.permute(0, 2, 1, 3).contiguous()


def _selective_scan(
    hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: Any,
    z: Any, delta_bias: Any, delta_softplus: bool, return_last_state: bool, **others: Any,
) -> Any:  # fmt: skip
    """Compute the scan of Mamba: a state for each channel, a decay for each of its entries."""
    if return_last_state:
        return NotImplemented
    dtype = hidden_states.dtype
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    # one key and one query for all channels, which are heads of one value each
    k, q = (t.permute(0, 2, 1).unsqueeze(1).to(_wide(t)) for t in (B, C))
    v = (dt * hidden_states).unsqueeze(-1)
    y = torch.ops.graphopt.linear_attention(q, k, v.to(_wide(v)), dt.unsqueeze(-1) * A[None, :, None, :])
    y = y.squeeze(-1)
    if D is not None:
        y = y + hidden_states * D[None, :, None]
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype)


def _delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial_state: Any, output_final_state: bool, use_qk_l2norm_in_kernel: bool, **others: Any,
) -> Any:  # fmt: skip
    """Compute the gated delta rule; with a decay for each channel, Kimi's."""
    if initial_state is not None or output_final_state or others.get("cu_seqlens") is not None:
        return NotImplemented
    dtype = query.dtype
    q, k, v, decay = (_of_heads(t.to(_wide(t))) for t in (query, key, value, g))
    if use_qk_l2norm_in_kernel:
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + NORM_EPS) for t in (q, k))
    strength = beta.to(_wide(beta)).permute(0, 2, 1)
    y = torch.ops.graphopt.linear_attention(q * q.shape[-1] ** -0.5, k, v, decay, strength)
    return y.permute(0, 2, 1, 3).to(dtype).contiguous(), None


def _gated_recurrence(
    hidden_states: torch.Tensor, recurrent_gate: torch.Tensor, reset: torch.Tensor, acc_dtype: torch.dtype, **others: Any
) -> Any:  # fmt: skip
    """Compute ``h_t = a_t h_{t-1} + x_t`` of every channel (RG-LRU, arXiv 2402.19427), beginning again at resets.

    What a module has kept from an earlier call is not read: the first token of a text resets it.
    """
    decay = (recurrent_gate * ~reset).to(acc_dtype).clamp(min=_NO_MEMORY).log()
    # a head of one key, one query and one value for each channel
    x = hidden_states.to(acc_dtype).permute(0, 2, 1).unsqueeze(-1)
    one = torch.ones_like(x[:, :1])
    y = torch.ops.graphopt.linear_attention(one, one, x, decay.permute(0, 2, 1)).squeeze(-1).permute(0, 2, 1)
    return y.to(hidden_states.dtype), y[:, -1]


def _wide(t: torch.Tensor) -> torch.dtype:
    """Return the type in which states are summed: float32 unless it is more precise already."""
    return torch.float64 if t.dtype is torch.float64 else torch.float32


def _of_heads(t: torch.Tensor) -> torch.Tensor:
    """Return (batch, tokens, heads, ...) as (batch, heads, tokens, ...)."""
    return t.permute(0, 2, 1, *range(3, t.dim()))


_METHODS: dict[str, Callable[..., Any]] = {"_rnn_scan": _gated_recurrence}
"""Methods that the library writes as loops over tokens and has no kernel's name for."""

_KERNELS: dict[str | None, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "mamba_chunk_scan_combined": _state_space,
    "selective_scan_fn": _selective_scan,
    "chunk_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
}
