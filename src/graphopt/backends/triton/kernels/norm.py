"""RMS norms, optionally with the preceding addition to the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch


@triton.jit
def rms_norm_kernel(
    x, residual, weight, summed, out, size, eps, ADD: tl.constexpr, WEIGHT: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program handles one row."""
    eps = tl.cast(eps, tl.float32)  # torch.compile passes scalars in double precision
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        # the norm reads the stream as stored, rounded to its type
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    if WEIGHT:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if not BEFORE:
            scaled = scaled.to(x.dtype.element_ty).to(tl.float32)
        scaled = scaled * factor
    tl.store(out + row + column, scaled.to(out.dtype.element_ty), mask=inside)


LONGEST = 32768
"""Largest number of features that a program holds."""


def takes(x: Tensor, weight: Tensor | None, float32: bool) -> bool:
    """Return whether the kernel supports this norm."""
    short = x.dtype in (torch.float16, torch.bfloat16)
    fits = isinstance(x.shape[-1], int) and x.shape[-1] <= LONGEST
    plain = weight is None or (weight.dim() == 1 and weight.shape[0] == x.shape[-1])
    return fits and plain and (x.dtype == torch.float32 or (short and float32))


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, before: bool
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    x = x.contiguous()
    dtype = x.dtype if weight is None or before else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty_like(x, dtype=dtype)
    summed = out if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    launch(
        rms_norm_kernel, (x.numel() // size,), x, x if residual is None else residual.contiguous(),
        x if weight is None else weight.contiguous(), summed, out, size, eps, ADD=residual is not None,
        WEIGHT=weight is not None, BEFORE=before, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return summed, out


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, float32: bool = True, weight_before_cast: bool = False
) -> Tensor:
    """As ``graphopt::rms_norm``."""
    return _normed(x, None, weight, eps, weight_before_cast)[1]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    float32: bool = True,
    weight_before_cast: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``graphopt::add_rms_norm``."""
    return _normed(x, residual, weight, eps, weight_before_cast)
