"""Codes of few bits: the numbers that they stand for, and how they are packed into words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..errors import GraphoptError

# numbers of one sign, two exponent and one mantissa bit (Open Compute Project, Microscaling Formats 1.0)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# quantiles of a normal distribution (QLoRA, Dettmers and others, 2023, appendix E)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TABLES = {"e2m1": (*_E2M1, *(-value for value in _E2M1)), "nf4": _NF4}
RANGES = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in range(2, 9)},
}
"""Least and largest number of each integer code."""
_BITS = {"e4m3": 8, "e2m1": 4, "nf4": 4} | {name: int(name.lstrip("uint")) for name in RANGES}
STORED = {"e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8, "nf4": torch.uint8} | {
    name: torch.uint8 if name.startswith("u") else torch.int8 for name in RANGES
}
"""Element type that codes have unpacked, one to an element."""


def bits_of(code: str) -> int:
    """Return how many bits a number takes in a code."""
    return _BITS[code]


@lru_cache(maxsize=8)
def table(code: str) -> torch.Tensor | None:
    """Return the number that each code stands for, in float32; None for integers and eight-bit floats."""
    numbers = _TABLES.get(code)
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float32)


def numbers(codes: torch.Tensor, code: str, among: torch.Tensor | None = None) -> torch.Tensor:
    """Return what codes stand for, in float32; ``among`` is a table of the file's own, in place of the code's."""
    listed = table(code) if among is None else among
    if listed is None:
        return codes.to(torch.float32)
    if codes.device.type == "meta":
        return torch.empty(codes.shape, dtype=torch.float32, device="meta")
    return listed[codes.to(torch.int32)]


def unpack(
    words: torch.Tensor, bits: int, dim: int, count: int, order: Sequence[int] | None = None
) -> torch.Tensor:
    """Return the numbers that words hold along a dimension, each in ``bits`` bits without sign, the lowest first.

    Args:
        words: of any integer type.
        bits: of a number; words hold a whole number of them.
        dim: along which each word holds several numbers.
        count: how many numbers there are along it; bits beyond are padding.
        order: entry ``k`` is which of a word's numbers its ``k``-th lowest bits hold; by default ``k``.

    Returns:
        uint8, with ``count`` entries along ``dim``.
    """
    width = words.dtype.itemsize * 8 // bits
    dim %= words.dim()
    last = words.movedim(dim, -1)
    place = range(width) if order is None else sorted(range(width), key=lambda k: order[k])
    shifts = torch.tensor([bits * k for k in place], dtype=words.dtype, device=words.device)
    # the sign of a word is a bit like the others: the mask takes what shifting repeats of it
    parts = torch.bitwise_right_shift(last.unsqueeze(-1), shifts).bitwise_and(2**bits - 1).to(torch.uint8)
    return parts.flatten(-2)[..., :count].movedim(-1, dim)


def pack(
    values: torch.Tensor, bits: int, dim: int, dtype: torch.dtype, order: Sequence[int] | None = None
) -> torch.Tensor:
    """Return words that :func:`unpack` reads; the last word along the dimension is filled up with zeros.

    Args:
        values: numbers without sign, below ``2 ** bits``.
        bits: of a number.
        dim: along which numbers are joined into words.
        dtype: of the words.
        order: see :func:`unpack`.
    """
    width = dtype.itemsize * 8 // bits
    dim %= values.dim()
    last = values.movedim(dim, -1)
    missing = -last.shape[-1] % width
    if missing:
        last = torch.nn.functional.pad(last, (0, missing))
    parts = last.reshape(*last.shape[:-1], -1, width).to(torch.int64)
    if order is not None:
        parts = parts[..., list(order)]
    shifts = torch.tensor([bits * k for k in range(width)], dtype=torch.int64, device=values.device)
    joined = torch.bitwise_left_shift(parts, shifts).sum(-1)
    size = dtype.itemsize * 8
    if dtype.is_signed and size < 64:
        # what does not fit below the sign bit wraps around
        joined = torch.where(joined >= 2 ** (size - 1), joined - 2**size, joined)
    return joined.to(dtype).movedim(-1, dim).contiguous()


def slot_of(code: str) -> int:
    """Return the bits that a packed code takes: those of 3, 5, 6 and 7 bits would cross the borders of bytes."""
    bits = bits_of(code)
    return bits if 8 % bits == 0 else (4 if bits < 4 else 8)


def packed_width(code: str, count: int) -> tuple[int, torch.dtype]:
    """Return how many bytes hold so many codes of a row, and their type; codes of eight bits keep theirs."""
    slot = slot_of(code)
    return (count, STORED[code]) if bits_of(code) == 8 else (-(-count * slot // 8), torch.uint8)


def offset_binary(codes: torch.Tensor, code: str) -> torch.Tensor:
    """Return signed numbers as numbers without sign, the least as 0; numbers without sign as they are."""
    low = RANGES[code][0]
    return codes.to(torch.uint8) if not low else (codes.to(torch.int16) - low).to(torch.uint8)


def from_offset_binary(values: torch.Tensor, code: str) -> torch.Tensor:
    """Return the numbers of a code from :func:`offset_binary`."""
    low = RANGES[code][0]
    return values.to(torch.uint8) if not low else (values.to(torch.int16) + low).to(torch.int8)


class CannotExpress(GraphoptError):
    """Codes and scales cannot say what is wanted of them, for the reason given."""
