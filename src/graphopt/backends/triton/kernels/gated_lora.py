"""A low-rank update at marked positions; blocks of tokens without a mark cost a copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def low_rank_kernel(
    x, down, marks, low, tokens, size, rank, PRECISION: tl.constexpr, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``low = x down^T`` for M tokens."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < tokens
    marked = tl.load(marks + row, mask=live, other=0) > 0
    if tl.max(marked.to(tl.int32), axis=0) == 0:
        return
    number, feature = tl.arange(0, R), tl.arange(0, K)
    x_at = x + row[:, None].to(tl.int64) * size + feature[None, :]
    down_at = down + number[None, :] * size + feature[:, None]
    total = tl.zeros((M, R), dtype=tl.float32)
    for start in range(0, size, K):
        inside = feature < size - start
        tile = tl.load(x_at, mask=marked[:, None] & inside[None, :], other=0.0)
        matrix = tl.load(down_at, mask=inside[:, None] & (number < rank)[None, :], other=0.0)
        total = tl.dot(tile, matrix, total, input_precision=PRECISION)
        x_at += K
        down_at += K
    at = low + row[:, None].to(tl.int64) * R + number[None, :]
    tl.store(at, total.to(low.dtype.element_ty), mask=live[:, None])


@triton.jit
def add_kernel(
    y, low, up, marks, out, tokens, size, rank, scale, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """``out = y + scale * low up^T`` where marked, y elsewhere."""
    scale = tl.cast(scale, tl.float32)  # torch.compile passes scalars in double precision
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < tokens
    column = tl.program_id(1) * N + tl.arange(0, N)
    used = column < size
    at = row[:, None].to(tl.int64) * size + column[None, :]
    inside = live[:, None] & used[None, :]
    value = tl.load(y + at, mask=inside, other=0.0)
    marked = tl.load(marks + row, mask=live, other=0) > 0
    if tl.max(marked.to(tl.int32), axis=0) > 0:
        number = tl.arange(0, R)
        low_at = low + row[:, None].to(tl.int64) * R + number[None, :]
        tile = tl.load(low_at, mask=marked[:, None], other=0.0)
        matrix = tl.load(
            up + column[None, :] * rank + number[:, None],
            mask=(number < rank)[:, None] & used[None, :],
            other=0.0,
        )
        more = value.to(tl.float32) + scale * tl.dot(tile, matrix, input_precision=PRECISION)
        value = tl.where(marked[:, None], more.to(value.dtype), value)
    tl.store(out + at, value, mask=inside)


def takes(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Return whether the kernels support these types and this rank."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    same = y.dtype in floats and y.dtype == x.dtype == down.dtype == up.dtype
    return same and isinstance(down.shape[0], int) and down.shape[0] <= 256


def gated_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor, marks: Tensor, scale: float) -> Tensor:
    """As ``graphopt::gated_lora``."""
    y, down, up = y.contiguous(), down.contiguous(), up.contiguous()
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, size = flat.shape
    rank, width = down.shape[0], up.shape[0]
    marks = marks.reshape(-1).contiguous()
    wide = max(16, triton.next_power_of_2(rank))
    m, n, k = 16, 128 if wide <= 64 else 64, 64
    if y.dtype == torch.float32:
        n, k = 64, 32
    precision = "ieee" if y.dtype == torch.float32 else "tf32"
    low = torch.empty(tokens, wide, dtype=y.dtype, device=y.device)
    out = torch.empty_like(y)
    blocks = triton.cdiv(tokens, m)
    launch(
        low_rank_kernel, (blocks,), flat, down, marks, low, tokens, size, rank, PRECISION=precision, M=m, R=wide, K=k,
        num_warps=4,
    )  # fmt: skip
    launch(
        add_kernel, (blocks, triton.cdiv(width, n)), y, low, up, marks, out, tokens, width, rank, scale,
        PRECISION=precision, M=m, N=n, R=wide, num_warps=4,
    )  # fmt: skip
    return out
