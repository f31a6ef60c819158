"""The largest logits of a head and their token numbers, without writing all logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def candidates_kernel(
    x, weight, bias, values, numbers, rows, size, vocabulary, BIAS: tl.constexpr, TOP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A program finds the TOP largest of N logits of M rows."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    token = tl.program_id(1) * N + tl.arange(0, N)
    used = token < vocabulary
    feature = tl.arange(0, K)
    x_at = x + row[:, None].to(tl.int64) * size + feature[None, :]
    weight_at = weight + token[None, :].to(tl.int64) * size + feature[:, None]
    logits = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, size, K):
        inside = feature < size - start
        tile = tl.load(x_at, mask=live[:, None] & inside[None, :], other=0.0)
        matrix = tl.load(weight_at, mask=inside[:, None] & used[None, :], other=0.0)
        logits = tl.dot(tile, matrix, logits, input_precision=PRECISION)
        x_at += K
        weight_at += K
    if BIAS:
        logits += tl.load(bias + token, mask=used, other=0.0).to(tl.float32)[None, :]
    # rounded as the written logits would be
    logits = logits.to(values.dtype.element_ty).to(tl.float32)
    column = tl.arange(0, N)
    free = used[None, :] & (column >= 0)[None, :] & (row >= 0)[:, None]
    # NaN counts as the largest value, as in torch
    ranked = tl.where(logits != logits, float("inf"), logits)
    at = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * TOP
    for rank in tl.static_range(TOP):
        remaining = tl.where(free, ranked, -float("inf"))
        best = tl.max(remaining, axis=1)
        # the first remaining of equal logits; N if none remains, which happens only at the end of the last tile
        where = tl.min(tl.where(free & (remaining == best[:, None]), column[None, :], N), axis=1)
        selected = column[None, :] == where[:, None]
        value = tl.sum(tl.where(selected, logits, 0.0), axis=1)
        tl.store(values + at + rank, value.to(values.dtype.element_ty), mask=live)
        tl.store(numbers + at + rank, (tl.program_id(1) * N + where).to(tl.int32), mask=live)
        free = free & (column[None, :] != where[:, None])


MOST = 16
"""The largest k: candidates of a tile are extracted one by one, and more would need as much space as the logits."""


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> bool:
    """Return whether the kernel supports these types and this k."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    same = x.dtype in floats and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    return same and k <= min(MOST, weight.shape[0])


def linear_top_k(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """As ``graphopt::linear_top_k``."""
    flat, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    rows, size = flat.shape
    vocabulary = weight.shape[0]
    m, n, step = 16, 64, 128 if x.dtype != torch.float32 else 32
    tiles = triton.cdiv(vocabulary, n)
    values = torch.empty(rows, tiles * k, dtype=x.dtype, device=x.device)
    numbers = torch.empty(rows, tiles * k, dtype=torch.int32, device=x.device)
    launch(
        candidates_kernel, (triton.cdiv(rows, m), tiles), flat, weight, x if bias is None else bias, values, numbers,
        rows, size, vocabulary, BIAS=bias is not None, TOP=k, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        M=m, N=n, K=step, num_warps=8, num_stages=3,
    )  # fmt: skip
    # the last tile may have fewer tokens than candidates
    candidates = (tiles - 1) * k + min(k, vocabulary - (tiles - 1) * n)
    best, indices = values[:, :candidates].topk(k, dim=-1)
    tokens = numbers.gather(1, indices).to(torch.int64)
    return best.reshape(*x.shape[:-1], k), tokens.reshape(*x.shape[:-1], k)
