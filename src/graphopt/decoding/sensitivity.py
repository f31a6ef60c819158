"""Which layers need their caches most, and budgets by layer that follow from it (EpiCache, arXiv 2509.17396)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..ir.errors import UsageError
from ..ir.facts import CrossCache, KVCache, QuantizedCache
from ..ir.program import Program
from .cached import CachedDecoder, longest
from .policies import SINKS
from .step import number_of

WINDOW = 100
"""Number of tokens whose keys are compared as one vector."""


def layer_sensitivity(
    program: Program, rows: Sequence[Sequence[int]], block: int = 512, sinks: int = SINKS
) -> list[float]:
    """Return how much the keys of each layer change where tokens see little of a text.

    Each text is read once as a whole, and once with tokens that see the first ones, their own block and half of the block
    before it. Keys are compared by the cosine of 100 tokens at a time, and averaged over these and heads.

    Args:
        program: after insert-cache.
        rows: texts as tokens, each longer than a block and a half.
        block: number of tokens.
        sinks: number of first tokens that all see.

    Returns:
        One less the similarity for each layer with caches, from 0 (keys depend on what stands near) to 2.

    Raises:
        UsageError: there is no text, one is too short, or the program has no caches.
    """
    _check(program, rows, block, sinks)
    for number, row in enumerate(rows):
        if len(row) <= block + block // 2:
            raise UsageError(
                f"text {number} has {len(row)} tokens, of which each sees all the same with a block of {block}",
                hint=f"longer texts, or blocks of {max(1, len(row) // 4)}",
            )
    totals: list[float] = []
    for row in rows:
        whole, part = (_keys(program, row, mask) for mask in (None, _in_blocks(len(row), block, sinks)))
        if not whole:
            raise UsageError("this program has no caches that grow")
        found = [_similarity(a, b) for a, b in zip(whole, part, strict=True)]
        totals = [a + b for a, b in zip(totals or [0.0] * len(found), found, strict=True)]
    return [max(0.0, 1 - total / len(rows)) for total in totals]


def layer_budgets(
    sensitivity: Sequence[float], budget: int, exponent: float = 1.1, floor: float = 0.25
) -> list[int]:
    """Return a budget for each layer, ``budget`` on average: the more, the more sensitive a layer is.

    Shares are ``((s - min) / (max - min)) ** exponent``. Layers whose share is below the floor get the floor, and what they
    take more is taken from the others in proportion, so that the sum is exact.

    Args:
        sensitivity: of each layer, as :func:`layer_sensitivity` measures it.
        budget: number of tokens, on average.
        exponent: 0 for equal budgets; 1.1 for Llama and 1.3 for Qwen in the paper's code.
        floor: part of ``budget`` that every layer gets.

    Raises:
        UsageError: an argument is out of its range.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError(f"budget is {budget!r}; it is a whole number from 1 on")
    numbers = isinstance(sensitivity, Sequence) and all(_number(s) for s in sensitivity)
    if not numbers or not sensitivity:
        raise UsageError("sensitivity is a list with a finite number for each layer")
    if not (_number(exponent) and exponent >= 0):
        raise UsageError(f"exponent is {exponent!r}; it is a number from 0 on")
    if not (_number(floor) and 0 <= floor <= 1):
        raise UsageError(f"floor is {floor!r}; it is a part from 0 to 1")
    low, high = min(sensitivity), max(sensitivity)
    if high == low:
        return [budget] * len(sensitivity)
    shares = [((s - low) / (high - low)) ** exponent for s in sensitivity]
    total, least = float(budget * len(shares)), budget * floor
    exact = [least] * len(shares)
    free = set(range(len(shares)))
    while free:
        left, weight = total - least * (len(shares) - len(free)), sum(shares[i] for i in free)
        for i in free:
            exact[i] = left * shares[i] / weight if weight else left / len(free)
        below = {i for i in free if exact[i] < least}
        if not below:
            break
        for i in below:
            exact[i] = least
        free -= below
    whole = [math.floor(value) for value in exact]
    rest = sorted(range(len(whole)), key=lambda i: (whole[i] - exact[i], i))
    for i in rest[: round(total) - sum(whole)]:
        whole[i] += 1
    return whole


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(program: Program, rows: Sequence[Sequence[int]], block: int, sinks: int) -> None:
    """Refuse what cannot be measured."""
    cache = program.facts.get(KVCache)
    if cache is None:
        raise UsageError(
            "this program has no cache", hint="graphopt.optimize(program, 'insert-cache') gives it one"
        )
    for fact, what in ((QuantizedCache, "caches in few bits"), (CrossCache, "an encoder")):
        if fact in program.facts:
            raise UsageError(f"layers of programs with {what} are not measured")
    for name, value, low in (("block", block, 1), ("sinks", sinks, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UsageError(f"{name} is {value!r}; it is a whole number from {low} on")
    listed = isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in rows)
    if not listed or not all(isinstance(token, int) for row in rows for token in row):
        raise UsageError("rows are lists of tokens, one for each text")
    if not rows:
        raise UsageError(
            "there is no text to measure layers on", hint="rows of tokens, longer than a block and a half"
        )
    known = CachedDecoder(program, 1, 1).embedded
    for number, row in enumerate(rows):
        limit = longest(program)
        if limit is not None and len(row) > limit:
            raise UsageError(f"text {number} has {len(row)} tokens, the model has positions for {limit}")
        wrong = [token for token in row if token < 0 or (known is not None and token >= known)]
        if wrong:
            raise UsageError(f"text {number} has token {wrong[0]}, which the model does not know")


def _in_blocks(length: int, block: int, sinks: int) -> torch.Tensor:
    """Return which token sees which, (1, length, length)."""
    place = torch.arange(length)
    first = place // block * block - block // 2
    sees = (place[None, :] >= first[:, None]) | (place[None, :] < sinks)
    return (sees & (place[None, :] <= place[:, None]))[None]


def _keys(program: Program, row: Sequence[int], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the keys of a text by layer, (heads, tokens, size)."""
    decoder = CachedDecoder(program, 1, len(row))
    positions = torch.arange(len(row))[None]
    last = torch.tensor([[len(row) - 1]])
    decoder.forward(
        torch.tensor([list(row)]), positions, slots=positions, step_mask=mask, counts=[len(row)], read=last
    )
    layers: dict[int, list[torch.Tensor]] = {}
    for buffer, cache in decoder.buffers.items():
        if buffer[0].startswith("key_cache_"):
            layers.setdefault(number_of(buffer), []).append(cache[0])
    return [torch.cat(layers[number]) for number in sorted(layers)]


def _similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    heads, tokens = first.shape[:2]
    count = tokens // min(WINDOW, tokens)
    a, b = (
        keys[:, : count * (tokens // count)].reshape(heads, count, -1).double() for keys in (first, second)
    )
    return float(F.cosine_similarity(a, b, dim=-1).mean())


__all__ = ["layer_budgets", "layer_sensitivity"]
