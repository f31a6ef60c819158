"""Choosing the matrices that tolerate four bits, by measuring them one by one, then together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...ir.program import Program
from ...measure.metrics import default_metric

if TYPE_CHECKING:
    from ...measure.context import Context

MARGIN = 0.5
"""Share of the budget that may be used on calibration data, since the result is judged on other data."""


def bearing(
    program: Program,
    context: Context,
    matrices: Sequence[str],
    sizes: dict[str, int],
    few: Callable[[Program, str], None],
    all_of: Callable[[Sequence[str]], Program],
    budget: float,
    metric: str,
    key: str,
) -> tuple[list[str], dict[str, float], float]:
    """Return the matrices to store in few bits, the loss from each alone, and the loss with all of them.

    Matrices are taken in order of loss per number saved, as many as keep the program's loss on calibration data
    within half of the budget; a binary search needs a dozen evaluations for a thousand matrices.

    Args:
        program: in floats.
        context: with calibration data; its work directory keeps the measurements.
        matrices: names.
        sizes: number of elements of each.
        few: rounds one matrix of a program to few bits, in place.
        all_of: returns the program with some matrices in few bits.
        budget: largest relative loss.
        metric: of the loss.
        key: of the measurements in the work directory.
    """
    judged = default_metric(program) if metric == "auto" else metric
    # the distance to the original resolves small changes that are lost in the noise of a text's perplexity
    nearer = "kl" if judged == "perplexity" else judged
    alone = context.score(program, list(matrices), few, metric=nearer, key=key)
    least = min(alone.values(), default=0.0)
    order = sorted(matrices, key=lambda name: ((alone[name] - least) / sizes[name], name))

    def loss(count: int) -> float:
        return context.loss(all_of(order[:count]), program, metric=metric, judge=False)

    low, high, measured = 0, len(order), loss(len(order))
    if measured <= MARGIN * budget:
        return order, alone, measured
    measured = loss(0)
    while high - low > 1:
        middle = (low + high) // 2
        current = loss(middle)
        if current <= MARGIN * budget:
            low, measured = middle, current
        else:
            high = middle
    return order[:low], alone, measured
