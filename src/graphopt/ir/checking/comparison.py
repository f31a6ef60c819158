"""The relative error of a value: one definition for contracts, captures, exports and kernels."""

from __future__ import annotations

from typing import Any, Literal

import torch

Beside = Literal["largest", "norm", "element"]

_SMALLEST = 1e-30
# values this many times larger than the lower quartile are fill values of a mask, not magnitudes
_MASKED = 1e6


def relative_error(
    actual: Any, expected: Any, *, beside: Beside = "largest", at_least: float = _SMALLEST
) -> float:
    """Return the error of a value relative to the magnitude of the expected one.

    NaN or infinity where the reference is finite is an infinite error, as is another shape, another kind of type, or a
    number where the reference is NaN. NaN agrees with NaN, and an infinity with the same infinity; a reference that is
    NaN throughout is an infinite error as well, since nothing was compared.

    Args:
        actual: a tensor of any shape, or tensors in lists and tuples; anything else is compared by ``==``.
        expected: the reference, of the same structure.
        beside: what a difference is divided by. "largest": the largest finite value of the reference.
            "norm": Euclidean norms, for values that were rounded everywhere. "element": each value's own magnitude,
            or the largest that is not a mask's fill value where that is larger, so that one huge value hides no other.
        at_least: lower bound on the magnitude of the reference.

    Returns:
        At least 0; integers and booleans give 0 or 1.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            return float("inf")
        errors = [
            relative_error(a, b, beside=beside, at_least=at_least)
            for a, b in zip(actual, expected, strict=True)
        ]
        return max(errors, default=0.0)
    if not isinstance(expected, torch.Tensor):
        return 0.0 if actual == expected else float("inf")
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach(), expected.detach()
    if _kind(actual) != _kind(expected):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if _kind(expected) == "exact":
        return float((actual != expected).any())
    if expected.is_complex():
        actual, expected = (
            torch.view_as_real(actual.resolve_conj()),
            torch.view_as_real(expected.resolve_conj()),
        )
    value, reference = actual.to(torch.float64), expected.to(torch.float64)
    if bool(reference.isnan().all()):
        return float("inf")
    same = (value == reference) | (value.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (value - reference).abs())
    finite = reference[reference.isfinite()].abs()
    if beside == "norm":
        worst = float(difference.norm()) / max(float(finite.norm()), at_least)
    elif beside == "element":
        sizes = reference.abs().nan_to_num(nan=1.0, posinf=1.0).clamp(min=max(_usual(finite), at_least))
        worst = float((difference / sizes).max())
    else:
        largest = float(finite.max()) if finite.numel() else 1.0
        worst = float(difference.max()) / max(largest, at_least)
    # comparisons with NaN are false, so NaN would pass a check of the form "not error > limit"
    return float("inf") if worst != worst else worst


def _kind(value: torch.Tensor) -> str:
    if value.is_complex():
        return "complex"
    return "real" if value.is_floating_point() else "exact"


def _usual(finite: torch.Tensor) -> float:
    """Return the largest of finite magnitudes that is not a mask's fill value."""
    sizes = finite[finite != 0]
    if not sizes.numel():
        return _SMALLEST
    quarter = sizes.kthvalue((sizes.numel() + 3) // 4).values
    return float(sizes[sizes <= _MASKED * quarter].max())
