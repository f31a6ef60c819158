"""Feed-forwards with several widths or experts: tokens are sorted by group, and each block uses its group's matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .activations import activated
from .sorting import sorted_blocks


@triton.jit
def widen_kernel(
    x, rows, groups, widths, gate, up, gate_bias, up_bias, factors, hidden, size, each, x_stride,
    gate_group, gate_row, gate_column, up_group, up_row, up_column, bias_group, bias_row, hidden_stride, limit, alpha,
    GROUPS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, WEIGH: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``hidden = activation(x gate^T) * (x up^T)``: a program takes M tokens of one group and N channels of its width."""
    block = tl.program_id(0)
    group = tl.load(groups + block)
    if group >= GROUPS:
        return
    width = tl.multiple_of(tl.load(widths + group), ALIGNED)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    if tl.program_id(1) * N >= width:
        return
    position = block * M + tl.arange(0, M)
    row = tl.load(rows + position)
    live = row >= 0
    token = (tl.maximum(row, 0) // each).to(tl.int64)
    used = channel < width
    feature = tl.arange(0, K)
    expert = group.to(tl.int64)
    x_at = x + token[:, None] * x_stride + feature[None, :]
    up_at = up + expert * up_group + channel[None, :].to(tl.int64) * up_row + feature[:, None] * up_column
    gate_at = (
        gate + expert * gate_group + channel[None, :].to(tl.int64) * gate_row + feature[:, None] * gate_column
    )
    upper = tl.zeros((M, N), dtype=tl.float32)
    lower = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, size, K):
        inside = feature < size - start
        tile = tl.load(x_at, mask=live[:, None] & inside[None, :], other=0.0)
        matrix = tl.load(up_at, mask=inside[:, None] & used[None, :], other=0.0)
        upper = tl.dot(tile, matrix, upper, input_precision=PRECISION)
        if GATED:
            matrix = tl.load(gate_at, mask=inside[:, None] & used[None, :], other=0.0)
            lower = tl.dot(tile, matrix, lower, input_precision=PRECISION)
        x_at += K
        up_at += K * up_column
        gate_at += K * gate_column
    if WEIGH:
        # a factor on the input equals a factor on the product
        factor = tl.load(factors + tl.maximum(row, 0)).to(tl.float32)
        upper, lower = upper * factor[:, None], lower * factor[:, None]
    if BIAS:
        upper += tl.load(up_bias + expert * bias_group + channel * bias_row, mask=used, other=0.0).to(
            tl.float32
        )[None, :]
        if GATED:
            at = gate_bias + expert * bias_group + channel * bias_row
            lower += tl.load(at, mask=used, other=0.0).to(tl.float32)[None, :]
    if not GATED:
        lower = upper
    product = activated(lower, upper, limit, alpha, ACTIVATION, GATED)
    at = hidden + position[:, None].to(tl.int64) * hidden_stride + channel[None, :]
    tl.store(at, product.to(hidden.dtype.element_ty), mask=live[:, None] & used[None, :])


@triton.jit
def narrow_kernel(
    hidden, rows, groups, widths, down, bias, factors, out, size, hidden_stride,
    down_group, down_row, down_column, bias_group,
    GROUPS: tl.constexpr, BIAS: tl.constexpr, WEIGH: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``out = factor * (hidden down^T + bias)`` over the channels of each block's width."""
    block = tl.program_id(0)
    group = tl.load(groups + block)
    if group >= GROUPS:
        return
    width = tl.multiple_of(tl.load(widths + group), ALIGNED)
    if width == 0:
        return
    position = block * M + tl.arange(0, M)
    row = tl.load(rows + position)
    live = row >= 0
    column = tl.program_id(1) * N + tl.arange(0, N)
    used = column < size
    channel = tl.arange(0, K)
    expert = group.to(tl.int64)
    hidden_at = hidden + position[:, None].to(tl.int64) * hidden_stride + channel[None, :]
    down_at = (
        down + expert * down_group + column[None, :].to(tl.int64) * down_row + channel[:, None] * down_column
    )
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, width, K):
        inside = channel < width - start
        tile = tl.load(hidden_at, mask=live[:, None] & inside[None, :], other=0.0)
        matrix = tl.load(down_at, mask=inside[:, None] & used[None, :], other=0.0)
        total = tl.dot(tile, matrix, total, input_precision=PRECISION)
        hidden_at += K
        down_at += K * down_column
    if BIAS:
        total += tl.load(bias + expert * bias_group + column, mask=used, other=0.0).to(tl.float32)[None, :]
    if WEIGH:
        total *= tl.load(factors + tl.maximum(row, 0)).to(tl.float32)[:, None]
    at = out + tl.maximum(row, 0)[:, None].to(tl.int64) * size + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & used[None, :])


def takes(x: Tensor, *matrices: Tensor | None) -> bool:
    """Return whether the kernels support these types."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return x.dtype in floats and all(m is None or m.dtype == x.dtype for m in matrices)


def _tiles(rows: Any) -> tuple[int, int, int]:
    """Return tokens, channels and features of a tile; a medium tile if the number of tokens is a symbol."""
    if not isinstance(rows, int):
        return 32, 64, 64
    return (16, 64, 64) if rows <= 64 else (64, 64, 64)


def _grouped(
    x: Tensor, experts: Tensor, per_token: int, widths: Tensor, aligned: int, gate: Tensor | None, up: Tensor, down: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None, factors: Tensor | None,
    weigh_inputs: bool, out: Tensor, activation: str, limit: float, alpha: float,
) -> None:  # fmt: skip
    """Compute rows (``per_token`` for each token of x) with the matrices (groups, inner, size) of their experts.

    ``aligned`` divides all widths: without it the compiler may not load several channels at once.
    """
    groups, inner = int(widths.shape[0]), up.shape[1]
    m, n, k = _tiles(experts.shape[0])
    if x.dtype == torch.float32:
        n, k = 32, 32
    warps = 8 if x.dtype == torch.float32 else 4
    rows, belongs = sorted_blocks(experts, groups, m)
    hidden = torch.empty(rows.shape[0], inner, dtype=x.dtype, device=x.device)
    blocks = belongs.shape[0]
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    lower = up if gate is None else gate
    source = x if factors is None else factors
    bias_stride = (0, 0) if up_bias is None else (up_bias.stride(0), up_bias.stride(1))
    launch(
        widen_kernel, (blocks, triton.cdiv(inner, n)), x, rows, belongs, widths, lower, up,
        x if gate_bias is None else gate_bias, x if up_bias is None else up_bias, source, hidden, x.shape[1], per_token,
        x.stride(0), lower.stride(0), lower.stride(1), lower.stride(2), up.stride(0), up.stride(1), up.stride(2),
        *bias_stride, inner, limit, alpha, GROUPS=groups, GATED=gate is not None, BIAS=up_bias is not None,
        WEIGH=weigh_inputs, ACTIVATION=activation, PRECISION=precision, ALIGNED=aligned, M=m, N=n, K=k,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    size = down.shape[1]
    launch(
        narrow_kernel, (blocks, triton.cdiv(size, n)), hidden, rows, belongs, widths, down,
        x if down_bias is None else down_bias, source, out, size, inner, down.stride(0), down.stride(1), down.stride(2),
        0 if down_bias is None else down_bias.stride(0), GROUPS=groups, BIAS=down_bias is not None,
        WEIGH=factors is not None and not weigh_inputs, PRECISION=precision, ALIGNED=aligned, M=m, N=n, K=k,
        num_warps=warps, num_stages=3,
    )  # fmt: skip


def nested_ffn(
    x: Tensor, choice: Tensor, widths: list[int], up: Tensor, down: Tensor, gate: Tensor | None = None,
    up_bias: Tensor | None = None, gate_bias: Tensor | None = None, down_bias: Tensor | None = None, *,
    activation: str = "silu", limit: float = 0.0, alpha: float = 1.0,
) -> Tensor:  # fmt: skip
    """As ``graphopt::nested_ffn``; computes no channel beyond a token's width."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()

    def alone(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unsqueeze(0).expand(len(widths), *tensor.shape)

    up_all, down_all = alone(up), alone(down)
    assert up_all is not None
    assert down_all is not None
    # widths are created on x's device, since a captured CUDA graph allows no copy from the host
    wide = torch.cat([torch.full((1,), w, dtype=torch.int32, device=x.device) for w in widths])
    out = torch.zeros(flat.shape[0], down.shape[0], dtype=x.dtype, device=x.device)
    bias = gate_bias if gate is not None else up_bias
    if gate is not None and (gate_bias is None) != (up_bias is None):
        other = up_bias if gate_bias is None else gate_bias
        assert other is not None
        zeros = torch.zeros_like(other)
        up_bias, bias = (up_bias, zeros) if gate_bias is None else (zeros, gate_bias)
    _grouped(
        flat, choice.reshape(-1), 1, wide, math.gcd(16, *widths), alone(gate), up_all, down_all, alone(bias),
        alone(up_bias), alone(down_bias), None, False, out, activation, limit, alpha,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], down.shape[0])


def routed_ffn(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, first: Tensor | None = None, *, activation: str = "silu", gated: bool = True,
    interleaved: bool = False, transposed: bool = False, limit: float = 0.0, alpha: float = 1.0,
    weigh_inputs: bool = False,
) -> Tensor:  # fmt: skip
    """As ``graphopt::routed_ffn``; reads each expert's matrices for its own tokens only."""
    tokens, per_token = experts.shape
    if first is not None:
        experts = experts - first
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)

    def half(tensor: Tensor, number: int) -> Tensor:
        inner = tensor.shape[1] // 2
        return tensor[:, number::2] if interleaved else tensor[:, number * inner : (number + 1) * inner]

    gate = half(up, 0) if gated else None
    gate_bias = half(up_bias, 0) if gated and up_bias is not None else None
    if gated:
        up, up_bias = half(up, 1), None if up_bias is None else half(up_bias, 1)
    widths = torch.full((up.shape[0],), up.shape[1], dtype=torch.int32, device=x.device)
    out = torch.zeros(tokens * per_token, down.shape[1], dtype=torch.float32, device=x.device)
    _grouped(
        x.contiguous(), experts.reshape(-1), per_token, widths, math.gcd(16, up.shape[1]), gate, up, down, gate_bias,
        up_bias, down_bias, weights.reshape(-1).contiguous(), weigh_inputs, out, activation, limit, alpha,
    )  # fmt: skip
    return out.reshape(tokens, per_token, down.shape[1]).sum(1).to(x.dtype)
