"""The activation of a gate times the other half of a feed-forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .activations import activated


@triton.jit
def gated_kernel(
    gate, up, out, size, gate_stride, up_stride, limit, alpha, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK features of a row; gate and up may be halves of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    first = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    product = activated(first, second, limit, alpha, ACTIVATION, True)
    tl.store(out + row * size + column, product.to(out.dtype.element_ty), mask=inside)


def takes(gate: Tensor, up: Tensor) -> bool:
    """Return whether the kernel supports this product."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return gate.dtype == up.dtype and gate.dtype in floats and gate.shape == up.shape


def _rows(x: Tensor) -> Tensor:
    """Return x as rows of adjacent features, without a copy where it is a slice of wider rows."""
    if x.dim() == 1:
        flat = x.unsqueeze(0)
    else:
        flat = x.reshape(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def gated_product(
    gate: Tensor, up: Tensor, *, activation: str = "silu", limit: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """As ``graphopt::gated_product``."""
    first, second = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, size = first.shape
    block = 1024
    launch(
        gated_kernel, (rows, triton.cdiv(size, block)), first, second, out, size, first.stride(0), second.stride(0),
        limit, alpha, ACTIVATION=activation, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
