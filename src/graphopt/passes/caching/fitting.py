"""Fits of one attention's keys and values by another's, head by head, on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...ir.program import Program
    from ...measure.context import Context


@dataclass
class Moments:
    """Sums over tokens of products of two values of a head: (heads, size, size) each, and of the square of the first."""

    with_other: torch.Tensor
    of_other: torch.Tensor
    square: torch.Tensor

    def fit(self, ridge: float) -> torch.Tensor:
        """Return the matrices ``B`` (heads, size, size) for which ``B @ other`` is nearest to the value.

        Args:
            ridge: of the mean square of the other value; keeps directions out that the data hardly has.
        """
        size = self.of_other.shape[-1]
        level = self.of_other.diagonal(dim1=1, dim2=2).mean(-1) * ridge
        scaled = self.of_other + level.clamp(min=1e-300)[:, None, None] * torch.eye(size, dtype=torch.float64)
        fitted: torch.Tensor = torch.linalg.solve(scaled, self.with_other.transpose(1, 2)).transpose(1, 2)
        return fitted.contiguous()

    def fit_turning(self, pairs: Iterable[tuple[int, int]], ridge: float) -> torch.Tensor:
        """Return such matrices that commute with the rotation of pairs of entries.

        A pair is multiplied by one complex number; entries that are not rotated are mixed freely among themselves.
        """
        fitted = torch.zeros_like(self.of_other)
        level = self.of_other.diagonal(dim1=1, dim2=2).mean(-1) * ridge
        free = set(range(fitted.shape[-1]))
        for i, j in pairs:
            free -= {i, j}
            total = self.of_other[:, i, i] + self.of_other[:, j, j] + 2 * level.clamp(min=1e-300)
            real = (self.with_other[:, i, i] + self.with_other[:, j, j]) / total
            imaginary = (self.with_other[:, j, i] - self.with_other[:, i, j]) / total
            fitted[:, i, i] = fitted[:, j, j] = real
            fitted[:, j, i], fitted[:, i, j] = imaginary, -imaginary
        if free:
            rest = torch.tensor(sorted(free))
            part = Moments(
                self.with_other[:, rest][:, :, rest], self.of_other[:, rest][:, :, rest], self.square
            )
            fitted[:, rest[:, None], rest] = part.fit(ridge)
        return fitted

    def missed(self, maps: torch.Tensor) -> float:
        """Return the share of the square of the value that ``maps @ other`` misses."""
        explained = 2 * (maps * self.with_other).sum() - (maps @ self.of_other * maps).sum()
        return float((self.square - explained) / self.square) if float(self.square) else 0.0


def moments_of(
    program: Program, context: Context, wanted: Mapping[str, tuple[fx.Node, fx.Node]]
) -> dict[str, Moments]:
    """Return the moments of pairs of values (batch, heads, tokens, size), over the tokens of calibration data.

    Args:
        program: that computes them.
        context: its calibration data; padding does not count.
        wanted: a value and the other, by a name for their moments.
    """
    found: dict[str, Moments] = {}
    needed = {node: None for pair in wanted.values() for node in pair}
    context.progress.start("keys and values", len(context.batches()))
    for batch, values in context.record(program, needed):
        mask = batch.get("attention_mask")
        for name, pair in wanted.items():
            value, other = (_rows(values[node.name], mask) for node in pair)
            added = (value.mT @ other, other.mT @ other, value.square().sum())
            if name in found:
                before = found[name]
                added = (
                    before.with_other + added[0], before.of_other + added[1], before.square + added[2],
                )  # fmt: skip
            found[name] = Moments(*added)
        context.progress.step()
    context.progress.done()
    return found


def _rows(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return (heads, tokens of the batch, size), without padding."""
    by_head = value.double().transpose(0, 1).flatten(1, 2)
    if mask is None or mask.dim() != 2 or mask.numel() != by_head.shape[1]:
        return by_head
    return by_head[:, mask.reshape(-1).bool()]


__all__ = ["Moments", "moments_of"]
