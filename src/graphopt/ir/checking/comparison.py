"""How far a value is from what it should be: the one definition, for contracts, captures, exports and kernels."""

from __future__ import annotations

from typing import Any, Literal

import torch

Beside = Literal["largest", "norm", "element"]

_SMALLEST = 1e-30
# above what a quarter of all values stay below, by this much: a mask's number, and no size of anything
_MASKED = 1e6


def relative_error(
    found: Any, expected: Any, *, beside: Beside = "largest", at_least: float = _SMALLEST
) -> float:
    """Return how far a value is from the one expected, relative to that one's size.

    NaN or infinity where the reference has a finite number is an infinite error, as is another shape, another kind of
    type, or a number where the reference has none. NaN agrees with NaN, and an infinity with the same one; where a
    reference is NaN throughout, nothing was compared, which is an infinite error as well.

    Args:
        found: a tensor of any shape, or tensors in lists and tuples; what is neither is compared by ``==``.
        expected: the reference, alike.
        beside: what a difference is measured against. "largest": the largest finite value of the reference.
            "norm": Euclidean norms of both, for values that were rounded everywhere. "element": each value's own size,
            or the largest that is no mask's where that is larger, so that one huge value hides no other.
        at_least: the size of a reference that is smaller than this.

    Returns:
        At least 0; integers and booleans give 0 or 1.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return float("inf")
        errors = [
            relative_error(a, b, beside=beside, at_least=at_least)
            for a, b in zip(found, expected, strict=True)
        ]
        return max(errors, default=0.0)
    if not isinstance(expected, torch.Tensor):
        return 0.0 if found == expected else float("inf")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach(), expected.detach()
    if _kind(found) != _kind(expected):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if _kind(expected) == "exact":
        return float((found != expected).any())
    if expected.is_complex():
        found, expected = (
            torch.view_as_real(found.resolve_conj()),
            torch.view_as_real(expected.resolve_conj()),
        )
    actual, reference = found.to(torch.float64), expected.to(torch.float64)
    if bool(reference.isnan().all()):
        return float("inf")
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (actual - reference).abs())
    finite = reference[reference.isfinite()].abs()
    if beside == "norm":
        worst = float(difference.norm()) / max(float(finite.norm()), at_least)
    elif beside == "element":
        sizes = reference.abs().nan_to_num(nan=1.0, posinf=1.0).clamp(min=max(_usual(finite), at_least))
        worst = float((difference / sizes).max())
    else:
        largest = float(finite.max()) if finite.numel() else 1.0
        worst = float(difference.max()) / max(largest, at_least)
    # every comparison with NaN is false, so that it would pass any limit that is asked the wrong way round
    return float("inf") if worst != worst else worst


def _kind(value: torch.Tensor) -> str:
    if value.is_complex():
        return "complex"
    return "real" if value.is_floating_point() else "exact"


def _usual(finite: torch.Tensor) -> float:
    """Return the largest size that is no mask's, of sizes that are finite."""
    sizes = finite[finite != 0]
    if not sizes.numel():
        return _SMALLEST
    quarter = sizes.kthvalue((sizes.numel() + 3) // 4).values
    return float(sizes[sizes <= _MASKED * quarter].max())
