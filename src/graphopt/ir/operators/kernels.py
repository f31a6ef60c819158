"""Kernels that combine several convolutions, in parallel or in sequence, into one.

A kernel is (outputs, inputs / groups, *kernel size). The rules are those of RepVGG (Ding et al., 2021), ACNet, DBB and
MobileOne; rule numbers follow the list in the documentation of fuse-branches. All of this depends on weights
alone and is folded before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch.nn import functional as F

from .library import composite_operator


@composite_operator("norm_scale(Tensor variance, Tensor? weight, float eps) -> Tensor")
def norm_scale(variance: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return the scale of a BatchNorm in evaluation mode: ``weight / sqrt(variance + eps)`` (rule 1)."""
    scale = torch.rsqrt(variance + eps)
    return scale if weight is None else scale * weight


@composite_operator("norm_shift(Tensor mean, Tensor scale, Tensor? bias) -> Tensor")
def norm_shift(mean: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the shift of a BatchNorm in evaluation mode: ``bias - mean * scale`` (rule 1)."""
    return -mean * scale if bias is None else bias - mean * scale


@composite_operator("kernel_diagonal(Tensor vector, int groups, int axes) -> Tensor")
def kernel_diagonal(vector: torch.Tensor, groups: int, axes: int) -> torch.Tensor:
    """Return the kernel of size 1 that multiplies channel c by ``vector[c]`` (rules 5 and 13)."""
    channels = vector.shape[0]
    square = torch.diag_embed(vector.reshape(groups, channels // groups))
    return square.reshape(channels, channels // groups, *[1] * axes)


@composite_operator("kernel_scaled(Tensor kernel, Tensor scale) -> Tensor")
def kernel_scaled(kernel: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a kernel whose outputs are scaled by one factor per channel (rules 1 and 13)."""
    return kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))


@composite_operator(
    "kernel_spread(Tensor kernel, int have, int want, int[] ratios, int[] before, int[] counts) -> Tensor"
)
def kernel_spread(
    kernel: torch.Tensor,
    have: int,
    want: int,
    ratios: Sequence[int],
    before: Sequence[int],
    counts: Sequence[int],
) -> torch.Tensor:
    """Return the same linear map with fewer groups, its kernel offsets on a finer or longer grid (rules 4, 10 and 12).

    Args:
        kernel: with ``have`` groups.
        have: its number of groups.
        want: number of groups of the result, a divisor of ``have``.
        ratios: per axis, offset k moves to position ``before + ratio * k``.
        before: per axis.
        counts: kernel size of the result, per axis.
    """
    return _on_lattice(_with_groups(kernel, have, want), ratios, before, counts)


def _with_groups(kernel: torch.Tensor, have: int, want: int) -> torch.Tensor:
    """Return the kernel with fewer groups: blocks on the diagonal, zeros elsewhere."""
    if have == want:
        return kernel
    shape = kernel.shape
    blocks, outputs, inputs = have // want, shape[0] // have, shape[1]
    apart = kernel.reshape(want, blocks, outputs, inputs, -1)
    spread = torch.diag_embed(apart.permute(0, 2, 3, 4, 1))  # want, outputs, inputs, offsets, block, block
    return spread.permute(0, 4, 1, 5, 2, 3).reshape(shape[0], blocks * inputs, *shape[2:])


def _one_type(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tensors in the wider of their types, such as a norm's float32 and a kernel's bfloat16."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def _on_lattice(
    kernel: torch.Tensor, ratios: Sequence[int], before: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    for axis, (ratio, low, count) in enumerate(zip(ratios, before, counts, strict=True)):
        dim = axis + 2
        length = kernel.shape[dim]
        if ratio > 1 and length > 1:
            ahead, behind = kernel.shape[: dim + 1], kernel.shape[dim + 1 :]
            apart = F.pad(kernel.reshape(*ahead, 1, *behind), [*[0] * (2 * len(behind)), 0, ratio - 1])
            kernel = apart.reshape(*ahead[:-1], length * ratio, *behind)
            length = (length - 1) * ratio + 1
            kernel = kernel.narrow(dim, 0, length)
        if length != count:
            later = kernel.dim() - dim - 1
            kernel = F.pad(kernel, [*[0] * (2 * later), low, count - length - low])
    return kernel


@composite_operator(
    "kernel_sequence(Tensor first, Tensor second, int have_first, int have_second, int groups, "
    "int[] apart_first, int[] apart_second, int[] counts) -> Tensor"
)
def kernel_sequence(
    first: torch.Tensor,
    second: torch.Tensor,
    have_first: int,
    have_second: int,
    groups: int,
    apart_first: Sequence[int],
    apart_second: Sequence[int],
    counts: Sequence[int],
) -> torch.Tensor:
    """Return the kernel of two convolutions in sequence (rules 7, 8, 9 and 11).

    Args:
        first: applied first.
        second: applied to the result of the first.
        have_first: groups of the first.
        have_second: groups of the second.
        groups: of the result, a divisor of both.
        apart_first: per axis, the distance between offsets of the first kernel on the grid of the result.
        apart_second: the same for the second kernel.
        counts: kernel size of the result, per axis.
    """
    first, second = _with_groups(first, have_first, groups), _with_groups(second, have_second, groups)
    first, second = _one_type(first, second)
    one, two = first.shape[2:], second.shape[2:]
    middle, inputs, outputs = first.shape[0] // groups, first.shape[1], second.shape[0] // groups
    left = second.reshape(groups, outputs, middle, -1).permute(0, 1, 3, 2)
    left = left.reshape(groups, outputs * math.prod(two), middle)
    every = left @ first.reshape(groups, middle, inputs * math.prod(one))  # each offset with each
    every = every.reshape(groups * outputs, *two, inputs, *one)
    axes = len(one)
    if all(a == 1 or b == 1 for a, b in zip(one, two, strict=True)):
        order = [0, axes + 1]
        for axis in range(axes):
            order += [1 + axis, axes + 2 + axis]
        kernel = every.permute(order).reshape(
            groups * outputs, inputs, *(a * b for a, b in zip(one, two, strict=True))
        )
        ratios = [f if a > 1 else s for a, f, s in zip(one, apart_first, apart_second, strict=True)]
        return _on_lattice(kernel, ratios, [0] * axes, counts)
    flat = every.reshape(groups * outputs, math.prod(two), inputs, *one)
    terms = []
    for number, index in enumerate(product(*(range(b) for b in two))):
        offset = [t * s for t, s in zip(index, apart_second, strict=True)]
        terms.append(_on_lattice(flat[:, number], apart_first, offset, counts))
    return torch.stack(terms).sum(0)


@composite_operator("bias_sequence(Tensor first, Tensor second, int have_second, Tensor? bias) -> Tensor")
def bias_sequence(
    first: torch.Tensor, second: torch.Tensor, have_second: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the bias of two convolutions in sequence: the second applied to the first's bias, plus its own bias."""
    summed = second.reshape(have_second, second.shape[0] // have_second, second.shape[1], -1).sum(-1)
    summed, first = _one_type(summed, first)
    moved = (summed @ first.reshape(have_second, -1, 1)).reshape(-1)
    return moved if bias is None else moved + bias
