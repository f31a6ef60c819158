"""Values in a few bits for communication: quantise and pack, then unpack, scale and sum.

The layout is that of :mod:`graphopt.ir.operators.quantized`: outliers in bfloat16, transmitted scales in float16,
then integers as one stream of bits, lowest bit first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def scales_kernel(
    x, columns, out, size, first, rest, top, columns_used: tl.constexpr, BLOCK: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The scale of one token's block of features: its largest absolute value over the largest integer, in float16."""
    top = tl.cast(top, tl.float32)  # torch.compile passes scalars in double precision
    token, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = number * BLOCK + tl.arange(0, B)
    inside = (tl.arange(0, B) < BLOCK) & (index < rest)
    column = tl.load(columns + first + index, mask=inside, other=0) if columns_used else first + index
    value = tl.abs(tl.load(x + token * size + column, mask=inside, other=0.0).to(tl.float32))
    scale = tl.div_rn(tl.max(value, axis=0), top)
    scale = tl.minimum(tl.maximum(scale, 6e-8), 65504.0)
    # the maximum ignores NaN; then the whole block becomes NaN
    lost = tl.max((value != value).to(tl.int32), axis=0) > 0
    scale = tl.where(lost, float("nan"), scale)
    tl.store(out + token * tl.num_programs(1) + number, scale.to(tl.float16))


@triton.jit
def pack_kernel(
    x, columns, static, scales, out, size, kept, rest, blocks, packed, width, columns_used: tl.constexpr,
    STATIC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program writes N bytes of one token's message, whichever section they belong to."""
    token = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * N + tl.arange(0, N)
    result = tl.zeros((N,), dtype=tl.int32)
    # outliers: the upper half of a float32, rounded to the nearest, ties to even
    outlier = byte < 2 * kept
    index = byte // 2
    column = tl.load(columns + index, mask=outlier, other=0) if columns_used else index
    value = tl.load(x + token * size + column, mask=outlier, other=0.0).to(tl.float32)
    raw = value.to(tl.uint32, bitcast=True)
    upper = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    upper = tl.where(value != value, 0x7FC0, upper)
    result = tl.where(outlier, ((upper >> (8 * (byte % 2))) & 255).to(tl.int32), result)
    # transmitted scales
    start = 2 * kept
    if not STATIC:
        scaled = (byte >= start) & (byte < start + 2 * blocks)
        scale_bits = tl.load(scales + token * blocks + (byte - start) // 2, mask=scaled, other=0.0)
        half = scale_bits.to(tl.uint16, bitcast=True).to(tl.int32)
        result = tl.where(scaled, (half >> (8 * ((byte - start) % 2))) & 255, result)
        start += 2 * blocks
    # integers: each of the few that overlap this byte adds its bits
    packed_byte = (byte >= start) & (byte < start + packed)
    bit = 8 * (byte - start)
    first = tl.where(packed_byte, bit // BITS, 0)
    for more in tl.static_range(MOST):
        index = first + more
        used = packed_byte & (index < rest) & (index * BITS < bit + 8)
        column = tl.load(columns + kept + index, mask=used, other=0) if columns_used else kept + index
        value = tl.load(x + token * size + column, mask=used, other=0.0).to(tl.float32)
        if STATIC:
            scale = tl.load(static + index, mask=used, other=1.0).to(tl.float32)
        else:
            scale = tl.load(scales + token * blocks + index // BLOCK, mask=used, other=1.0).to(tl.float32)
        high = 1 << (BITS - 1)
        value = tl.minimum(tl.maximum(tl.div_rn(value, scale), -1.0 * high), high - 1.0)
        # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even
        number = ((value + 12582912.0) - 12582912.0).to(tl.int32) + high
        shift = index * BITS - bit
        shifted = tl.where(shift >= 0, number << tl.maximum(shift, 0), number >> tl.maximum(-shift, 0)) & 255
        result = tl.where(used, result | shifted, result)
    tl.store(out + token * width + byte, result.to(tl.uint8), mask=byte < width)


@triton.jit
def unpack_kernel(
    payload, columns, static, out, tokens, size, kept, rest, blocks, width, static_stride, columns_used: tl.constexpr,
    STATIC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program sums N features of one token over all ranks, in rank order, and writes them to their positions."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * N + tl.arange(0, N)
    inside = index < kept + rest
    outlier = index < kept
    quantized = inside & (index >= kept)
    number = index - kept
    scale_start = 2 * kept
    start = scale_start if STATIC else scale_start + 2 * blocks
    bit = number * BITS
    total = tl.zeros((N,), dtype=tl.float32)
    for rank in range(RANKS):
        at = payload + (rank * tokens + token) * width
        low = tl.load(at + 2 * index, mask=outlier, other=0).to(tl.uint32)
        high = tl.load(at + 2 * index + 1, mask=outlier, other=0).to(tl.uint32)
        plain = ((low | (high << 8)) << 16).to(tl.float32, bitcast=True)
        low_byte = tl.load(at + start + bit // 8, mask=quantized, other=0).to(tl.int32)
        over = quantized & (bit % 8 + BITS > 8)
        two = tl.load(at + start + bit // 8 + 1, mask=over, other=0).to(tl.int32)
        integer = (((low_byte | (two << 8)) >> (bit % 8)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
        if STATIC:
            scale = tl.load(static + rank * static_stride + number, mask=quantized, other=0.0).to(tl.float32)
        else:
            near = at + scale_start + 2 * (number // BLOCK)
            low = tl.load(near, mask=quantized, other=0).to(tl.uint16)
            high = tl.load(near + 1, mask=quantized, other=0).to(tl.uint16)
            scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.where(outlier, plain, integer.to(tl.float32) * scale)
    column = tl.load(columns + index, mask=inside, other=0) if columns_used else index
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)


def quantize_pack(
    x: Tensor, columns: Tensor | None, scale: Tensor | None, kept: int, bits: int, block: int, width: int
) -> Tensor:
    """As :func:`graphopt.ir.operators.quantized.quantize_pack`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, size = flat.shape
    outliers = (size if columns is None else columns.shape[0]) - kept
    blocks = triton.cdiv(outliers, block) if block else 0
    order = flat if columns is None else columns.contiguous()
    scales = torch.empty(tokens, max(blocks, 1), dtype=torch.float16, device=x.device)
    if scale is None and blocks:
        top = max((1 << (bits - 1)) - 1, 1)
        launch(
            scales_kernel, (tokens, blocks), flat, order, scales, size, kept, outliers, float(top),
            columns_used=columns is not None, BLOCK=block, B=triton.next_power_of_2(block), num_warps=1,
        )  # fmt: skip
    out = torch.empty(tokens, width, dtype=torch.uint8, device=x.device)
    n = 512
    launch(
        pack_kernel, (tokens, triton.cdiv(width, n)), flat, order, flat if scale is None else scale.contiguous(), scales,
        out, size, kept, outliers, blocks, triton.cdiv(outliers * bits, 8), width, columns_used=columns is not None,
        STATIC=scale is not None, BITS=bits, BLOCK=max(block, 1), MOST=7 // bits + 2 if 8 % bits else max(1, 8 // bits),
        N=n, num_warps=4,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], width)


def unpack_sum(
    payload: Tensor,
    columns: Tensor | None,
    scales: Tensor | None,
    count: int,
    kept: int,
    bits: int,
    block: int,
) -> Tensor:
    """As :func:`graphopt.ir.operators.quantized.unpack_sum`."""
    ranks, width, leading = payload.shape[0], payload.shape[-1], payload.shape[1:-1]
    payload = payload.reshape(ranks, -1, width).contiguous()
    outliers = count - kept
    n = 512
    tokens = payload.shape[1]
    out = torch.empty(tokens, count, dtype=torch.float32, device=payload.device)
    launch(
        unpack_kernel, (tokens, triton.cdiv(count, n)), payload, payload if columns is None else columns.contiguous(),
        payload if scales is None else scales, out, tokens, count, kept, outliers,
        triton.cdiv(outliers, block) if block else 0, width, 0 if scales is None else scales.stride(0),
        columns_used=columns is not None, STATIC=scales is not None,
        BITS=bits, BLOCK=max(block, 1), RANKS=ranks, N=n, num_warps=4,
    )  # fmt: skip
    return out.reshape(*leading, count)
