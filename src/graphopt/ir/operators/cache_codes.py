"""Keys and values of a cache as integers of few bits, with scales for each token that never change once they are stored.

Eight bits are symmetric: ``value = code * scale``, codes of -127 to 127 in int8. Four bits have a low value beside the
scale: ``value = low + code * scale``, codes of 0 to 15, two to a byte in uint8: entry i of a vector in the low half of
byte i, entry i + size / 2 in the high half. A scale belongs to a group of neighbouring entries of one token's vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from .along import last_mixed, tensors_of
from .library import composite_operator
from .placement_types import WHOLE, Joined, Misplaced, Partial, Placement, Shard
from .spec import OperatorSpec
from .work import Call, Work, moved

LARGEST = {8: 127, 4: 15}
"""Largest code by number of bits."""


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    found = {n: placed[n] for n in tensors_of(node)}
    first = next(iter(found.values()), WHOLE)
    for operand, placement in found.items():
        if placement != first:
            raise Misplaced(f"{operand.name} is {placement}, and other operands are {first}")
        if isinstance(placement, (Partial, Joined)) or (isinstance(placement, Shard) and placement.dim == 3):
            raise Misplaced(f"{operand.name} is {placement}, and vectors must be whole")
    return first


def _grouped(values: Tensor, *others: object, group: int) -> Tensor:
    return values.new_empty((*values.shape[:-1], values.shape[-1] // group))


def _coded(values: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    size = values.shape[-1] if low is None else values.shape[-1] // 2
    return values.new_empty((*values.shape[:-1], size), dtype=torch.int8 if low is None else torch.uint8)


def _loaded(codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    size = codes.shape[-1] if low is None else 2 * codes.shape[-1]
    return scale.new_empty((*codes.shape[:-1], size))


def _ranged(call: Call) -> Work:
    """FLOPs: two comparisons for each entry, and a division for each group."""
    return moved(call, 2 * call.tensor("values").numel + call.output.numel)


def _coding(call: Call) -> Work:
    """FLOPs: subtract, divide and round each entry."""
    return moved(call, 3 * call.tensor("values").numel)


def _loading(call: Call) -> Work:
    """FLOPs: a product for each entry, and a sum where there is a low value; bytes: as stored, and the result."""
    return moved(call, (1 if call.arguments.get("low") is None else 2) * call.output.numel)


def _in_groups(values: Tensor, groups: int) -> Tensor:
    """Return (..., groups, size / groups)."""
    return values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which scales and codes of a type's values are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _least(dtype: torch.dtype) -> float:
    """Return the smallest scale: below it, a scale would be rounded by more than its codes allow."""
    return 2.0**-17 if dtype == torch.float16 else float(torch.finfo(dtype).tiny)


def _most(dtype: torch.dtype) -> float:
    """Return the largest scale of eight bits that a type represents and whose largest code does not overflow."""
    limits = torch.finfo(dtype)
    digits = 1 - round(math.log2(limits.eps))
    mantissa, exponent = math.frexp(float(limits.max) / LARGEST[8])
    return math.ldexp(math.floor(math.ldexp(mantissa, digits)), exponent - digits)


@composite_operator(
    "cache_low(Tensor values, *, int group) -> Tensor",
    spec=OperatorSpec(shape=_grouped, work=_ranged, place=_place, dimensions=last_mixed),
)
def cache_low(values: Tensor, *, group: int) -> Tensor:
    """Return the least entry of each group.

    Args:
        values: (batch, key-value heads, tokens, size).
        group: entries of a vector that share a scale; divides the size.

    Returns:
        (batch, key-value heads, tokens, size / group).
    """
    return _in_groups(values, values.shape[-1] // group).amin(-1)


@composite_operator(
    "cache_scale(Tensor values, Tensor? low=None, *, int group) -> Tensor",
    spec=OperatorSpec(shape=_grouped, work=_ranged, place=_place, dimensions=last_mixed),
)
def cache_scale(values: Tensor, low: Tensor | None = None, *, group: int) -> Tensor:
    """Return the size of a step of each group's codes: ``max |x| / 127``, or ``(max x - low) / 15`` of four bits.

    No entry is further from its code's value than half a step, and no code's value overflows. The smallest step is that of
    the smallest normal number (2^-17 in float16), so that zeros have one as well.

    Args:
        values: (batch, key-value heads, tokens, size).
        low: (batch, key-value heads, tokens, size / group), of :func:`cache_low`; None for eight bits.
        group: entries of a vector that share a scale.

    Returns:
        (batch, key-value heads, tokens, size / group), in the type of the values.
    """
    dtype, arithmetic = values.dtype, wide(values.dtype)
    grouped = _in_groups(values, values.shape[-1] // group)
    if low is None:
        steps = grouped.abs().amax(-1).to(arithmetic) / LARGEST[8]
        return steps.clamp(_least(dtype), _most(dtype)).to(dtype)
    # rounded down, so that the largest code is never beyond the largest entry
    share = (1 - 2 * torch.finfo(dtype).eps) / LARGEST[4]
    steps = (grouped.amax(-1).to(arithmetic) - low.to(arithmetic)) * share
    return steps.clamp(_least(dtype), torch.finfo(arithmetic).max * share).to(dtype)


@composite_operator(
    "cache_codes(Tensor values, Tensor scale, Tensor? low=None) -> Tensor",
    spec=OperatorSpec(shape=_coded, work=_coding, place=_place, dimensions=last_mixed),
)
def cache_codes(values: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """Return the nearest codes of keys or values.

    Args:
        values: (batch, key-value heads, tokens, size).
        scale: (batch, key-value heads, tokens, groups), of :func:`cache_scale`.
        low: of the same shape, for four bits; None for eight.

    Returns:
        (batch, key-value heads, tokens, size), int8; for four bits (..., size / 2), uint8.
    """
    arithmetic = wide(values.dtype)
    groups = scale.shape[-1]
    grouped = _in_groups(values.to(arithmetic), groups)
    if low is not None:
        grouped = grouped - low.to(arithmetic).unsqueeze(-1)
    steps = (grouped / scale.to(arithmetic).unsqueeze(-1)).round().flatten(-2)
    if low is None:
        return steps.clamp(-LARGEST[8], LARGEST[8]).to(torch.int8)
    first, second = steps.clamp(0, LARGEST[4]).chunk(2, -1)
    return (second * 16 + first).to(torch.uint8)


@composite_operator(
    "cache_load(Tensor codes, Tensor scale, Tensor? low=None) -> Tensor",
    spec=OperatorSpec(shape=_loaded, work=_loading, place=_place, dimensions=last_mixed),
)
def cache_load(codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """Return the keys or values that codes stand for.

    Args:
        codes: (batch, key-value heads, slots, size), int8; with ``low`` (..., size / 2), uint8, two codes to a byte.
        scale: (batch, key-value heads, slots, groups).
        low: of the same shape.

    Returns:
        (batch, key-value heads, slots, size), in the type of the scales, rounded once.
    """
    groups = scale.shape[-1]
    if low is None:
        if groups == 1:
            return codes.to(scale.dtype) * scale
        grouped = _in_groups(codes.to(scale.dtype), groups)
        return (grouped * scale.unsqueeze(-1)).flatten(-2)
    arithmetic = wide(scale.dtype)
    # no shift: ONNX's exporter translates that of bytes wrongly
    first, second = torch.bitwise_and(codes, 15), torch.bitwise_and(codes, 240)
    unpacked = torch.cat([first.to(arithmetic), second.to(arithmetic) / 16], -1)
    grouped = _in_groups(unpacked, groups)
    loaded = grouped * scale.to(arithmetic).unsqueeze(-1) + low.to(arithmetic).unsqueeze(-1)
    return loaded.flatten(-2).to(scale.dtype)
