"""Depthwise convolutions along a sequence, with the inputs that a state remembers before its first token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def convolution_kernel(
    x, weight, bias, state, out, channels, tokens, x_batch, x_channel, x_token, w_channel, w_tap, s_batch, s_channel,
    s_slot, BIAS: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A program handles C channels and T tokens of one row."""
    batch = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * C + tl.arange(0, C)).to(tl.int64)
    token = (tl.program_id(2) * T + tl.arange(0, T)).to(tl.int64)
    live = (channel < channels)[:, None]
    total = tl.zeros((C, T), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        place = token - (TAPS - 1) + tap
        within = ((place >= 0) & (place < tokens))[None, :]
        at = x + batch * x_batch + channel[:, None] * x_channel + place[None, :] * x_token
        value = tl.load(at, mask=live & within, other=0.0).to(tl.float32)
        if STATE:
            slot = place + (TAPS - 1)
            at = state + batch * s_batch + channel[:, None] * s_channel + slot[None, :] * s_slot
            value += tl.load(at, mask=live & (place < 0)[None, :], other=0.0).to(tl.float32)
        factor = tl.load(weight + channel * w_channel + tap * w_tap, mask=channel < channels, other=0.0)
        total += value * factor.to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
    at = out + (batch * channels + channel[:, None]) * tokens + token[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live & (token < tokens)[None, :])


MOST_TAPS = 8
"""Taps are unrolled; longer filters are convolved by torch."""


def takes(x: Tensor, weight: Tensor, step_mask: Tensor | None) -> bool:
    """Return whether tokens follow one another, and taps are few."""
    taps = weight.shape[2]
    floating = x.dtype.is_floating_point and x.dtype.itemsize <= 4 and weight.dtype.itemsize <= 4
    return step_mask is None and floating and isinstance(taps, int) and taps <= MOST_TAPS


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``graphopt::causal_conv1d`` where tokens follow one another."""
    batch, channels, tokens = x.shape
    out = x.new_empty(batch, channels, tokens)
    few = isinstance(tokens, int) and tokens <= 4
    wide, long = (128, 4) if few else (32, 64)
    grid = (batch, triton.cdiv(channels, wide), (tokens + long - 1) // long)
    launch(
        convolution_kernel, grid, x, weight, x if bias is None else bias, x if state is None else state, out, channels,
        tokens, *x.stride(), weight.stride(0), weight.stride(2), *(x if state is None else state).stride(),
        BIAS=bias is not None, STATE=state is not None, TAPS=weight.shape[2], C=wide, T=long, num_warps=4,
    )  # fmt: skip
    return out
