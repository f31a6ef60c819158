"""Scaled dot-product attention with everything that real models add to it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import is_plain_tensor
from .library import dialect_operator

_last_masks: list[tuple[weakref.ref[Tensor], tuple[object, ...], Tensor | None, bool]] = []


def visible_keys(
    queries: int,
    keys: int,
    key_mask: Tensor | None,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return which key each query may see, broadcastable to (batch, 1, queries, keys), or None for all.

    Queries are aligned with the last keys. ``window`` counts the positions seen, the own one included;
    without ``causal`` it reaches as far to the right as to the left.
    """
    mask: Tensor | None = None
    if causal or window is not None:
        row = torch.arange(queries, device=device)[:, None] + (keys - queries)
        column = torch.arange(keys, device=device)[None, :]
        if causal:
            mask = column <= row
            if window is not None:
                mask = mask & (row - column < window)
        else:
            assert window is not None
            mask = (row - column).abs() < window
        mask = mask[None, None]
    if segments is not None:
        same = segments[:, None, -queries:, None] == segments[:, None, None, :]
        mask = same if mask is None else mask & same
    if key_mask is not None:
        seen = key_mask.to(torch.bool)[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return mask


def _causal(queries: int, keys: int, device: torch.device) -> Tensor | None:
    return visible_keys(queries, keys, None, None, True, None, device)


def _mask_for(
    queries: int,
    keys: int,
    key_mask: Tensor | None,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> tuple[Tensor | None, bool]:
    """Return the mask, or None and whether plain causality says it all.

    The layers of a model share one key mask; models build their mask once a forward, so must we.
    """
    if key_mask is None and segments is None and window is None:
        if not causal:
            return None, False
        if queries == keys:
            return None, True
    if key_mask is None or segments is not None or not is_plain_tensor(key_mask):
        return visible_keys(queries, keys, key_mask, segments, causal, window, device), False
    key = (queries, keys, causal, window, key_mask._version, key_mask.data_ptr())
    for owner, seen_key, mask, plain in _last_masks:
        if owner() is key_mask and seen_key == key:
            return mask, plain
    # asking a GPU whether a mask is full would stall it
    full = device.type == "cpu" and bool(key_mask.all())
    mask, plain = None, False
    if full and (window is None or window >= keys) and (not causal or queries == keys):
        plain = causal
    else:
        mask = visible_keys(queries, keys, None if full else key_mask, None, causal, window, device)
    _last_masks.append((weakref.ref(key_mask), key, mask, plain))
    del _last_masks[:-4]
    return mask, plain


@dialect_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, "
    "Tensor? sinks=None, Tensor? segments=None, Tensor? visible=None, *, float scale, bool causal=False, "
    "int? window=None, float? softcap=None) -> Tensor"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
    visible: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(softcap(scale * q @ k^T) + bias, over visible keys and sinks) @ v``.

    Args:
        q: (batch, heads, queries, head size).
        k: (batch, key-value heads, keys, head size); heads are a multiple of key-value heads and are
            grouped in order, not expanded.
        v: (batch, key-value heads, keys, value size).
        key_mask: (batch, keys), true where a key may be seen. A query that sees no key yields zeros.
        bias: added to the scores, broadcastable to (batch, heads, queries, keys).
        sinks: (heads,), a score per head that takes part in the softmax and carries no value.
        segments: (batch, keys), integers; a query sees keys of its own segment.
        visible: (batch, 1, queries, keys), true where a key may be seen, besides all else; what a cache says.
        scale: factor on the scores.
        causal: a query sees no later position.
        window: number of positions seen, counting its own (both ways when not causal).
        softcap: scores become ``softcap * tanh(score / softcap)`` before bias and mask.

    Returns:
        (batch, heads, queries, value size).
    """
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = bool(q.shape[1] != k.shape[1])
    mask, plain_causal = _mask_for(queries, keys, key_mask, segments, causal, window, q.device)
    if visible is not None:
        if plain_causal:
            mask, plain_causal = _causal(queries, keys, q.device), False
        mask = visible if mask is None else mask & visible
    if sinks is None and softcap is None:
        if bias is None and mask is None:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=plain_causal, scale=scale, enable_gqa=grouped
            )
        added = mask
        if bias is not None:
            if plain_causal:
                mask = _causal(queries, keys, q.device)
            bias = bias.to(q.dtype)
            added = bias if mask is None else bias.masked_fill(mask.logical_not(), float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
    if plain_causal:
        mask = _causal(queries, keys, q.device)
    if grouped:
        repeat = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), float("-inf"))
    accumulate = scores.dtype if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(accumulate)
    if sinks is not None:
        column = sinks.to(accumulate)[None, :, None, None].expand(q.shape[0], -1, queries, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
        if mask is not None:
            # a row without a key has no softmax; it yields zeros, as torch's fused kernels do
            weights = weights.masked_fill(mask.logical_not(), 0.0)
    return torch.matmul(weights.to(v.dtype), v)
