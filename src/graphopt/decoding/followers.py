"""Counts of the tokens that followed n-grams, in texts given beforehand and in generated text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy
from numpy.typing import NDArray

Followers = dict[int, float]
_FACTOR = 0x9E3779B97F4A7C15
_SEED = 0xD1B54A32D192ED03
_MASK = (1 << 64) - 1


class Counted:
    """Counts of the tokens after each n-gram of up to ``order`` tokens, in fixed texts.

    N-grams are identified by a 64-bit hash, all in one sorted array: 16 bytes for each pair of an n-gram and a
    follower. Two n-grams with the same hash would mix their followers, which worsens candidates but breaks nothing.

    Args:
        texts: tokens of each text.
        order: length of the longest n-gram.
        kept: maximum number of followers kept for each n-gram, the most frequent ones.
    """

    def __init__(self, texts: Iterable[Sequence[int]], order: int, kept: int = 6):
        rows = [numpy.asarray(row, dtype=numpy.uint64) for row in texts]
        self.order = order
        hashes, following = [], []
        for length in range(1, order + 1):
            for row in rows:
                if len(row) > length:
                    hashes.append(_run_hashes(row, length))
                    following.append(row[length:])
        if not hashes:
            self.runs = numpy.zeros(0, numpy.uint64)
            return
        run, next_token = numpy.concatenate(hashes), numpy.concatenate(following)
        by_pair = numpy.lexsort((next_token, run))
        run, next_token = run[by_pair], next_token[by_pair]
        new = numpy.ones(len(run), bool)
        new[1:] = (run[1:] != run[:-1]) | (next_token[1:] != next_token[:-1])
        first = numpy.flatnonzero(new)
        count = numpy.diff(numpy.append(first, len(run)))
        run, next_token = run[first], next_token[first]
        by_count = numpy.lexsort((-count, run))
        run, next_token, count = run[by_count], next_token[by_count], count[by_count]
        new = numpy.ones(len(run), bool)
        new[1:] = run[1:] != run[:-1]
        begins = numpy.flatnonzero(new)
        rank = numpy.arange(len(run)) - numpy.repeat(begins, numpy.diff(numpy.append(begins, len(run))))
        few = rank < kept
        run = run[few]
        self.next: NDArray[numpy.int32] = next_token[few].astype(numpy.int32)
        self.count: NDArray[numpy.int32] = count[few].astype(numpy.int32)
        new = new[few]
        self.begins = numpy.append(numpy.flatnonzero(new), len(run))
        self.runs = run[new]
        self._known: dict[tuple[int, ...], Followers] = {}

    def after(self, run: tuple[int, ...]) -> Followers:
        """Return how often each token followed an n-gram of at most ``order`` tokens."""
        if not len(self.runs):
            return {}
        followers = self._known.get(run)
        if followers is None:
            hashed = numpy.uint64(_hash(run))
            index = int(self.runs.searchsorted(hashed))
            followers = {}
            if index < len(self.runs) and self.runs[index] == hashed:
                span = slice(int(self.begins[index]), int(self.begins[index + 1]))
                followers = dict(zip(self.next[span].tolist(), self.count[span].tolist(), strict=True))
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[run] = followers
        return followers


class Counting:
    """Counts of the tokens after each n-gram, in texts that grow.

    Args:
        order: length of the longest n-gram.
    """

    def __init__(self, order: int):
        self.order = order
        self.table: dict[tuple[int, ...], Followers] = {}

    def add(self, row: Sequence[int], start: int) -> None:
        """Count the tokens of a row from position ``start`` on."""
        for position in range(max(start, 1), len(row)):
            token = row[position]
            for length in range(1, min(self.order, position) + 1):
                seen = self.table.setdefault(tuple(row[position - length : position]), {})
                seen[token] = seen.get(token, 0) + 1

    def after(self, run: tuple[int, ...]) -> Followers:
        """Return how often each token followed an n-gram."""
        return self.table.get(run, {})


def likely(run: Sequence[int], sources: Sequence[tuple[Counted | Counting, float]], order: int) -> Followers:
    """Return the probability that each token follows a run, interpolated from its longest known suffix to shorter ones.

    Witten-Bell interpolation: a suffix that was seen ``n`` times with ``d`` distinct followers gets ``n / (n + d)`` of
    the probability mass that longer suffixes left.

    Args:
        run: tokens.
        sources: counts, and the weight of each.
        order: length of the longest suffix.
    """
    probabilities: Followers = {}
    unassigned = 1.0
    for length in range(min(order, len(run)), 0, -1):
        ending = tuple(run[-length:])
        seen: Followers = {}
        for source, weight in sources:
            for token, count in source.after(ending).items():
                seen[token] = seen.get(token, 0.0) + weight * count
        if not seen:
            continue
        total = sum(seen.values())
        share = total / (total + _TYPE_WEIGHT * len(seen))
        for token, count in seen.items():
            probabilities[token] = probabilities.get(token, 0.0) + unassigned * share * count / total
        unassigned *= 1 - share
        if unassigned < _NEGLIGIBLE:
            break
    return probabilities


_TYPE_WEIGHT = 0.6
"""Weight of a distinct follower relative to a count; 1 in the paper, less here since a model's texts repeat themselves."""
_NEGLIGIBLE = 0.05


def _hash(run: Sequence[int]) -> int:
    value = (len(run) * _SEED) & _MASK
    for token in run:
        value = ((value ^ (token + 1)) * _FACTOR) & _MASK
        value ^= value >> 29
    return value


def _run_hashes(row: NDArray[numpy.uint64], length: int) -> NDArray[numpy.uint64]:
    """Return the hashes of all n-grams of a length that are followed by a token."""
    count = len(row) - length
    value = numpy.full(count, (length * _SEED) & _MASK, numpy.uint64)
    for offset in range(length):
        value = (value ^ (row[offset : offset + count] + numpy.uint64(1))) * numpy.uint64(_FACTOR)
        value ^= value >> numpy.uint64(29)
    return value
