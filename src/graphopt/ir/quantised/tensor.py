"""A tensor as codes of few bits with scales, and its entries selected, moved and joined without leaving that form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .codes import CannotExpress, bits_of, numbers


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A tensor whose entries are ``(number(code) - zero) * scale + offset``, in float32, rounded once to ``dtype``.

    Args:
        codes: of the tensor's shape, one code to an element (``codes.STORED``).
        scale: one for each block: along dimension ``d``, ``ceil(shape[d] / block[d])``.
        code: what a code stands for: "int4", "uint8", "e4m3", "e2m1", "nf4" and others (``codes.RANGES``).
        block: how many entries along each dimension share a scale; the last block may be shorter.
        dtype: of the values.
        zero: of the scale's shape: the number, not always an integer, that stands for 0; None for 0 itself.
        offset: of the scale's shape, added after scaling; None for 0.
        group: for formats in which columns choose their scales: entry ``c`` is which scale column ``c`` of the dimension
            ``group_dim`` has. The block along it is then 0.
        group_dim: see ``group``.
        divisor: one number by which scales are divided, where a format keeps it apart (NVFP4 of compressed-tensors).
        multiplier: one number by which scales are multiplied, where a format keeps it apart (NVFP4 of ModelOpt).
        constant: a number by which values are multiplied after scaling, in float32 (1 / 127 in bitsandbytes).
        among: sixteen numbers in place of the code's own (NF4 files bring them).
        casts: types to which the value is rounded after ``dtype``, one after another.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    code: str
    block: tuple[int, ...]
    dtype: torch.dtype
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    group: torch.Tensor | None = None
    group_dim: int = -1
    divisor: torch.Tensor | None = None
    multiplier: torch.Tensor | None = None
    constant: float = 1.0
    among: torch.Tensor | None = None
    casts: tuple[torch.dtype, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's sizes."""
        return tuple(self.codes.shape)

    @property
    def value_dtype(self) -> torch.dtype:
        """The type of the values that :meth:`dequantise` returns."""
        return self.casts[-1] if self.casts else self.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales, zeros and offsets, codes packed."""
        beside = [t for t in (self.scale, self.zero, self.offset, self.group) if t is not None]
        packed = math.ceil(self.codes.numel() * bits_of(self.code) / 8)
        return packed + sum(t.numel() * t.dtype.itemsize for t in beside)

    @property
    def kept_as(self) -> str:
        """What a listing of the program says of a weight that is kept so."""
        block = "x".join(
            "any" if b == 0 else str(min(b, s)) for b, s in zip(self.block, self.shape, strict=True)
        )
        return f"kept as {self.code} in blocks of {block}"

    def scales(self) -> torch.Tensor:
        """Return the scales in float32, with the numbers that the format keeps apart."""
        scale = self._stored_scales()
        return scale if self.constant == 1 else scale * self.constant

    def _stored_scales(self) -> torch.Tensor:
        scale = self.scale.to(torch.float32)
        if self.divisor is not None:
            scale = scale / self.divisor.to(torch.float32)
        return scale if self.multiplier is None else scale * self.multiplier.to(torch.float32)

    def spread(self, beside: torch.Tensor) -> torch.Tensor:
        """Return scales, or zeros, with one entry for each of the tensor's, or that broadcast to it."""
        for dim, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if self.group is not None and dim == self.group_dim:
                beside = beside.index_select(dim, self.group)
            elif 1 < block < size:
                beside = beside.repeat_interleave(block, dim).narrow(dim, 0, size)
        return beside

    def dequantise(self) -> torch.Tensor:
        """Return the values: computed in float32 and rounded once, in the type ``dtype``; then the casts."""
        value = numbers(self.codes, self.code, self.among)
        if self.zero is not None:
            value = value - self.spread(self.zero.to(torch.float32))
        value = value * self.spread(self._stored_scales())
        if self.constant != 1:
            value = value * self.constant
        if self.offset is not None:
            value = value + self.spread(self.offset.to(torch.float32))
        for dtype in (self.dtype, *self.casts):
            value = value.to(dtype)
        return value

    def _each(self, function: object, **changes: object) -> QuantisedTensor:
        """Return the tensor with codes, scales, zeros and offsets changed alike."""
        apply = function
        assert callable(apply)
        parts = {
            name: None if part is None else apply(part)
            for name, part in (("scale", self.scale), ("zero", self.zero), ("offset", self.offset))
        }
        return replace(self, **{**parts, **changes})  # type: ignore[arg-type]

    def take(self, dim: int, entries: torch.Tensor) -> QuantisedTensor:
        """Return the entries with these numbers along a dimension.

        Raises:
            CannotExpress: they do not fill whole blocks.
        """
        dim %= len(self.shape)
        size, block = self.shape[dim], self.block[dim]
        codes = self.codes.index_select(dim, entries.to(self.codes.device))
        if self.group is not None and dim == self.group_dim:
            return replace(self, codes=codes, group=self.group.index_select(0, entries))
        if block >= size and len(entries):
            return replace(self, codes=codes, block=_with(self.block, dim, len(entries)))
        runs = _whole_blocks(entries, block, size)
        if runs is None:
            raise CannotExpress(
                f"entries are taken from within blocks of {block} that share a scale, along dimension {dim}"
            )
        return self._each(lambda part: part.index_select(dim, runs.to(part.device)), codes=codes)

    def permute(self, order: Sequence[int]) -> QuantisedTensor:
        """Return the tensor with its dimensions in another order."""
        order = [d % len(self.shape) for d in order]
        return self._each(
            lambda part: part.permute(*order),
            codes=self.codes.permute(*order),
            block=tuple(self.block[d] for d in order),
            group_dim=order.index(self.group_dim) if self.group is not None else -1,
        )

    def reshape(self, shape: Sequence[int]) -> QuantisedTensor:
        """Return the tensor with other dimensions over the same entries in the same order.

        Raises:
            CannotExpress: entries that share a scale would be no block of the new shape.
        """
        codes = self.codes.reshape(tuple(shape))
        block: list[int] = []
        scale_shape: list[int] = []
        group_dim = -1
        for old, new in _factors(self.shape, tuple(codes.shape)):
            if self.group is not None and self.group_dim in old:
                others = [d for d in old if d != self.group_dim and self.shape[d] != 1]
                if others or len([s for s in new if s != 1]) > 1:
                    raise CannotExpress("columns that choose their scales are divided or joined")
                place = next((i for i, s in enumerate(new) if s != 1), 0)
                group_dim = len(block) + place
                block += [0 if i == place else 1 for i in range(len(new))]
                scale_shape += [
                    self.scale.shape[self.group_dim] if i == place else 1 for i in range(len(new))
                ]
                continue
            flat = _joined([self.shape[d] for d in old], [self.block[d] for d in old])
            found = _divided(flat, new)
            block += found
            scale_shape += [-(-s // b) if s else 0 for s, b in zip(new, found, strict=True)]
        return self._each(
            lambda part: part.reshape(scale_shape), codes=codes, block=tuple(block), group_dim=group_dim
        )

    def cast(self, dtype: torch.dtype) -> QuantisedTensor:
        """Return the tensor with its values rounded to another type."""
        return self if dtype == self.value_dtype else replace(self, casts=(*self.casts, dtype))


def concatenate(parts: Sequence[QuantisedTensor], dim: int) -> QuantisedTensor:
    """Return tensors joined along a dimension.

    Raises:
        CannotExpress: they are not of one code, type and block, or a block would end within.
    """
    first = parts[0]
    dim %= len(first.shape)
    if len({(p.code, p.dtype, p.casts, p.scale.dtype, p.constant) for p in parts}) > 1:
        raise CannotExpress("tensors of different codes or types are joined")
    for name in ("zero", "offset", "group"):
        if len({getattr(p, name) is None for p in parts}) > 1:
            raise CannotExpress(f"tensors with and without a {name} are joined")
    for name in ("divisor", "multiplier", "among"):
        present = [getattr(p, name) for p in parts]
        if any(p is not None for p in present) and not all(
            p is not None and _same(p, present[0]) for p in present
        ):
            raise CannotExpress("tensors whose scales have different common factors are joined")
    blocks = {
        tuple(min(b, s) for d, (b, s) in enumerate(zip(p.block, p.shape, strict=True)) if d != dim)
        for p in parts
    }
    if len(blocks) > 1:
        raise CannotExpress("tensors with blocks of different sizes are joined")
    block = _joint_block(parts, dim)
    group = first.group
    if group is not None:
        if dim == first.group_dim:
            counts = [0]
            for part in parts:
                counts.append(counts[-1] + part.scale.shape[dim])
            group = torch.cat(
                [p.group + n for p, n in zip(parts, counts, strict=False) if p.group is not None]
            )
        elif not all(p.group is not None and _same(p.group, group) for p in parts):
            raise CannotExpress("tensors whose columns choose their scales differently are joined")

    def joined(name: str) -> torch.Tensor | None:
        return None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts], dim)

    scale = joined("scale")
    assert scale is not None
    return replace(
        first, codes=torch.cat([p.codes for p in parts], dim), scale=scale, zero=joined("zero"), offset=joined("offset"),
        group=group, block=_with(first.block, dim, block),
    )  # fmt: skip


def _joint_block(parts: Sequence[QuantisedTensor], dim: int) -> int:
    if any(p.group is not None and p.group_dim == dim for p in parts):
        return 0
    blocks = {p.block[dim] for p in parts}
    # a tensor of one block is one of blocks of its size
    whole = {p.shape[dim] for p in parts if p.block[dim] >= p.shape[dim]}
    for block in sorted({*blocks, *whole}):
        if all(p.block[dim] == block or (p.block[dim] >= p.shape[dim] == block) for p in parts) and all(
            p.shape[dim] % block == 0 for p in parts[:-1]
        ):
            return block
    raise CannotExpress("tensors are joined in the middle of a block that shares a scale")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.device.type == "meta" or other.device.type == "meta":
        return one.shape == other.shape
    return torch.equal(one, other)


def _with(block: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*block[:dim], size, *block[dim + 1 :])


def _whole_blocks(entries: torch.Tensor, block: int, size: int) -> torch.Tensor | None:
    """Return which blocks entries fill one after another, or None if they do not; the last may stop short."""
    if block == 1:
        return entries
    firsts = entries[::block]
    within = torch.arange(len(entries)) % block
    expected = firsts.repeat_interleave(block)[: len(entries)] + within
    if not torch.equal(entries, expected) or bool((firsts % block).any()):
        return None
    # a block that is shorter, at the end of the tensor, may only stay the last
    short = size % block
    if short and len(firsts) > 1 and bool((firsts[:-1] == size - short).any()):
        return None
    return firsts // block


def _factors(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return runs of dimensions of one shape that hold as many entries as a run of the other, as short as can be.

    Returns:
        Pairs of the old dimensions' numbers and the new dimensions' sizes.
    """
    if 0 in old:
        raise CannotExpress("a tensor without entries is reshaped")
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        dims: list[int] = []
        sizes: list[int] = []
        left = right = 1
        while True:
            if left == right and dims and sizes:
                break
            if left <= right and i < len(old):
                dims.append(i)
                left *= old[i]
                i += 1
            elif j < len(new):
                sizes.append(new[j])
                right *= new[j]
                j += 1
            elif i < len(old):
                dims.append(i)
                left *= old[i]
                i += 1
            else:
                break
        if not sizes and found:
            found[-1][0].extend(dims)
        elif not dims and found:
            found[-1][1].extend(sizes)
        else:
            found.append((dims, sizes))
    return found


def _joined(sizes: list[int], blocks: list[int]) -> tuple[int, int]:
    """Return the size and the block of several dimensions made one.

    Raises:
        CannotExpress: entries that share a scale would not follow one another.
    """
    size, block = 1, 1
    for inner, inner_block in zip(reversed(sizes), reversed(blocks), strict=True):
        if inner == 1:
            continue
        inner_block = min(inner_block, inner)
        if block == size:  # everything so far shares a scale
            block *= inner_block
        elif inner_block != 1 or size % block:
            raise CannotExpress("dimensions with blocks of their own are joined")
        size *= inner
    return size, block


def _divided(flat: tuple[int, int], sizes: list[int]) -> list[int]:
    """Return the blocks of the dimensions into which one is divided.

    Raises:
        CannotExpress: a block would cross the border of a dimension.
    """
    _, block = flat
    found: list[int] = []
    for size in reversed(sizes):
        if block >= size:
            if block % size and size != 1:
                raise CannotExpress(
                    f"a dimension is divided in the middle of a block that shares a scale ({block})"
                )
            found.append(size)
            block = block // size if size else block
        else:
            if (
                size % block
                and len(found) < len(sizes) - 1
                and math.prod(sizes[: len(sizes) - 1 - len(found)]) != 1
            ):
                raise CannotExpress(
                    f"a dimension is divided in the middle of a block that shares a scale ({block})"
                )
            found.append(block)
            block = 1
    return found[::-1]
