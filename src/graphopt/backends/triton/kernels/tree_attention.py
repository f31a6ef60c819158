"""Attention of a few new tokens, in a row or a tree, over a long cache: keys are split, partial results combined."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def share_kernel(
    q, k, v, visible, begins, ends, part, part_max, part_sum, queries, keys, size, value_size, share, group,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, seen_batch, seen_token,
    scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A program handles all queries of the R rows that read one key-value head, and one split of its keys."""
    # torch.compile passes scalars in double precision
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    pair = tl.program_id(0)
    batch, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    number = tl.program_id(1)
    row = tl.arange(0, R)
    live = row < queries * group
    query, query_head = row % queries, row // queries
    feature, value = tl.arange(0, D), tl.arange(0, V)
    q_at = (
        q
        + batch * q_batch
        + (head * group + query_head)[:, None] * q_head
        + query[:, None] * q_token
        + feature[None, :]
    )
    query_tile = tl.load(q_at, mask=live[:, None] & (feature < size)[None, :], other=0.0)
    highest = tl.full((R,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((R,), dtype=tl.float32)
    result = tl.zeros((R, V), dtype=tl.float32)
    # most of a cache is empty, or not visible
    begin = tl.load(begins + batch)
    first = tl.maximum(number * share, begin // C * C)
    last = tl.minimum(tl.minimum(number * share + share, keys), tl.load(ends + batch))
    for start in range(first, last, C):
        key = start + tl.arange(0, C)
        in_range = key < last
        seen_at = visible + batch * seen_batch + query[:, None] * seen_token + key[None, :]
        shown = tl.load(seen_at, mask=live[:, None] & in_range[None, :], other=0) != 0
        long = key.to(tl.int64)
        k_at = k + batch * k_batch + head * k_head + long[None, :] * k_token + feature[:, None]
        tile = tl.load(k_at, mask=(feature < size)[:, None] & in_range[None, :], other=0.0)
        score = tl.dot(query_tile, tile, input_precision=PRECISION) * scale
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        score = tl.where(shown, score, -float("inf"))
        now = tl.maximum(highest, tl.max(score, axis=1))
        base = tl.where(now == -float("inf"), 0.0, now)
        weight = tl.exp(score - base[:, None])
        before = tl.exp(highest - base)
        v_at = v + batch * v_batch + head * v_head + long[:, None] * v_token + value[None, :]
        tile = tl.load(v_at, mask=in_range[:, None] & (value < value_size)[None, :], other=0.0)
        product = tl.dot(weight.to(tile.dtype), tile, input_precision=PRECISION)
        result = result * before[:, None] + product
        total = total * before + tl.sum(weight, axis=1)
        highest = now
    at = (pair.to(tl.int64) * tl.num_programs(1) + number) * R
    tl.store(part_max + at + row, highest)
    tl.store(part_sum + at + row, total)
    tl.store(part + (at + row)[:, None] * V + value[None, :], result)


@triton.jit
def join_kernel(
    part, part_max, part_sum, sinks, out, queries, value_size, group, SINKS: tl.constexpr, HEADS: tl.constexpr,
    SHARES: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one row."""
    pair, row = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // HEADS).to(tl.int64), pair % HEADS
    query, query_head = row % queries, head * group + row // queries
    value = tl.arange(0, V)
    highest = tl.full((), -float("inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    result = tl.zeros((V,), dtype=tl.float32)
    for number in range(SHARES):
        at = (pair.to(tl.int64) * SHARES + number) * R + row
        maximum = tl.load(part_max + at)
        now = tl.maximum(highest, maximum)
        base = tl.where(now == -float("inf"), 0.0, now)
        before, scale = tl.exp(highest - base), tl.exp(maximum - base)
        result = result * before + tl.load(part + at * V + value) * scale
        total = total * before + tl.load(part_sum + at) * scale
        highest = now
    weighed = total
    if SINKS:
        # a sink takes part in the softmax and has no value
        base = tl.where(highest == -float("inf"), 0.0, highest)
        weighed += tl.exp(tl.load(sinks + query_head).to(tl.float32) - base)
    result = tl.where(total > 0, result / tl.where(total > 0, weighed, 1.0), 0.0)
    heads = HEADS * group
    at = out + ((batch * heads + query_head) * queries + query) * value_size + value
    tl.store(at, result.to(out.dtype.element_ty), mask=value < value_size)


MOST_ROWS = 128
"""Queries times heads that share keys: one tile of the product."""
WIDEST = {torch.float32: (64, 64 * 64), torch.float16: (256, 128 * 128), torch.bfloat16: (256, 128 * 128)}
"""Limits on the features of a head, and on rows times features of a tile: beyond them, registers spill to memory.

Exact float32 products use no tensor cores and keep all operands in registers.
"""


def takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: Tensor | None, visible: Tensor | None,
          causal: bool, window: int | None) -> bool:  # fmt: skip
    """Return whether this is a step over a cache whose queries fit into one tile."""
    if visible is None or bias is not None or segments is not None or causal or window is not None:
        return False
    sizes = [q.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3]]
    if not all(isinstance(size, int) for size in sizes):
        return False
    queries, heads, kv_heads, size, value_size = sizes
    if q.dtype not in WIDEST or not q.dtype == k.dtype == v.dtype or not queries:
        return False
    rows, wide, wide_value = _tile(queries * heads // kv_heads, size, value_size)
    features, numbers = WIDEST[q.dtype]
    widest = max(wide, wide_value)
    return rows <= MOST_ROWS and widest <= features and rows * widest <= numbers


def _tile(rows: int, size: int, value_size: int) -> tuple[int, int, int]:
    """Return rows and features rounded up to what a tile product accepts."""
    padded = [max(16, triton.next_power_of_2(count)) for count in (rows, size, value_size)]
    return padded[0], padded[1], padded[2]


def _shares(keys: Any, tile: int) -> tuple[int, Any]:
    """Return the number of key splits, and the keys in each."""
    count = min(16, max(1, keys // 512)) if isinstance(keys, int) else 8
    chunk = (keys + count - 1) // count
    return count, (chunk + tile - 1) // tile * tile


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None,
    sinks: Tensor | None = None, segments: Tensor | None = None, visible: Tensor | None = None, *, scale: float,
    causal: bool = False, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """As ``graphopt::attention`` if ``visible`` alone decides which keys are seen."""
    assert visible is not None
    batch, heads, queries, size = q.shape
    kv_heads, keys, value_size = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    if key_mask is not None:
        visible = visible & key_mask.to(torch.bool)[:, None, None, :]
    mask = visible.expand(batch, 1, queries, keys).to(torch.uint8).contiguous()
    some = mask.amax((1, 2)) > 0
    positions = torch.arange(keys, device=q.device, dtype=torch.int32)
    begins, ends = positions.where(some, keys).amin(1), (positions + 1).where(some, 0).amax(1)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    rows, wide, wide_value = _tile(queries * group, size, value_size)
    tile = 32 if rows > 32 or max(wide, wide_value) > 128 or q.dtype == torch.float32 else 64
    warps = 4 if rows <= 32 else 8
    count, share = _shares(keys, tile)
    programs = batch * kv_heads
    part = torch.empty(programs, count, rows, wide_value, dtype=torch.float32, device=q.device)
    part_max, part_sum = (
        torch.empty(programs, count, rows, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    out = torch.empty(batch, heads, queries, value_size, dtype=q.dtype, device=q.device)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    launch(
        share_kernel, (programs, count), q, k, v, mask, begins.int(), ends.int(), part, part_max, part_sum, queries, keys,
        size, value_size, share, group, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask.stride(0),
        mask.stride(2), scale,
        softcap or 0.0, SOFTCAP=softcap is not None, PRECISION=precision, HEADS=kv_heads, R=rows, C=tile, D=wide,
        V=wide_value, num_warps=warps, num_stages=2,
    )  # fmt: skip
    launch(
        join_kernel, (programs, queries * group), part, part_max, part_sum, q if sinks is None else sinks, out,
        queries, value_size, group, SINKS=sinks is not None, HEADS=kv_heads, SHARES=count, R=rows, V=wide_value,
        num_warps=2,
    )  # fmt: skip
    return out
