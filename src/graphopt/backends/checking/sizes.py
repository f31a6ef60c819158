"""Sizes that are fixed when a program is exported for a runtime."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.program import Program


def static_sizes(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return a value for every size of the program.

    A size that is not given has the value of its namesake (``batch_2`` that of ``batch``), or else the one
    seen at capture.
    """
    values = {}
    for name, limits in program.signature.sizes.items():
        values[name] = sizes.get(name, sizes.get(namesake(name), limits.hint))
    return values


def namesake(name: str) -> str:
    """Return the name of a size without its distinguishing number: ``batch`` for ``batch_2``."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name
