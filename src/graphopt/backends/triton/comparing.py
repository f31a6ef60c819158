"""Comparison of a kernel's result with its operator's reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.checking.comparison import relative_error
from .cases import Case, Tensors
from .wiring import TABLE

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference that counts as rounding, relative to the largest value."""


@dataclass(frozen=True)
class Compared:
    """Result of comparing one call of a kernel.

    Attributes:
        operator, what: the call.
        dtype: of its floating-point inputs.
        error: largest difference from the reference, relative to its largest value.
        limit: largest accepted error.
        reason: why the call failed, empty otherwise.
    """

    operator: str
    what: str
    dtype: str
    error: float
    limit: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the kernel computes what the reference does."""
        return not self.reason and self.error <= self.limit


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _alike(actual: Any, expected: Any) -> bool:
    if isinstance(actual, tuple):
        return all(a.dtype == b.dtype for a, b in zip(actual, expected, strict=True))
    return bool(actual.dtype == expected.dtype)


def compare(case: Case, dtype: torch.dtype, device: str = "cpu") -> Compared:
    """Run a call with its kernel and with the reference in float64 (in the call's own type if bits must agree)."""
    args, options = case.args(Tensors(dtype, device))
    kernel = TABLE[case.operator]
    name = str(dtype).removeprefix("torch.")
    if not kernel.takes(*args, **options):
        return Compared(case.operator, case.what, name, 0.0, 0.0, "the kernel does not take this call")
    actual = kernel.launch(*args, **options)
    if case.exact:
        expected = kernel.reference(*args, **options)
        equal = torch.equal(actual, expected) and actual.dtype == expected.dtype
        return Compared(case.operator, case.what, name, 0.0 if equal else 1.0, 0.0)
    reference = kernel.reference(*args, **options)
    if not _alike(actual, reference):
        return Compared(case.operator, case.what, name, 0.0, 0.0, "the result has another type")
    expected = kernel.reference(*(_wide(a) for a in args), **options)
    if case.operator == "linear_top_k":
        # equal logits may come in any order: the indices need only refer to logits of those values
        logits = torch.nn.functional.linear(_wide(args[0]), _wide(args[1]), _wide(args[2]))
        chosen_logits = logits.gather(-1, actual[1])
        distinct = all(
            row.unique().numel() == row.numel() for row in actual[1].reshape(-1, actual[1].shape[-1])
        )
        error = (
            max(relative_error(actual[0], expected[0]), relative_error(chosen_logits, expected[0]))
            if distinct
            else float("inf")
        )
    elif isinstance(actual, tuple):
        error = max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))
    else:
        error = relative_error(actual, expected)
    if case.operator == "gated_lora":
        plain = args[4] == 0
        if not torch.equal(actual[plain], args[0][plain]):
            error = float("inf")
    return Compared(case.operator, case.what, name, error, LIMITS[dtype])
