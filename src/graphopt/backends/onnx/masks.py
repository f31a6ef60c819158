"""Attention masks for ONNX: numbers added to scores, built once and shared by the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .nodes import Nodes, same_size

HIDDEN = -30000.0
"""What is added to the score of a hidden key.

Its exponential is zero in every type, and unlike an infinity it leaves a row that sees no key finite; two
of them still fit in float16.
"""
_LARGEST_CONSTANT = 1 << 24


class Masks(Nodes):
    """Builds the masks of one export."""

    def __init__(self) -> None:
        super().__init__()
        self._memo: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def once(self, key: tuple[Any, ...], read: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the result of ``make`` for this key and these values, calling it only the first time.

        The nodes of an earlier layer come earlier in the graph, so that later layers may read them.
        """
        full = (*key, *(id(value) for value in read))
        if full not in self._memo:
            # the values are stored too, because an id is only valid while its object lives
            self._memo[full] = (make(), read)
        return self._memo[full][0]

    def additive(
        self, q: Any, k: Any, key_mask: Any, segments: Any, visible: Any = None, *,
        causal: bool, window: int | None, dtype: Any,
    ) -> Any:  # fmt: skip
        """Return the mask of one attention, or None if every key is visible.

        Args:
            q: (batch, heads, queries, size); read for its sizes.
            k: (batch, heads, keys, size), likewise.
            key_mask: (batch, keys), true where a key may be seen, or None.
            segments: (batch, keys), or None.
            visible: (batch, 1, queries, keys), true where a key may be seen, or None.
            causal: hide later positions.
            window: positions seen, or None.
            dtype: of the result, which broadcasts to (batch, heads, queries, keys).
        """
        key = ("mask", str(q.shape[2]), str(k.shape[2]), causal, window, dtype)

        def make() -> Any:
            terms = []
            if causal or window is not None:
                terms.append(self._positions(q, k, causal, window, dtype))
            if segments is not None:
                terms.append(self._hide(self._same_segment(q, k, segments), dtype))
            if key_mask is not None:
                terms.append(self._keys(key_mask, dtype))
            if visible is not None:
                terms.append(self._hide(visible, dtype))
            mask = None
            for term in terms:
                mask = term if mask is None else self.op.Add(mask, term)
            return self.op.Max(mask, self.number(2 * HIDDEN, dtype)) if len(terms) > 2 else mask

        return self.once(key, (key_mask, segments, visible), make)

    def for_every_query(self, mask: Any, q: Any) -> Any:
        """Return a mask with a row for each query, as runtimes require, from one that may have a single row."""
        if mask.shape is not None and same_size(mask.shape[2], q.shape[2]):
            return mask

        def make() -> Any:
            unit = self.integers(1)
            count = self.op.Shape(q, start=2, end=3)
            return self.op.Expand(mask, self.op.Concat(unit, unit, count, unit, axis=0))

        return self.once(("rows", str(q.shape[2])), (mask,), make)

    def _keys(self, key_mask: Any, dtype: Any) -> Any:
        def make() -> Any:
            visible = self.cast(key_mask, self.ir.DataType.BOOL)
            return self._hide(self.op.Unsqueeze(visible, self.integers(1, 2)), dtype)

        return self.once(("keys", dtype), (key_mask,), make)

    def _hide(self, visible: Any, dtype: Any) -> Any:
        """Return 0 where ``visible``, else HIDDEN, without a boolean operator."""
        factor = self.op.Cast(visible, to=dtype)
        return self.op.Mul(self.op.Sub(factor, self.number(1.0, dtype)), self.number(-HIDDEN, dtype))

    def _positions(self, q: Any, k: Any, causal: bool, window: int | None, dtype: Any) -> Any:
        queries, keys = q.shape[2], k.shape[2]
        if isinstance(queries, int) and isinstance(keys, int) and queries * keys <= _LARGEST_CONSTANT:
            return self._constant_positions(queries, keys, causal, window, dtype)
        op, int64 = self.op, self.ir.DataType.INT64
        zero, unit = self.number(0, int64), self.number(1, int64)
        length = op.Squeeze(op.Shape(k, start=2, end=3))
        column = op.Range(zero, length, unit)
        row = column
        if not same_size(queries, keys):
            count = op.Squeeze(op.Shape(q, start=2, end=3))
            row = op.Add(op.Range(zero, count, unit), op.Sub(length, count))
        distance = op.Sub(op.Unsqueeze(row, self.integers(1)), op.Unsqueeze(column, self.integers(0)))
        if not causal:
            distance = op.Abs(distance)
        terms = []
        if causal:
            terms.append(op.GreaterOrEqual(distance, zero))
        if window is not None:
            terms.append(op.Less(distance, self.number(window, int64)))
        visible = terms[0] if len(terms) == 1 else op.And(*terms)
        return self._hide(op.Unsqueeze(visible, self.integers(0, 1)), dtype)

    def _constant_positions(
        self, queries: int, keys: int, causal: bool, window: int | None, dtype: Any
    ) -> Any:
        import numpy

        distance = numpy.arange(queries)[:, None] + (keys - queries) - numpy.arange(keys)[None, :]
        visible = distance >= 0 if causal else numpy.ones_like(distance, dtype=bool)
        if window is not None:
            visible &= (distance if causal else abs(distance)) < window
        values = numpy.where(visible, 0.0, HIDDEN).astype(dtype.numpy())[None, None]
        return self.op.Constant(value=self.ir.tensor(values))

    def _same_segment(self, q: Any, k: Any, segments: Any) -> Any:
        op = self.op
        row = op.Unsqueeze(segments, self.integers(1, 3))
        if not same_size(q.shape[2], k.shape[2]):
            start = op.Neg(op.Shape(q, start=2, end=3))
            row = op.Slice(row, start, self.integers(2**62), self.integers(2))
        return op.Equal(row, op.Unsqueeze(segments, self.integers(1, 2)))
