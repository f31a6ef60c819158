"""Linear attention with decay and the delta rule, token by token: the state stays in registers between tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def recurrence_kernel(
    q, k, v, g, beta, state, taken, out, after, heads, group, tokens, key_size, value_size,
    q_batch, q_head, q_token, q_key, k_batch, k_head, k_token, k_key, v_batch, v_head, v_token, v_value,
    g_batch, g_head, g_token, g_key, b_batch, b_head, b_token, s_batch, s_head, s_key, s_value, t_batch, t_token,
    BETA: tl.constexpr, STATE: tl.constexpr, TAKEN: tl.constexpr, READ: tl.constexpr, BY_KEY: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A program handles V values of H heads of one row, for all tokens in order."""
    batch = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * H + tl.arange(0, H)).to(tl.int64)
    value = tl.program_id(2) * V + tl.arange(0, V)
    key = tl.arange(0, K)
    key_head = head // group
    of_keys = (head < heads)[:, None] & (key < key_size)[None, :]
    of_values = (head < heads)[:, None] & (value < value_size)[None, :]
    of_state = of_keys[:, :, None] & (value < value_size)[None, None, :]
    held = tl.zeros((H, K, V), dtype=tl.float32)
    if STATE:
        state_at = state + batch * s_batch + head[:, None, None] * s_head + key[None, :, None] * s_key
        held = tl.load(state_at + value[None, None, :] * s_value, mask=of_state, other=0.0).to(tl.float32)
    for token in range(tokens):
        step = tl.cast(token, tl.int64)
        k_at = k + batch * k_batch + key_head[:, None] * k_head + step * k_token + key[None, :] * k_key
        keys = tl.load(k_at, mask=of_keys, other=0.0).to(tl.float32)
        v_at = v + batch * v_batch + head[:, None] * v_head + step * v_token + value[None, :] * v_value
        written = tl.load(v_at, mask=of_values, other=0.0).to(tl.float32)
        flag = 1.0
        if TAKEN:
            # a decay of one and a key of zero leave the state as it is
            flag = tl.load(taken + batch * t_batch + step * t_token).to(tl.float32)
            keys = keys * flag
        if BY_KEY:
            g_at = g + batch * g_batch + head[:, None] * g_head + step * g_token + key[None, :] * g_key
            decay = tl.load(g_at, mask=of_keys, other=0.0).to(tl.float32)
            held = held * tl.exp(decay * flag)[:, :, None]
        else:
            g_at = g + batch * g_batch + head * g_head + step * g_token
            decay = tl.load(g_at, mask=head < heads, other=0.0).to(tl.float32)
            held = held * tl.exp(decay * flag)[:, None, None]
        if BETA:
            b_at = beta + batch * b_batch + head * b_head + step * b_token
            strength = tl.load(b_at, mask=head < heads, other=0.0).to(tl.float32)
            written = strength[:, None] * (written - tl.sum(keys[:, :, None] * held, axis=1))
        held += keys[:, :, None] * written[:, None, :]
        if READ:
            q_at = q + batch * q_batch + key_head[:, None] * q_head + step * q_token + key[None, :] * q_key
            query = tl.load(q_at, mask=of_keys, other=0.0).to(tl.float32)
            read = tl.sum(query[:, :, None] * held, axis=1)
            out_at = out + ((batch * heads + head[:, None]) * tokens + step) * value_size + value[None, :]
            tl.store(out_at, read.to(out.dtype.element_ty), mask=of_values)
    if not READ:
        after_at = (
            after + ((batch * heads + head[:, None, None]) * key_size + key[None, :, None]) * value_size
        )
        tl.store(after_at + value[None, None, :], held.to(after.dtype.element_ty), mask=of_state)


NUMBERS = 4096
"""Numbers of the state that a program holds: 32 registers of each of its 128 threads."""
MOST_KEYS = 256


def takes(k: Tensor, v: Tensor, step_mask: Tensor | None, *others: Tensor | None) -> bool:
    """Return whether tokens follow one another and the state of a few values fits into registers."""
    sizes = (k.shape[3], v.shape[3], v.shape[1], k.shape[1])
    if step_mask is not None or not all(isinstance(size, int) for size in sizes):
        return False
    narrow = all(t is None or t.dtype.itemsize <= 4 for t in (k, v, *others))
    return narrow and 0 < sizes[0] <= MOST_KEYS and min(sizes) > 0


def _start(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor | None,
    taken: Tensor | None, result: Tensor,
) -> Tensor:  # fmt: skip
    batch, heads, tokens, value_size = v.shape
    key_size = k.shape[3]
    keys = triton.next_power_of_2(key_size)
    values = min(triton.next_power_of_2(value_size), max(1, NUMBERS // keys), 64)
    # heads with few numbers share a program
    several = max(1, min(triton.next_power_of_2(heads), NUMBERS // 2 // (keys * values)))
    by_key = g.dim() == 4

    def strides(t: Tensor | None, count: int) -> tuple[Any, ...]:
        return (0,) * count if t is None else (*t.stride(), 0)[:count]

    grid = (batch, triton.cdiv(heads, several), triton.cdiv(value_size, values))
    launch(
        recurrence_kernel, grid, *(v if t is None else t for t in (q, k, v, g, beta, state, taken)), result, result,
        heads, heads // k.shape[1], tokens, key_size, value_size, *strides(q, 4), *strides(k, 4), *strides(v, 4),
        *strides(g, 4), *strides(beta, 3), *strides(state, 4), *strides(taken, 2), BETA=beta is not None,
        STATE=state is not None, TAKEN=taken is not None, READ=q is not None, BY_KEY=by_key, H=several, K=keys, V=values,
        num_warps=4,
    )  # fmt: skip
    return result


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None, state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``graphopt::linear_attention`` where tokens follow one another."""
    return _start(q, k, v, g, beta, state, None, v.new_empty(v.shape))


def linear_attention_state(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, taken: Tensor, step_mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As ``graphopt::linear_attention_state`` where tokens follow one another."""
    return _start(None, k, v, g, beta, state, taken.to(torch.uint8), state.new_empty(state.shape))
