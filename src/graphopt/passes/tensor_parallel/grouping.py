"""Groups of heads: diverse within, matched to what follows."""

from __future__ import annotations

import torch


def scatter(distances: torch.Tensor, count: int) -> tuple[list[list[int]], float]:
    """Return groups of equal size with large distances inside, and their sum relative to that of random groups.

    Members are exchanged in pairs until no exchange helps (arXiv 2502.20727 leaves the method open).

    Args:
        distances: (units, units), symmetric.
        count: number of groups, a divisor of the units.
    """
    units = len(distances)
    size = units // count
    groups = [list(range(g * size, (g + 1) * size)) for g in range(count)]
    gained = True
    while gained:
        gained = False
        for a in range(count):
            for b in range(a + 1, count):
                gained = _exchange(distances, groups[a], groups[b]) or gained
    groups = sorted(sorted(group) for group in groups)
    # the share of all pairs that are within a group
    expected = float(distances.sum()) / 2 * (size - 1) / (units - 1)
    return groups, _within(distances, groups) / expected if expected > 0 else 1.0


def _within(distances: torch.Tensor, groups: list[list[int]]) -> float:
    return sum(float(distances[group][:, group].sum()) / 2 for group in groups)


def _exchange(distances: torch.Tensor, first: list[int], second: list[int]) -> bool:
    """Make the best exchange between two groups, if there is a gain."""
    best, where = 1e-9, None
    for i, left in enumerate(first):
        for j, two in enumerate(second):
            rest_first = [u for u in first if u != left]
            rest_second = [u for u in second if u != two]
            gain = float(
                distances[two, rest_first].sum() - distances[left, rest_first].sum()
                + distances[left, rest_second].sum() - distances[two, rest_second].sum()
            )  # fmt: skip
            if gain > best:
                best, where = gain, (i, j)
    if where is None:
        return False
    first[where[0]], second[where[1]] = second[where[1]], first[where[0]]
    return True


def match(sizes: torch.Tensor) -> list[int]:
    """Return which group each rank gets, so that the sum of ``sizes`` (groups, ranks) is largest."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-sizes.double().numpy())
    matching = [0] * len(rows)
    for group, rank in zip(rows, columns, strict=True):
        matching[int(rank)] = int(group)
    return matching
