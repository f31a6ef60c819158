"""Rounding a matrix to integers: the nearest, or fitted to its inputs (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from .ranges import watch

if TYPE_CHECKING:
    from ...measure.context import Context

Key = tuple[object, ...]

DAMPING = 0.01
"""Added to the diagonal of second moments, as a share of its mean (the paper's)."""
COLUMNS = 128
"""Columns that are rounded before those behind them are corrected (the paper's)."""
_AT_ONCE, _LEAST_ROWS = 1 << 21, 1024
"""Numbers that are rounded at a time, and rows at least, since each part goes through all columns one by one."""
MEMORY = 1 << 30
"""Largest size in bytes of the second moments gathered in one run over the data."""


def matrix_scales(weight: Tensor, high: int, block: int) -> Tensor:
    """Return the scales of a matrix, by row or by row and block of inputs: the largest value maps to the largest integer.

    Args:
        weight: (outputs, ...).
        high: largest integer.
        block: number of inputs that share a scale; 0: all.

    Returns:
        (outputs,) or (outputs, blocks).
    """
    flat = weight.float().flatten(1)
    if block:
        return flat.reshape(len(flat), -1, block).abs().amax(2).clamp(min=1e-12) / high
    return flat.abs().amax(1).clamp(min=1e-12) / high


def fitted(weight: Tensor, scale: Tensor, moments: Tensor, high: int) -> Tensor:
    """Return integers that change the product with the inputs, rather than each weight, as little as possible.

    Columns are rounded to the nearest step one at a time, in order of the magnitude of their inputs, and the columns
    that are not rounded yet compensate for the error.

    Args:
        weight: (outputs, inputs); of a grouped convolution the outputs of one group.
        scale: (outputs,) or (outputs, blocks).
        moments: (inputs, inputs), products of inputs summed over calibration data.
        high: largest integer; the range is symmetric.

    Returns:
        Of the weight's shape, int8.
    """
    moments = moments.double().clone()
    silent = moments.diagonal() == 0
    moments.diagonal()[silent] = 1.0
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    spread = compensation(moments, order)

    def fitted_rows(rows: slice) -> Tensor:
        steps = _spread(scale[rows], weight.shape[1]).double()[:, order]

        def rounded(place: int, values: Tensor) -> tuple[Tensor, Tensor]:
            integers = (values[:, place] / steps[:, place]).round().clamp(-high, high)
            return integers, integers * steps[:, place]

        return rounded_in_turn(weight[rows].double(), spread, order, rounded).to(torch.int8)

    return torch.cat([fitted_rows(rows) for rows in strips(weight)])


def strips(weight: Tensor) -> list[slice]:
    """Return the rows of a matrix in parts, since all of a head in float64 would take most of the memory."""
    step = max(_LEAST_ROWS, _AT_ONCE // max(1, math.prod(weight.shape[1:])))
    return [slice(start, start + step) for start in range(0, max(1, len(weight)), step)]


def compensation(moments: Tensor, order: Tensor) -> Tensor:
    """Return how much later columns make up for an error in each column, (inputs, inputs), columns in their order.

    Args:
        moments: (inputs, inputs), products of inputs summed over data, in float64.
        order: of the columns.
    """
    moments = moments[order][:, order]
    damping = DAMPING * moments.diagonal().mean()
    while True:
        moments.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed):
            break
        damping = damping * 10
    # the rows of this factor of the inverse tell how much later columns compensate
    spread: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return spread


def rounded_in_turn(
    values: Tensor, spread: Tensor, order: Tensor, rounded: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Round columns one after another while those that are left make up for the error (arXiv 2210.17323).

    Args:
        values: (outputs, inputs), in float64.
        spread: as :func:`compensation` gives it.
        order: of the columns.
        rounded: gives the codes of a column and what they stand for, by its place in the order and the matrix in that
            order, with what earlier columns left to it.

    Returns:
        The codes, columns as given.
    """
    values = values[:, order]
    codes = torch.empty_like(values)
    inputs = values.shape[1]
    for first in range(0, inputs, COLUMNS):
        last = min(first + COLUMNS, inputs)
        errors = torch.empty(len(values), last - first, dtype=values.dtype)
        for column in range(first, last):
            codes[:, column], stands_for = rounded(column, values)
            error = (values[:, column] - stands_for) / spread[column, column]
            values[:, column + 1 : last] -= error[:, None] * spread[column, column + 1 : last][None]
            errors[:, column - first] = error
        values[:, last:] -= errors @ spread[first:last, last:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def nearest(weight: Tensor, scale: Tensor, high: int) -> Tensor:
    """Return the integers nearest to a weight, (outputs, inputs), int8."""
    flat = weight.double().flatten(1)
    return (flat / _spread(scale, flat.shape[1])).round().clamp(-high, high).to(torch.int8)


def _spread(scale: Tensor, inputs: int) -> Tensor:
    return (
        scale[:, None].expand(-1, inputs)
        if scale.dim() == 1
        else scale.repeat_interleave(inputs // scale.shape[1], 1)
    )


class Moments:
    """Second moments of the inputs of matrices; matrices that read the same value share them."""

    def __init__(self, program: Program, context: Context, memory: int = MEMORY):
        self.program, self.context, self.memory = program, context, memory

    def each(self, matrices: Iterable[fx.Node]) -> Iterable[tuple[fx.Node, Tensor]]:
        """Yield each matrix with its moments, (groups, inputs, inputs), gathering as many at a time as memory allows.

        Args:
            matrices: weights of linear operators and convolutions.
        """
        waves: list[dict[Key, list[fx.Node]]] = [{}]
        memory = 0
        for matrix in matrices:
            readers = [n for n in matrix.users if _multiplies(n, matrix)]
            key: Key = tuple(sorted({_reading(n) for n in readers}, key=str))
            size = _groups(readers[0]) * (matrix.meta["val"][0].numel() ** 2) * 8
            if key not in waves[-1]:
                if memory and memory + size > self.memory:
                    waves.append({})
                    memory = 0
                memory += size
            waves[-1].setdefault(key, []).append(matrix)
        for number, wave in enumerate(waves):
            if not wave:
                continue
            sums: dict[Key, Tensor] = {}
            by_node: dict[fx.Node, list[tuple[Key, fx.Node]]] = {}
            for key, held_matrices in wave.items():
                readers = [n for n in held_matrices[0].users if _multiplies(n, held_matrices[0])]
                for source in {_source(n): n for n in readers}.items():
                    by_node.setdefault(source[0], []).append((key, source[1]))

            def see(
                node: fx.Node,
                value: Tensor,
                into: dict[Key, Tensor] = sums,
                requested: object = by_node,
            ) -> None:
                for key, reader in requested.get(node, ()):  # type: ignore[attr-defined]
                    rows = _rows(reader, value)
                    product = rows.transpose(1, 2) @ rows
                    into[key] = into[key] + product if key in into else product

            watch(
                self.program, self.context, see, f"inputs of matrices, {number + 1} of {len(waves)}", by_node
            )
            for key, held_matrices in wave.items():
                for matrix in held_matrices:
                    if key in sums:
                        yield matrix, sums[key]


def _multiplies(node: fx.Node, matrix: fx.Node) -> bool:
    # a tied table is looked up as well
    looked_up = is_operator(node, "aten.embedding")
    return node.op == "call_function" and not looked_up and arguments(node).get("weight") is matrix


def _source(node: fx.Node) -> fx.Node:
    source: fx.Node = arguments(node)["input"]
    return source


def _groups(node: fx.Node) -> int:
    return int(arguments(node).get("groups") or 1)


def _reading(node: fx.Node) -> Key:
    """Return the parameters that determine how a node reads its input."""
    if is_operator(node, "aten.linear"):
        return (_source(node).name,)
    args = arguments(node)
    shape = tuple(int(s) for s in args["weight"].meta["val"].shape[1:])
    geometry = tuple(str(args[n]) for n in ("stride", "padding", "dilation", "groups"))
    return (_source(node).name, shape, *geometry)


def _rows(node: fx.Node, value: Tensor) -> Tensor:
    """Return the input vectors of the matrix product, (groups, rows, inputs), in float64."""
    value = value.double()
    if is_operator(node, "aten.linear"):
        return value.reshape(1, -1, value.shape[-1])
    args = arguments(node)
    kernel = [int(s) for s in args["weight"].meta["val"].shape[2:]]
    if value.dim() == len(kernel) + 1:
        value = value[None]
    dilation, stride = ([int(v) for v in args[n]] for n in ("dilation", "stride"))
    padding = _sides(args["padding"], kernel, dilation)
    value = torch.nn.functional.pad(value, [p for before_after in reversed(padding) for p in before_after])
    for dim, (size, apart, step) in enumerate(zip(kernel, dilation, stride, strict=True), start=2):
        # a new last dimension for the kernel's entries
        value = value.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    groups, dims = _groups(node), len(kernel)
    value = value.reshape(len(value), groups, -1, *value.shape[2:])
    # (batch, groups, channels, positions..., kernel...) to (groups, batch, positions..., channels, kernel...)
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    moved = value.permute(order)
    return moved.reshape(groups, -1, int(args["weight"].meta["val"][0].numel()))


def _sides(padding: object, kernel: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(int(p), int(p)) for p in padding]  # type: ignore[attr-defined]
