"""Attention masks for ONNX: numbers that are added to scores, made once and shared by the layers."""

from __future__ import annotations

from typing import Any

HIDDEN = -30000.0
"""What is added to the score of a hidden key.

Its exponential is zero in every type, and unlike an infinity it leaves a row that sees no key finite; two
of them still fit in float16.
"""
_LARGEST_CONSTANT = 1 << 24


class Masks:
    """Makes the masks of one export.

    ``memo`` keeps values by what they were made from: the nodes of an earlier layer come earlier in the
    graph, so that later layers may read them.
    """

    def __init__(self, op: Any, ir: Any):
        self.op = op
        self.ir = ir
        self.memo: dict[tuple[Any, ...], Any] = {}

    def additive(
        self, q: Any, k: Any, key_mask: Any, segments: Any, *, causal: bool, window: int | None, dtype: Any
    ) -> Any:
        """Return the mask of one attention, or None where every key is seen.

        Args:
            q: (batch, heads, queries, size); read for its sizes.
            k: (batch, heads, keys, size), likewise.
            key_mask: (batch, keys), true where a key may be seen, or None.
            segments: (batch, keys), or None.
            causal: hide later positions.
            window: positions seen, or None.
            dtype: of the result, which broadcasts to (batch, heads, queries, keys).
        """
        key = (
            "mask", str(q.shape[2]), str(k.shape[2]), _name(key_mask), _name(segments), causal, window, dtype,
        )  # fmt: skip
        if key in self.memo:
            return self.memo[key]
        terms = []
        if causal or window is not None:
            terms.append(self._positions(q, k, causal, window, dtype))
        if segments is not None:
            terms.append(self._hide(self._same_segment(q, k, segments), dtype))
        if key_mask is not None:
            terms.append(self._keys(key_mask, dtype))
        mask = None
        for term in terms:
            mask = term if mask is None else self.op.Add(mask, term)
        if len(terms) > 2:
            mask = self.op.Max(mask, self._constant(2 * HIDDEN, dtype))
        self.memo[key] = mask
        return mask

    def for_every_query(self, mask: Any, q: Any) -> Any:
        """Return a mask that may have one row for all queries with a row for each, as runtimes want it."""
        if mask.shape is not None and same_size(mask.shape[2], q.shape[2]):
            return mask
        key = ("rows", id(mask), str(q.shape[2]))
        if key not in self.memo:
            count = self.op.Shape(q, start=2, end=3)
            one = self._integers(1)
            rows = self.op.Expand(mask, self.op.Concat(one, one, count, one, axis=0))
            # the mask is kept too: an identity means something only while its object lives
            self.memo[key] = (rows, mask)
        return self.memo[key][0]

    def _keys(self, key_mask: Any, dtype: Any) -> Any:
        key = ("keys", key_mask.name, dtype)
        if key not in self.memo:
            wide = self.op.Unsqueeze(key_mask, self._integers(1, 2))
            self.memo[key] = self._hide(wide, dtype)
        return self.memo[key]

    def _hide(self, visible: Any, dtype: Any) -> Any:
        """Return 0 where ``visible``, else HIDDEN, without a boolean operator."""
        seen = self.op.Cast(visible, to=dtype)
        return self.op.Mul(self.op.Sub(seen, self._constant(1.0, dtype)), self._constant(-HIDDEN, dtype))

    def _positions(self, q: Any, k: Any, causal: bool, window: int | None, dtype: Any) -> Any:
        queries, keys = q.shape[2], k.shape[2]
        if isinstance(queries, int) and isinstance(keys, int) and queries * keys <= _LARGEST_CONSTANT:
            return self._constant_positions(queries, keys, causal, window, dtype)
        op = self.op
        length = op.Squeeze(op.Shape(k, start=2, end=3))
        column = op.Range(self._constant(0), length, self._constant(1))
        row = column
        if not same_size(queries, keys):
            count = op.Squeeze(op.Shape(q, start=2, end=3))
            row = op.Add(op.Range(self._constant(0), count, self._constant(1)), op.Sub(length, count))
        distance = op.Sub(op.Unsqueeze(row, self._integers(1)), op.Unsqueeze(column, self._integers(0)))
        if not causal:
            distance = op.Abs(distance)
        terms = []
        if causal:
            terms.append(op.GreaterOrEqual(distance, self._constant(0)))
        if window is not None:
            terms.append(op.Less(distance, self._constant(window)))
        seen = terms[0] if len(terms) == 1 else op.And(*terms)
        return self._hide(op.Unsqueeze(seen, self._integers(0, 1)), dtype)

    def _constant_positions(
        self, queries: int, keys: int, causal: bool, window: int | None, dtype: Any
    ) -> Any:
        import numpy

        distance = numpy.arange(queries)[:, None] + (keys - queries) - numpy.arange(keys)[None, :]
        seen = distance >= 0 if causal else numpy.ones_like(distance, dtype=bool)
        if window is not None:
            seen &= (distance if causal else abs(distance)) < window
        values = numpy.where(seen, 0.0, HIDDEN).astype(dtype.numpy())[None, None]
        return self.op.Constant(value=self.ir.tensor(values))

    def _same_segment(self, q: Any, k: Any, segments: Any) -> Any:
        op = self.op
        row = op.Unsqueeze(segments, self._integers(1, 3))
        if not same_size(q.shape[2], k.shape[2]):
            start = op.Neg(op.Shape(q, start=2, end=3))
            row = op.Slice(row, start, self._integers(2**62), self._integers(2))
        return op.Equal(row, op.Unsqueeze(segments, self._integers(1, 2)))

    def _constant(self, value: float, dtype: Any = None) -> Any:
        kind = self.ir.DataType.INT64 if dtype is None else dtype
        return self.op.Constant(value=self.ir.tensor(value, dtype=kind))

    def _integers(self, *values: int) -> Any:
        return self.op.Constant(value=self.ir.tensor(list(values), dtype=self.ir.DataType.INT64))


def same_size(first: Any, second: Any) -> bool:
    """Tell whether two dimensions are equal for all inputs, as far as is known."""
    if isinstance(first, int) or isinstance(second, int):
        return bool(first == second)
    return first.value is not None and first.value == second.value


def _name(value: Any) -> str:
    return "" if value is None else str(value.name)
