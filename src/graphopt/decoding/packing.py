"""Prompts of different lengths packed into lines, so that no line is mostly padding (Prepacking, arXiv 2404.09529).

Several prompts stand one behind the other in a line. Positions begin again with each of them, and a token sees those of
its own prompt up to itself; so keys, values and outputs are those of the prompts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

WORTH = 0.75
"""Prompts are packed if their tokens are at most this share of those with padding."""


@dataclass
class Line:
    """One line: the rows that stand in it, in order."""

    rows: list[int] = field(default_factory=list)
    length: int = 0


def packed(lengths: Sequence[int], capacity: int) -> list[Line]:
    """Return lines of at most ``capacity`` tokens: the longest rows first, each into the first line with room for it."""
    lines: list[Line] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not lengths[row]:
            continue
        line = next((line for line in lines if line.length + lengths[row] <= capacity), None)
        if line is None:
            line = Line()
            lines.append(line)
        line.rows.append(row)
        line.length += lengths[row]
    return lines


@dataclass(frozen=True)
class Pack:
    """Lines as a program reads them.

    Attributes:
        lines: the rows of each.
        ids: (lines, width).
        positions: (lines, width), beginning at 0 with each row.
        mask: (lines, width, width), true where a token sees another one.
        read: (lines, most rows of a line), the place of each row's last token; any place where there is no row.
    """

    lines: list[Line]
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    read: torch.Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[int]], lines: list[Line], device: torch.device) -> Pack:
        """Return the lines of some rows."""
        width = max(line.length for line in lines)
        most = max(len(line.rows) for line in lines)
        ids = torch.zeros(len(lines), width, dtype=torch.int64)
        positions = torch.zeros(len(lines), width, dtype=torch.int64)
        segments = torch.full((len(lines), width), -1)
        read = torch.zeros(len(lines), most, dtype=torch.int64)
        for number, line in enumerate(lines):
            start = 0
            for place, row in enumerate(line.rows):
                end = start + len(rows[row])
                ids[number, start:end] = torch.tensor(list(rows[row]))
                positions[number, start:end] = torch.arange(len(rows[row]))
                segments[number, start:end] = place
                read[number, place] = end - 1
                start = end
        own = segments[:, :, None] == segments[:, None, :]
        mask = own & torch.ones(width, width, dtype=torch.bool).tril()
        return Pack(lines, *(t.to(device) for t in (ids, positions, mask, read)))
