"""Products with matrices that stay in few bits: torch's kernels for CPUs, which compute in bfloat16.

A step of one token reads every weight once, so that a matrix in four bits is multiplied about six times as fast as one in
float32. The kernels take bfloat16 alone (of other types they run reference loops, slower than a float product) and
``w = (q - 8) * scale + shift`` with numbers ``q`` of four bits, one scale and one shift, in bfloat16, for each 32, 64, 128
or 256 columns of a row. Numbers of up to eight bits are two of four: ``16 * high + low``, as one product twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..compat import int4_packed, int4_product
from .codes import RANGES, bits_of
from .tensor import QuantisedTensor

GROUPS = (256, 128, 64, 32)
"""Columns for which the kernels take a scale."""
_ROWS = 16
_STRIP = 1024
# from so many rows on, dequantising a matrix costs less than what the kernels lose there
_MANY = {4: 96, 8: 12}


@dataclass(frozen=True, eq=False)
class FewBitProduct:
    """Products with a matrix of few bits, transposed, as ``torch.nn.functional.linear`` has them.

    The matrix that it multiplies by has its scales rounded to bfloat16 (an error of a 500th at most), rows are rounded to
    bfloat16, sums are in float32, and results are rounded to bfloat16.

    Args:
        packed: numbers in the kernel's order, which depends on the processor; None if there is no kernel for the matrix.
        scales: (groups, outputs, 2), bfloat16: scale and shift; twice as many groups where numbers have eight bits.
        group: columns that share a scale.
        words: (outputs, inputs) of eight bits, or (outputs, inputs / 2), two to a byte, the even column in the low bits:
            what many rows are multiplied by, and embeddings are read of; bfloat16 values if there is no kernel.
        bits: 4 or 8; 16 if there is no kernel.
        shape: outputs and inputs.
    """

    packed: torch.Tensor | None
    scales: torch.Tensor
    group: int
    words: torch.Tensor
    bits: int
    shape: tuple[int, int]

    def few_are(self, rows: int) -> bool:
        """Tell whether so many rows are multiplied by the kernel, and not by the dequantised matrix."""
        return self.packed is None or rows < _MANY[self.bits]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product.

        Args:
            x: (..., inputs), of any floating type.

        Returns:
            (..., outputs), bfloat16.
        """
        rows = x.reshape(-1, self.shape[1]).to(torch.bfloat16)
        if self.few_are(rows.shape[0]):
            product = self.few(rows)
        else:
            starts = range(0, self.shape[0], _STRIP)
            product = torch.cat([F.linear(rows, self._values(slice(s, s + _STRIP))) for s in starts], 1)
        return product.reshape(*x.shape[:-1], self.shape[0])

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product with few rows, by the kernel.

        Args:
            rows: (rows, inputs), bfloat16.
        """
        if self.packed is None:
            return F.linear(rows, self.words)
        if self.bits == 8:
            rows = torch.cat((rows, rows), 1)
        product = int4_product(rows, self.packed, self.group, self.scales)
        return product if product.shape[1] == self.shape[0] else product[:, : self.shape[0]]

    def rows(self, entries: torch.Tensor) -> torch.Tensor:
        """Return rows of the matrix.

        Args:
            entries: (...), integers below the number of outputs.

        Returns:
            (..., inputs), bfloat16.
        """
        flat = entries.reshape(-1)
        values = self.words.index_select(0, flat) if self.packed is None else self._values(flat)
        return values.reshape(*entries.shape, self.shape[1])

    def _values(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return some rows of the matrix that the kernel multiplies by, in bfloat16."""
        words, scales = self.words[rows], self.scales[:, : self.shape[0]][:, rows]
        groups = self.shape[1] // self.group
        if self.bits == 8:
            # the scale of the low half, and both shifts
            scale = scales[groups:, :, 0].float()
            shift = scales[:groups, :, 1].float() + scales[groups:, :, 1].float() - 136 * scale
        else:
            words = torch.stack((words & 15, words >> 4), -1)
            scale = scales[:, :, 0].float()
            shift = scales[:, :, 1].float() - 8 * scale
        numbers = words.reshape(-1, groups, self.group)
        values = torch.addcmul(shift.t()[:, :, None], numbers, scale.t()[:, :, None])
        return values.to(torch.bfloat16).reshape(-1, self.shape[1])

    @staticmethod
    def of(form: QuantisedTensor) -> FewBitProduct | None:
        """Return products with a matrix; None if it is no matrix.

        Codes that are no integers, groups of other sizes and columns that choose their scales have no kernel: their values
        are kept in bfloat16.
        """
        if len(form.shape) != 2:
            return None
        outputs, inputs = form.shape
        group = _group(form)
        if group is None or form.code not in RANGES or outputs == 0:
            values = form.dequantise().to(torch.bfloat16)
            return FewBitProduct(None, values.new_empty(0), 0, values, 16, (outputs, inputs))
        bits = 4 if bits_of(form.code) <= 4 else 8
        # a signed number lies in the middle of four, or eight, bits
        bias = (8 if bits == 4 else 128) if RANGES[form.code][0] < 0 else 0
        scale = _of_groups(form, form.scales(), group)
        rounded = scale.to(torch.bfloat16).float()
        zero = 0.0 if form.zero is None else _of_groups(form, form.zero.float(), group)
        # the number that the kernel multiplies the scale by is counted from 8; of both halves, from 8 * 16 + 8
        middle = (8 if bits == 4 else 136) - bias
        shift = (middle - zero) * rounded
        if form.offset is not None:
            shift = shift + _of_groups(form, form.offset.float(), group)
        numbers = (form.codes.to(torch.int16) + bias).to(torch.uint8)
        if bits == 4:
            scales = torch.stack((rounded.t(), shift.t()), -1).to(torch.bfloat16)
            words = numbers[:, ::2] | (numbers[:, 1::2] << 4)
            packed = _packed(numbers)
        else:
            low_shift = shift.to(torch.bfloat16)
            high = torch.stack((16 * rounded.t(), (shift - low_shift.float()).t()), -1).to(torch.bfloat16)
            scales = torch.cat(
                (high, torch.stack((rounded.t(), low_shift.float().t()), -1).to(torch.bfloat16))
            )
            words = numbers
            packed = _packed(torch.cat((numbers >> 4, numbers & 15), 1))
        missing = -outputs % _ROWS
        if missing:
            scales = F.pad(scales, (0, 0, 0, missing))
        return FewBitProduct(packed, scales.contiguous(), group, words, bits, (outputs, inputs))


def _group(form: QuantisedTensor) -> int | None:
    """Return the columns for which the kernel is given a scale; None if it has none of this size."""
    inputs, block = form.shape[1], min(form.block[1], form.shape[1])
    if form.group is not None or block < 1 or inputs % block:
        return None
    return next((g for g in GROUPS if block % g == 0), None)


def _of_groups(form: QuantisedTensor, beside: torch.Tensor, group: int) -> torch.Tensor:
    """Return scales, or zeros, as (outputs, groups of the kernel)."""
    outputs, inputs = form.shape
    rows, columns = min(form.block[0], outputs), min(form.block[1], inputs)
    beside = beside.repeat_interleave(rows, 0)[:outputs] if rows > 1 else beside
    return beside.repeat_interleave(columns // group, 1) if columns > group else beside


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers of four bits in the kernel's order, rows filled up; strips keep what is in memory small."""
    missing = -numbers.shape[0] % _ROWS
    if missing:
        numbers = F.pad(numbers, (0, 0, 0, missing))
    strips = [
        int4_packed(numbers[s : s + _STRIP].to(torch.int32)) for s in range(0, numbers.shape[0], _STRIP)
    ]
    return torch.cat(strips)
