"""Rounding a matrix to codes of few bits: nearest, by half-quadratic splitting, or fitted to its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.quantised.codes import RANGES, STORED
from ...ir.quantised.tensor import QuantisedTensor
from .rounding import compensation, rounded_in_turn, strips

_TINY = 1e-12


def code_of(bits: int, symmetric: bool) -> str:
    """Return the code of integers: with a sign where 0 stands for 0."""
    return f"{'int' if symmetric else 'uint'}{bits}"


def steps_of(groups: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero of groups of numbers.

    Symmetric: the number of largest size, with its sign, becomes the least integer, which uses the whole range. Otherwise
    the range that holds all numbers and 0 is divided evenly.

    Args:
        groups: (..., numbers that share a scale).
        bits: of a code.
        symmetric: whether 0 stands for 0.
        dtype: that scales are stored in: they are rounded to it before codes are chosen.

    Returns:
        Both without the last dimension; zeros are whole numbers.
    """
    if symmetric:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = (largest / RANGES[f"int{bits}"][0]).to(dtype)
        return torch.where(scale == 0, torch.ones_like(scale), scale), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    steps = 2**bits - 1
    scale = ((high - low) / steps).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale.to(groups.dtype)).round().clamp(0, steps).to(torch.uint8)


def _coded(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return the codes nearest to values; scale and zero broadcast."""
    low, high = RANGES[code_of(bits, zero is None)]
    shifted = values / scale.to(values.dtype)
    return (shifted.round() if zero is None else (shifted + zero.to(values.dtype)).round()).clamp(low, high)


def nearest(weight: Tensor, bits: int, group: int, symmetric: bool) -> QuantisedTensor:
    """Return a matrix, or stack of matrices, with each number rounded to the nearest code.

    Args:
        weight: (..., inputs).
        bits: of a code.
        group: inputs that share a scale.
        symmetric: whether 0 stands for 0.
    """
    flat, shape = weight.reshape(-1, weight.shape[-1]), weight.shape
    parts = []
    for rows in strips(flat):
        grouped = flat[rows].float().reshape(-1, flat.shape[1] // group, group)
        scale, zero = steps_of(grouped, bits, symmetric, weight.dtype)
        codes = _coded(grouped, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), bits)
        parts.append((codes.to(STORED[code_of(bits, symmetric)]), scale, zero))
    codes, scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    zeros = None if symmetric else torch.cat([zero for *_, zero in parts if zero is not None])
    return _tensor(
        codes.reshape(shape), scales.reshape(*shape[:-1], scales.shape[-1]),
        None if zeros is None else zeros.reshape(*shape[:-1], zeros.shape[-1]), bits, group, weight.dtype,
    )  # fmt: skip


def half_quadratic(
    weight: Tensor, bits: int, group: int, rounds: int = 20, norm: float = 0.7
) -> QuantisedTensor:
    """Return a matrix rounded with zeros that lessen the error of most numbers at the cost of outliers (HQQ).

    The zeros are no whole numbers. The error is measured with a norm below one, minimised by half-quadratic splitting:
    codes, then the part of the error that counts as outliers, then zeros (Badri and Shaji, Half-Quadratic Quantization,
    2023).

    Args:
        weight: (..., inputs).
        bits: of a code.
        group: inputs that share a scale.
        rounds: most rounds; it stops where the error grows.
        norm: of the error.
    """
    grouped = weight.float().reshape(*weight.shape[:-1], -1, group)
    scale, zero = steps_of(grouped, bits, False, weight.dtype)
    wide, best = scale.float().unsqueeze(-1), None
    assert zero is not None
    shift, strength = zero.float().unsqueeze(-1), 10.0
    for _ in range(rounds):
        codes = (grouped / wide + shift).round().clamp(0, 2**bits - 1)
        error = grouped - (codes - shift) * wide
        size = error.abs().mean()
        if best is not None and size >= best[0]:
            break
        best = (size, shift)
        outliers = error.sign() * (error.abs() - error.abs().clamp(min=_TINY).pow(norm - 1) / strength).clamp(
            min=0
        )
        shift = (codes - (grouped - outliers) / wide).mean(-1, keepdim=True)
        strength *= 1.01
    assert best is not None
    real = best[1].squeeze(-1).to(weight.dtype)
    codes = (grouped / wide + real.float().unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return _tensor(codes.reshape(weight.shape), scale, real, bits, group, weight.dtype)


def fitted(
    weight: Tensor, moments: Tensor, bits: int, group: int, symmetric: bool, ordered: bool = True
) -> QuantisedTensor:
    """Return a matrix rounded so that its products with the inputs change little (GPTQ, arXiv 2210.17323).

    Columns are rounded one after another, and those that are left make up for the error.

    Args:
        weight: (outputs, inputs).
        moments: (inputs, inputs), products of inputs summed over data.
        bits: of a code.
        group: inputs that share a scale.
        symmetric: whether 0 stands for 0.
        ordered: round columns with large inputs first; the scales of all groups are then chosen before.
    """
    moments = moments.double().clone()
    silent = moments.diagonal() == 0
    moments.diagonal()[silent] = 1.0
    order = torch.arange(weight.shape[1])
    if ordered:
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    spread = compensation(moments, order)
    parts = []
    for rows in strips(weight):
        values = weight[rows].double()
        if bool(silent.any()):
            values = values.masked_fill(silent, 0.0)
        parts.append(_fitted_rows(values, spread, order, bits, group, symmetric, ordered, weight.dtype))
    codes, scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    zeros = None if symmetric else torch.cat([zero for *_, zero in parts if zero is not None])
    return _tensor(codes, scales, zeros, bits, group, weight.dtype)


def _fitted_rows(
    values: Tensor, spread: Tensor, order: Tensor, bits: int, group: int, symmetric: bool, ordered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return codes, scales and zeros of some rows; see :func:`fitted`."""
    scale, zero = steps_of(values.reshape(len(values), -1, group), bits, symmetric, dtype)

    def rounded(place: int, values: Tensor) -> tuple[Tensor, Tensor]:
        of = int(order[place]) // group
        if not ordered and place % group == 0:
            # with what the columns before left to these
            fresh = steps_of(values[:, place : place + group], bits, symmetric, dtype)
            scale[:, of] = fresh[0]
            if zero is not None and fresh[1] is not None:
                zero[:, of] = fresh[1]
        step, shift = scale[:, of].double(), None if zero is None else zero[:, of]
        codes = _coded(values[:, place], step, shift, bits)
        return codes, (codes - (0 if shift is None else shift.double())) * step

    codes = rounded_in_turn(values, spread, order, rounded)
    return codes.to(STORED[code_of(bits, symmetric)]), scale, zero


def channel_scales(
    weights: list[Tensor], moments: Tensor, count: int, bits: int, group: int, symmetric: bool
) -> Tensor:
    """Return the factors of input channels that protect those with large inputs (AWQ, arXiv 2306.00978).

    The matrices are to be multiplied, and their inputs divided, by the factors: powers of the inputs' root mean square, of
    which that with the least error is taken. (The paper takes mean magnitudes, which need a second run.)

    Args:
        weights: (outputs, inputs) each, of all matrices that read the value.
        moments: (inputs, inputs) of that value.
        count: rows that the moments are sums of.
        bits: of a code.
        group: inputs that share a scale.
        symmetric: whether 0 stands for 0.
    """
    size = (moments.diagonal() / max(count, 1)).clamp(min=0).sqrt().float().clamp(min=1e-4)
    moments = moments.float()
    best, chosen = float("inf"), torch.ones_like(size)
    for power in range(20):
        factors = size.pow(power / 20)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = nearest(weight.float() * factors, bits, group, symmetric).dequantise().float() / factors
            difference = rounded - weight.float()
            error += float(((difference @ moments) * difference).sum())
        if error < best:
            best, chosen = error, factors
    return chosen


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor | None) -> float:
    """Return the relative error of a matrix's products with its inputs, or of the matrix itself without moments."""
    lost = whole = torch.zeros((), dtype=torch.float64)
    wide = None if moments is None else moments.double()
    for rows in strips(weight):
        values = weight[rows].double()
        difference = rounded[rows].double() - values
        lost = lost + ((difference if wide is None else difference @ wide) * difference).sum()
        whole = whole + ((values if wide is None else values @ wide) * values).sum()
    return float((lost / whole.clamp(min=_TINY)).sqrt())


def _tensor(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> QuantisedTensor:
    code = code_of(bits, zero is None)
    block = (*(1 for _ in codes.shape[:-1]), group)
    return QuantisedTensor(codes.to(STORED[code]), scale, code, block, dtype, zero)
