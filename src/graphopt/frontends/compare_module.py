"""Comparison of a program with the module that it was captured from."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ir.program import Program
from .accepting import accepts
from .compare import require_equal, resized
from .size_trials import numbers_in, settle_limits, trial


def compare_with_model(
    program: Program, model: nn.Module, given: dict[str, Any], example: dict[str, Any]
) -> None:
    """Determine which sizes the program accepts, then compare at the user's size, the captured size and another one."""
    config = getattr(model, "config", None)
    settle_limits(program, trial(program, model, example), numbers_in(getattr(config, "__dict__", {})))
    cases: list[tuple[str, dict[str, Any], Any]] = [
        ("the example", given, None),
        ("the captured size", example, None),
    ]
    sizes = program.signature.sizes
    other = resized(
        program, example, program.signature.nearest({n: limits.hint + 2 for n, limits in sizes.items()})
    )
    if other is not None and sizes and accepts(model, other):
        cases.append(("another size", other, None))
    require_equal(program, model, cases)
