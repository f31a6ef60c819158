"""Weights of few bits in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCKS = (256, 128, 64, 32, 16)
"""Numbers of consecutive inputs that may share a scale."""
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers that four-bit floats stand for."""


class NoKernel(ValueError):
    """A weight has no such layout; the message says why."""


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix ``(code - zero) * scale``.

    Attributes:
        words: (rows, blocks, block · bits / 8), bytes; the first code of a byte is in its lowest bits.
        scales: (rows, blocks).
        zeros: (rows, ceil(blocks · bits / 8)) bytes of packed codes, or (rows, blocks) real; None for half of the range.
        bits: 2, 4 or 8.
        block: columns that share a scale.
        columns: of the matrix; the last block may hold fewer.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int
    columns: int

    def flat(self) -> BlockMatrix:
        """Return the same with words (rows, blocks · block · bits / 8), as an embedding has them."""
        return replace(self, words=self.words.flatten(1))


def layout(code: str, block: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the bits and the block of a matrix whose codes and scales are given.

    Args:
        code: "int4", "uint8", "e2m1" and others.
        block: entries along each dimension that share a scale.
        shape: (rows, columns).

    Raises:
        NoKernel: it cannot be expressed.
    """
    if len(shape) != 2:
        raise NoKernel("it is no matrix")
    if code == "e2m1":
        bits = 8
    elif code.lstrip("u").startswith("int"):
        width = int(code.lstrip("uint"))
        bits = next(b for b in (2, 4, 8) if b >= width)
    else:
        raise NoKernel(f"its codes are {code}")
    rows, columns = block
    if rows != 1:
        raise NoKernel(f"{rows} rows share a scale" if rows else "columns choose their scales")
    if columns == 0:
        raise NoKernel("columns choose their scales")
    if columns >= shape[1]:
        # one scale for each row is the same scale for every block
        return bits, next((b for b in BLOCKS if b <= shape[1] and shape[1] % b == 0), 32)
    found = next((b for b in BLOCKS if columns % b == 0), None)
    if found is None:
        raise NoKernel(f"{columns} columns share a scale, which is no multiple of 16")
    return bits, found


def block_matrix(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    code: str,
    block: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> BlockMatrix:
    """Return a matrix ``(number(code) - zero) * scale + offset`` in the layout of the kernels.

    Scales stay as they are, but for their type; one for more columns than a kernel's block is repeated. An offset becomes a
    real zero.

    Args:
        codes: (rows, columns), one to an element.
        scale: one for each block.
        zero: of the scale's shape, or None for 0.
        offset: of the scale's shape, or None for 0.
        code: see :func:`layout`.
        block: entries along each dimension that share a scale.
        dtype: of the scales, and of the values that the matrix is multiplied with.

    Raises:
        NoKernel: it cannot be expressed.
    """
    rows, columns = codes.shape
    bits, width = layout(code, block, (rows, columns))
    blocks = -(-columns // width)
    numbers, scale = codes.to(torch.int16), scale.to(torch.float32)
    if code == "e2m1":
        numbers, scale = torch.tensor(_E2M1, dtype=torch.int16)[codes.to(torch.int64)], scale / 2
    middle = 0 if code.startswith("u") else 1 << (bits - 1)
    numbers = numbers + middle
    zeros = torch.zeros_like(scale) if zero is None else zero.to(torch.float32)
    if code == "e2m1" and zero is not None:
        zeros = zeros * 2
    if offset is not None:
        # a block without a scale is its offset alone
        empty = scale == 0
        shift = offset.to(torch.float32)
        still = empty.repeat_interleave(min(block[1], columns), 1)[:, :columns]
        numbers = torch.where(still, middle, numbers)
        zeros = torch.where(empty, -1.0, zeros - shift / torch.where(empty, 1.0, scale))
        scale = torch.where(empty, shift, scale)
    zeros = zeros + middle
    scale, zeros = (_repeated(t, block[1], width, blocks) for t in (scale, zeros))
    packed: Tensor | None
    if bool((zeros == 1 << (bits - 1)).all()):
        packed = None
    elif bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << bits)).all()):
        packed = _packed(zeros.to(torch.uint8), bits)
    elif bits == 8:
        raise NoKernel("its zeros are not codes of eight bits")
    else:
        packed = zeros.to(dtype)
    padded = torch.nn.functional.pad(numbers.to(torch.uint8), (0, blocks * width - columns))
    words = _packed(padded, bits).reshape(rows, blocks, width * bits // 8)
    return BlockMatrix(words, scale.to(dtype), packed, bits, width, columns)


def _repeated(beside: Tensor, given: int, width: int, blocks: int) -> Tensor:
    """Return scales, or zeros, one for each block of the kernel."""
    times = blocks if beside.shape[1] == 1 else given // width
    return beside.repeat_interleave(times, 1)[:, :blocks].contiguous()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return bytes of codes along the last dimension, the first in the lowest bits, filled up with zeros."""
    count = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count))
    parts = filled.reshape(*filled.shape[:-1], -1, count)
    joined = torch.zeros(parts.shape[:-1], dtype=torch.uint8)
    for place in range(count):
        joined |= parts[..., place] << (bits * place)
    return joined
