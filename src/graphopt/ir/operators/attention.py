"""Scaled dot-product attention with the masks, biases, sinks and caps of real models."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compat import is_plain_tensor
from ..schema import arguments
from .library import composite_operator
from .placement_types import WHOLE, Misplaced, Placement, Shard, check_whole, placement_of
from .spec import OperatorSpec, Trait
from .work import Call, Work, attention_work, minimum, visible_pairs

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
    """Return which keys each query may see, broadcastable to (batch, 1, queries, keys), or None for all.

    Queries are aligned with the last keys. ``window`` counts the positions seen, including the query's own;
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
    """Return the mask, or None and whether plain causal masking is enough.

    The layers of a model share one key mask, so the mask is built once per forward pass.
    """
    if key_mask is None and segments is None and window is None:
        if not causal:
            return None, False
        if queries == keys:
            return None, True
    if key_mask is None or segments is not None or not is_plain_tensor(key_mask):
        return visible_keys(queries, keys, key_mask, segments, causal, window, device), False
    # tensors made in inference mode do not count their changes
    known = not key_mask.is_inference()
    key = (queries, keys, causal, window, key_mask._version if known else 0, key_mask.data_ptr())
    for owner, seen_key, mask, plain in _last_masks:
        if known and owner() is key_mask and seen_key == key:
            return mask, plain
    # testing whether a mask is full would synchronise a GPU
    full = device.type == "cpu" and bool(key_mask.all())
    mask, plain = None, False
    if full and (window is None or window >= keys) and (not causal or queries == keys):
        plain = causal
    else:
        mask = visible_keys(queries, keys, None if full else key_mask, None, causal, window, device)
    if known:
        _last_masks.append((weakref.ref(key_mask), key, mask, plain))
    del _last_masks[:-4]
    return mask, plain


def _shape(q: Tensor, k: Tensor, v: Tensor, *others: object, **options: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _work(call: Call) -> Work:
    """FLOPs: visible pairs · heads · batch · (2 · head size + 2 · value size + 5 for the softmax).

    Bytes are those of a fused kernel: no score leaves the chip, keys and values are read once at their own
    number of heads, and only those that some query's window reaches.
    """
    window = call.arguments.get("window")
    queries, keys = call.tensor("q").shape[-2], call.tensor("k").shape[-2]
    pairs = visible_pairs(queries, keys, bool(call.arguments.get("causal")), window)
    reached = keys if window is None or queries == keys else minimum(keys, queries + (window - 1))
    return attention_work(call, "q", "k", "v", pairs, reached)


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    q, k, v = (placement_of(args[n], placed) for n in ("q", "k", "v"))
    if (q, k, v) == (WHOLE, WHOLE, WHOLE):
        check_whole(placed, *(args[n] for n in ("key_mask", "bias", "sinks", "segments", "visible")))
        return WHOLE
    if (k, v) == (WHOLE, WHOLE) and isinstance(q, Shard) and args["k"].meta["val"].shape[1] == 1:
        # every rank has the only head of keys and values
        k = v = Shard(1, (0,) * len(q.starts), 1, 1)
    if not all(isinstance(p, Shard) and p.dim == 1 for p in (q, k, v)):
        raise Misplaced(f"its queries are {q}, its keys {k}, its values {v}; all must be sharded by heads")
    assert isinstance(q, Shard)
    assert isinstance(k, Shard)
    assert isinstance(v, Shard)
    if (k.starts, k.length) != (v.starts, v.length):
        raise Misplaced("keys and values are sharded by different heads")
    group = q.total // k.total
    if any(first // group != other for first, other in zip(q.starts, k.starts, strict=True)):
        raise Misplaced("the queries of a rank do not belong to its keys")
    check_whole(placed, *(args[n] for n in ("key_mask", "segments", "visible")))
    bias, sinks = placement_of(args["bias"], placed), placement_of(args["sinks"], placed)
    if isinstance(args["bias"], fx.Node):
        by_head = args["bias"].meta["val"].shape[1] != 1
        if by_head and not (isinstance(bias, Shard) and (bias.dim, bias.starts) == (1, q.starts)):
            raise Misplaced(f"its bias is {bias}, its heads are sharded")
    if isinstance(args["sinks"], fx.Node) and not (isinstance(sinks, Shard) and sinks.starts == q.starts):
        raise Misplaced(f"its sinks are {sinks}, its heads are sharded")
    return q


@composite_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, "
    "Tensor? sinks=None, Tensor? segments=None, Tensor? visible=None, *, float scale, bool causal=False, "
    "int? window=None, float? softcap=None) -> Tensor",
    spec=OperatorSpec(shape=_shape, work=_work, place=_place, traits=Trait.MIXING),
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
        visible: (batch, 1, queries, keys), true where a key may be seen; applied in addition to the other masks and
            used by caches.
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
