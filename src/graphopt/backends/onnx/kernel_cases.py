"""Inputs for files whose attention takes several tokens after earlier ones in one row only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...ir.facts import KVCache
from ...ir.program import Program
from ..checking.cases import Case


def row_by_row(cases: list[Case], program: Program) -> list[Case]:
    """Return the cases with several rows of tokens after earlier ones as what such a file takes.

    Each becomes its first row alone, and one token of every row, at positions of their own. Where sizes are fixed, what
    the file does not take is left out.

    Args:
        cases: made for the program.
        program: after insert-cache.
    """
    return [taken for case in cases for taken in _taken(case, program)]


def _taken(case: Case, program: Program) -> Iterator[Case]:
    cache = program.facts[KVCache]
    positions = case.inputs[cache.positions]
    rows, tokens = positions.shape
    if rows == 1 or tokens == 1 or bool((positions[:, 0] == 0).all()):
        yield case
        return
    batch, length = program.signature.inputs[cache.positions].shape
    if isinstance(batch, str):
        yield replace(case, label=f"{case.label}, one row", inputs={n: v[:1] for n, v in case.inputs.items()})
    if isinstance(length, str):
        last = positions[:, -1:] - torch.arange(rows)[:, None] % tokens
        one = {n: v[:, -1:] if v.shape == positions.shape else v for n, v in case.inputs.items()}
        yield replace(
            case, label=f"{case.label}, one token of each row", inputs=one | {cache.positions: last}
        )
