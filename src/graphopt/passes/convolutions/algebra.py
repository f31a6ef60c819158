"""Kernels of sums and sequences of convolutions, in torch functions that run on tensors and on nodes alike.

A kernel is (outputs, inputs / groups, *taps). The rules are those of RepVGG (Ding et al., 2021), ACNet, DBB and
MobileOne; numbers in comments follow the list in ``docs/notes/fuse-branches.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch.nn import functional as F

Kernel = Any
Vector = Any


def on_diagonal(vector: Vector, groups: int, axes: int) -> Kernel:
    """Return the kernel that multiplies channel c by ``vector[c]``: one tap (rules 5 and 13)."""
    channels = int(vector.shape[0])
    each = channels // groups
    square = torch.diag_embed(torch.reshape(vector, [groups, each]))
    return torch.reshape(square, [channels, each, *[1] * axes])


def with_groups(kernel: Kernel, have: int, want: int) -> Kernel:
    """Return the same map with fewer groups: blocks on the diagonal, zeros beside them (rule 12)."""
    if have == want:
        return kernel
    shape = [int(s) for s in kernel.shape]
    blocks, outputs, inputs, taps = have // want, shape[0] // have, shape[1], math.prod(shape[2:])
    apart = torch.reshape(kernel, [want, blocks, outputs, inputs, taps])
    spread = torch.diag_embed(
        torch.permute(apart, [0, 2, 3, 4, 1])
    )  # want, outputs, inputs, taps, block, block
    joined = torch.permute(spread, [0, 4, 1, 5, 2, 3])
    return torch.reshape(joined, [shape[0], blocks * inputs, *shape[2:]])


def on_lattice(kernel: Kernel, ratios: Sequence[int], before: Sequence[int], counts: Sequence[int]) -> Kernel:
    """Lay taps out on a finer or longer lattice: tap k comes to ``before + ratio * k`` (rules 4 and 10)."""
    for axis, (ratio, low, count) in enumerate(zip(ratios, before, counts, strict=True)):
        shape = [int(s) for s in kernel.shape]
        place = axis + 2
        taps: int = shape[place]
        if ratio > 1 and taps > 1:
            behind = shape[place + 1 :]
            apart = torch.reshape(kernel, [*shape[: place + 1], 1, *behind])
            apart = F.pad(apart, [*[0] * (2 * len(behind)), 0, ratio - 1])
            kernel = torch.reshape(apart, [*shape[:place], taps * ratio, *behind])
            kernel = torch.narrow(kernel, place, 0, (taps - 1) * ratio + 1)
            taps = (taps - 1) * ratio + 1
        if taps != count:
            later = len(shape) - place - 1
            kernel = F.pad(kernel, [*[0] * (2 * later), low, count - taps - low])
    return kernel


def in_sequence(
    first: Kernel,
    first_bias: Vector | None,
    second: Kernel,
    second_bias: Vector | None,
    groups: int,
    places: Sequence[tuple[int, int, int]],
) -> tuple[Kernel, Vector | None]:
    """Return the kernel of two convolutions one after the other (rules 7, 8, 9 and 11).

    Args:
        first: applied first, with ``groups`` groups, as the second has.
        first_bias: may be None.
        second: applied to what the first gives.
        second_bias: may be None.
        groups: of both, and of the result.
        places: per axis, how far apart the result's lattice places taps of the second and of the first, and
            how many taps the result has.
    """
    one = [int(s) for s in first.shape]
    two = [int(s) for s in second.shape]
    middle, inputs, outputs = one[0] // groups, one[1], two[0] // groups
    taps_one, taps_two = math.prod(one[2:]), math.prod(two[2:])
    left = torch.reshape(second, [groups, outputs, middle, taps_two])
    left = torch.reshape(torch.permute(left, [0, 1, 3, 2]), [groups, outputs * taps_two, middle])
    right = torch.reshape(first, [groups, middle, inputs * taps_one])
    every = torch.matmul(left, right)  # each tap of the second with each of the first
    every = torch.reshape(every, [groups * outputs, *two[2:], inputs, *one[2:]])
    bias = second_bias
    if first_bias is not None:
        summed = torch.sum(torch.reshape(second, [groups, outputs, middle, taps_two]), [3])
        moved = torch.matmul(summed, torch.reshape(first_bias, [groups, middle, 1]))
        moved = torch.reshape(moved, [groups * outputs])
        bias = moved if bias is None else torch.add(moved, bias)
    return _gathered(every, one[2:], two[2:], places), bias


def _gathered(
    every: Kernel, one: Sequence[int], two: Sequence[int], places: Sequence[tuple[int, int, int]]
) -> Kernel:
    """Add products of taps up where they meet: (outputs, *taps of two, inputs, *taps of one) to a kernel."""
    axes = len(one)
    every_shape = [int(s) for s in every.shape]
    outputs, inputs = every_shape[0], every_shape[axes + 1]
    counts = [count for _, _, count in places]
    if all(a == 1 or b == 1 for a, b in zip(one, two, strict=True)):
        order = [0, axes + 1]
        for axis in range(axes):
            order += [1 + axis, axes + 2 + axis]
        kernel = torch.reshape(
            torch.permute(every, order), [outputs, inputs, *(a * b for a, b in zip(one, two, strict=True))]
        )
        ratios = [p[1] if a > 1 else p[0] for a, p in zip(one, places, strict=True)]
        return on_lattice(kernel, ratios, [0] * axes, counts)
    total = None
    flat = torch.reshape(every, [outputs, math.prod(two), inputs, *one])
    for number, tap in enumerate(product(*(range(b) for b in two))):
        part = torch.reshape(torch.narrow(flat, 1, number, 1), [outputs, inputs, *one])
        at = [t * p[0] for t, p in zip(tap, places, strict=True)]
        part = on_lattice(part, [p[1] for p in places], at, counts)
        total = part if total is None else torch.add(total, part)
    return total
