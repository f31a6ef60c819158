"""Linear attention and short convolutions in ONNX, for any number of tokens: chunks side by side, a Scan over states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...ir.operators.linear_attention import CHANNEL_CHUNK, CHUNK
from .nodes import Nodes

NEVER = -1e30
"""What is put in place of a logarithm whose exponential has to be zero."""
_END = 2**62


@dataclass(frozen=True)
class _Operands:
    """What both operators read, in one type.

    Attributes:
        by_channel: every entry of a key has a decay of its own.
        heads: number of them.
        sizes: of keys and of values.
        rank: number of dimensions of ``k``; five once tokens are in chunks, (batch, heads, chunks, tokens, size).
    """

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    by_channel: bool
    heads: int
    sizes: tuple[int, int]
    rank: int = 4


@dataclass(frozen=True)
class _Chunk:
    """What tokens that are computed at once do to a state and read from it, before it is known.

    Attributes:
        values: that are added to the state, where nothing is in it.
        erased: times the state, what the delta rule takes from these values; None without it.
        queries: times the state, what tokens read from it; None if only the state is asked for.
        scores: times the values, what tokens read from one another; None likewise.
        keys: (..., key size, tokens); times the values, what is added to the state.
        kept: what is left of the state, as factors.
    """

    values: Any
    erased: Any
    queries: Any
    scores: Any
    keys: Any
    kept: Any


class LinearAttention(Nodes):
    """Translates ``graphopt.linear_attention``, its state, and ``graphopt.causal_conv1d``."""

    def __init__(self) -> None:
        super().__init__()
        self._bodies = 0
        self._wide: Any = None

    def linear_attention(
        self, q: Any, k: Any, v: Any, g: Any, beta: Any = None, state: Any = None, step_mask: Any = None
    ) -> Any:
        """``graphopt.linear_attention``."""
        y, _ = self._computed(q, k, v, g, beta, state, step_mask, None)
        return y if v.dtype == self._wide else self.op.Cast(y, to=v.dtype)

    def linear_attention_state(
        self, k: Any, v: Any, g: Any, beta: Any, state: Any, taken: Any, step_mask: Any = None
    ) -> Any:
        """``graphopt.linear_attention_state``."""
        _, after = self._computed(None, k, v, g, beta, state, step_mask, taken)
        return after if state.dtype == self._wide else self.op.Cast(after, to=state.dtype)

    def causal_conv1d(self, x: Any, weight: Any, bias: Any = None, state: Any = None) -> Any:
        """``graphopt.causal_conv1d`` along consecutive tokens."""
        op, (channels, _, taps) = self.op, (int(size) for size in weight.shape)
        rows = x
        pads = [taps - 1, 0]
        if state is not None:
            rows, pads = op.Concat(self.cast(state, x.dtype), x, axis=2), [0, 0]
        if x.dtype != self.ir.DataType.DOUBLE:
            return op.Conv(rows, weight, bias, group=channels, pads=pads)
        # runtimes convolve in no type as wide as this
        if state is None:
            rows = op.Pad(rows, self.integers(0, 0, taps - 1, 0, 0, 0))
        total = None if bias is None else op.Unsqueeze(bias, self.integers(1))
        for tap in range(taps):
            end = tap - taps + 1 if tap < taps - 1 else _END
            seen = op.Slice(rows, self.integers(tap), self.integers(end), self.integers(2))
            factor = op.Slice(weight, self.integers(tap), self.integers(tap + 1), self.integers(2))
            product = op.Mul(seen, op.Squeeze(factor, self.integers(2)))
            total = product if total is None else op.Add(total, product)
        return total

    # -- operands -----------------------------------------------------------------------------------

    def _computed(
        self, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, step_mask: Any, taken: Any
    ) -> tuple[Any, Any]:
        """Return outputs, and the state after all tokens or those that are taken."""
        op, kinds = self.op, self.ir.DataType
        given = [t for t in (q, k, v, g, beta, state) if t is not None]
        self._wide = kinds.DOUBLE if any(t.dtype == kinds.DOUBLE for t in given) else kinds.FLOAT
        heads, sizes = int(v.shape[1]), (int(k.shape[3]), int(v.shape[3]))
        by_channel = len(g.shape) == 4
        q, k = (None if t is None else self._for_heads(t, heads) for t in (q, k))
        q, k, v, g, beta, state = (
            None if t is None else self.cast(t, self._wide) for t in (q, k, v, g, beta, state)
        )
        tokens = op.Shape(v, start=2, end=3)
        if state is None:
            shape = op.Concat(op.Shape(v, start=0, end=1), self.integers(heads, *sizes), axis=0)
            state = op.Expand(self.number(0.0, self._wide), shape)
        x = _Operands(q, k, v, g, beta, by_channel, heads, sizes)
        if step_mask is not None:
            return self._stepped(self._tree(x, step_mask, taken, tokens), state)
        return self._in_chunks(x, state, taken, tokens)

    def _for_heads(self, t: Any, heads: int) -> Any:
        of_keys = int(t.shape[1])
        if of_keys in (1, heads):
            return t
        op = self.op
        repeated = op.Expand(op.Unsqueeze(t, self.integers(2)), self.integers(1, 1, heads // of_keys, 1, 1))
        result = op.Reshape(repeated, self.integers(0, heads, -1, int(t.shape[3])))
        result.dtype = t.dtype
        return result

    def _in_chunks(self, x: _Operands, state: Any, taken: Any, tokens: Any) -> tuple[Any, Any]:
        op, int64 = self.op, self.ir.DataType.INT64
        if taken is not None:
            # a decay of one and a key of zero leave the state as it is
            factor = op.Cast(op.Unsqueeze(taken, self.integers(1)), to=self._wide)
            column = op.Unsqueeze(factor, self.integers(-1))
            x = replace(x, k=op.Mul(x.k, column), g=op.Mul(x.g, column if x.by_channel else factor))
        # a decay for each entry takes a chunk much memory, which the delta rule alone is worth
        longest = CHUNK if not x.by_channel else CHANNEL_CHUNK if x.beta is not None else 1
        size = op.Min(tokens, self.integers(longest))
        count = op.Div(op.Sub(op.Add(tokens, size), self.integers(1)), size)
        missing = op.Sub(op.Mul(count, size), tokens)

        def chunks(t: Any, width: int | None) -> Any:
            if t is None:
                return None
            last, after = ((), ()) if width is None else ((self.integers(width),), (self.integers(0),))
            begin = self.integers(*[0] * (3 if width is None else 4), 0, 0)
            padded = op.Pad(t, op.Concat(begin, missing, *after, axis=0))
            return op.Reshape(padded, op.Concat(self.integers(0, 0), count, size, *last, axis=0))

        keys, values = x.sizes
        x = replace(
            x, q=chunks(x.q, keys), k=chunks(x.k, keys), v=chunks(x.v, values),
            g=chunks(x.g, keys if x.by_channel else None), beta=chunks(x.beta, None), rank=5,
        )  # fmt: skip
        order = op.Range(self.number(0, int64), op.Squeeze(size), self.number(1, int64))
        above = op.GreaterOrEqual(
            op.Unsqueeze(order, self.integers(1)), op.Unsqueeze(order, self.integers(0))
        )
        total = op.CumSum(x.g, self.number(3, int64))
        end = op.Slice(total, self.integers(-1), self.integers(_END), self.integers(3))
        rest = op.Exp(op.Sub(end, total))
        y, after = self._scanned(self._chunk(x, above, total, end, rest, size), state)
        if y is not None:
            y = op.Reshape(y, self.integers(0, 0, -1, values))
            y = op.Slice(y, self.integers(0), tokens, self.integers(2))
        return y, after

    def _tree(self, x: _Operands, step_mask: Any, taken: Any, tokens: Any) -> _Chunk:
        """Return what the nodes of a tree are, all of them at once."""
        op = self.op
        above = op.Unsqueeze(op.Cast(step_mask, to=self.ir.DataType.BOOL), self.integers(1))
        path = op.Cast(above, to=self._wide)
        if x.by_channel:
            total = op.MatMul(path, x.g)
        else:
            total = op.Squeeze(op.MatMul(path, op.Unsqueeze(x.g, self.integers(-1))), self.integers(-1))
        if taken is None:
            # only the outputs are asked for
            end = rest = total
        else:
            left = op.Unsqueeze(op.Not(taken), self.integers(*((1, 3) if x.by_channel else (1,))))
            fallen = op.Where(left, self.number(0.0, self._wide), total)
            end = op.ReduceMin(fallen, self.integers(2), keepdims=1)
            rest = op.Exp(op.Where(left, self.number(NEVER, self._wide), op.Sub(end, total)))
        return self._chunk(x, above, total, end, rest, tokens)

    # -- a chunk ------------------------------------------------------------------------------------

    def _chunk(self, x: _Operands, above: Any, total: Any, end: Any, rest: Any, tokens: Any) -> _Chunk:
        """Return a chunk, or many side by side.

        Args:
            x: operands.
            above: (..., tokens, tokens), true where a token is another one or comes after it.
            total: the sum of the logarithms of decays up to each token.
            end: of all that count in the new state.
            rest: the decay of what each token adds to the state.
            tokens: their number, for a vector of shapes.
        """
        op = self.op
        last, before = self.integers(-1), self.integers(-2)
        if x.by_channel:
            apart = op.Sub(op.Unsqueeze(total, before), op.Unsqueeze(total, self.integers(-3)))
            visible, through, strengths = op.Unsqueeze(above, last), op.Exp(total), rest
        else:
            apart = op.Sub(op.Unsqueeze(total, last), op.Unsqueeze(total, before))
            visible, through = above, op.Unsqueeze(op.Exp(total), last)
            strengths = op.Unsqueeze(rest, last)
        decay = op.Exp(op.Where(visible, apart, self.number(NEVER, self._wide)))

        def scores(rows: Any) -> Any:
            if x.by_channel:
                pairs = op.Mul(op.Unsqueeze(rows, before), op.Unsqueeze(x.k, self.integers(-3)))
                return op.ReduceSum(op.Mul(pairs, decay), last, keepdims=0)
            return op.Mul(op.MatMul(rows, self._turned(x.k, x.rank)), decay)

        values, erased = x.v, None
        if x.beta is not None:
            strength = op.Unsqueeze(x.beta, last)
            keys = op.Mul(x.k, strength)
            solved = self._inverse(scores(keys), x.rank, tokens)
            values = op.MatMul(solved, op.Mul(x.v, strength))
            erased = op.MatMul(solved, op.Mul(keys, through))
        kept = op.Exp(end)
        kept = self._turned(kept, x.rank) if x.by_channel else op.Unsqueeze(kept, last)
        return _Chunk(
            values,
            erased,
            None if x.q is None else op.Mul(x.q, through),
            None if x.q is None else scores(x.q),
            self._turned(op.Mul(x.k, strengths), x.rank),
            kept,
        )

    def _turned(self, matrix: Any, rank: int) -> Any:
        return self.op.Transpose(matrix, perm=[*range(rank - 2), rank - 1, rank - 2])

    def _stepped(self, chunk: _Chunk, state: Any) -> tuple[Any, Any]:
        """Return what a chunk reads from a state, and the state after it."""
        op, added, y = self.op, chunk.values, None
        if chunk.erased is not None:
            added = op.Sub(added, op.MatMul(chunk.erased, state))
        if chunk.queries is not None:
            y = op.Add(op.MatMul(chunk.queries, state), op.MatMul(chunk.scores, added))
        return y, op.Add(op.Mul(state, chunk.kept), op.MatMul(chunk.keys, added))

    def _scanned(self, chunk: _Chunk, state: Any) -> tuple[Any, Any]:
        """Return what chunks read, (batch, heads, chunks, tokens, size), and the state after the last one."""
        given = {name: value for name, value in vars(chunk).items() if value is not None}

        def body(before: Any, *parts: Any) -> list[Any]:
            now = replace(chunk, **dict(zip(given, parts, strict=True)))
            y, after = self._stepped(now, before)
            return [after] if y is None else [after, y]

        inputs = [state, *given.values()]
        graph = self._body(body, [(self._wide, 4)] * len(inputs))
        along = {"scan_output_axes": [2]} if chunk.queries is not None else {}
        after, *read = self._call(
            "Scan", inputs, len(graph.outputs), body=graph, num_scan_inputs=len(given),
            scan_input_axes=[2] * len(given), **along,
        )  # fmt: skip
        return read[0] if read else None, after

    def _inverse(self, matrix: Any, rank: int, tokens: Any) -> Any:
        """Return the inverses of unit lower triangular matrices, of which only what lies below the diagonal is read.

        A block of twice the size, ``[[A, 0], [C, B]]``, has the inverse ``[[A', 0], [-B' C A', B']]``: a product for
        each time that the size doubles, where powers of the matrix would grow beyond what a float holds exactly.
        """
        op, kinds = self.op, self.ir.DataType
        order = op.Range(self.number(0, kinds.INT64), op.Squeeze(tokens), self.number(1, kinds.INT64))
        down, across = op.Unsqueeze(order, self.integers(1)), op.Unsqueeze(order, self.integers(0))
        identity = op.Cast(op.Equal(down, across), to=self._wide)
        begun = op.Add(op.Mul(matrix, self.number(0.0, self._wide)), identity)
        # a round too many changes nothing
        rounds = op.Div(
            op.Log(op.Cast(op.Squeeze(tokens), to=kinds.FLOAT)), self.number(math.log(2), kinds.FLOAT)
        )
        rounds = op.Cast(op.Ceil(op.Add(rounds, self.number(1e-3, kinds.FLOAT))), to=kinds.INT64)

        def body(number: Any, going: Any, inverse: Any, block: Any) -> list[Any]:
            one, two = self.number(1, kinds.INT64), self.number(2, kinds.INT64)
            row, column = op.Div(down, block), op.Div(across, block)
            below = op.And(op.Equal(op.Mod(row, two), one), op.Equal(row, op.Add(column, one)))
            corner = op.Where(below, matrix, self.number(0.0, self._wide))
            longer = op.Sub(inverse, op.MatMul(op.MatMul(inverse, corner), inverse))
            return [op.Identity(going), longer, op.Mul(block, two)]

        types = [(kinds.INT64, 0), (kinds.BOOL, 0), (self._wide, rank), (kinds.INT64, 0)]
        graph = self._body(body, types)
        going = self.op.Constant(value=self.ir.tensor(True))
        return self._call("Loop", [rounds, going, begun, self.number(1, kinds.INT64)], 2, body=graph)[0]

    # -- graphs within the graph --------------------------------------------------------------------

    def _body(self, write: Callable[..., list[Any]], types: list[tuple[Any, int]]) -> Any:
        """Return the graph that a function writes, whose inputs have these types and numbers of dimensions."""
        recorder, ir = self._recorder(), self.ir
        self._bodies += 1
        inputs = [
            ir.Value(
                name=f"inner_{self._bodies}_input_{i}",
                type=ir.TensorType(dtype),
                shape=ir.Shape([None] * rank),
            )
            for i, (dtype, rank) in enumerate(types)
        ]
        outside, recorder.nodes = recorder.nodes, []
        try:
            outputs = write(*inputs)
            nodes = recorder.nodes
        finally:
            recorder.nodes = outside
        for number, value in enumerate(value for node in nodes for value in node.outputs):
            # names are those of the whole file
            value.name = f"inner_{self._bodies}_{number}"
        return ir.Graph(inputs, outputs, nodes=nodes, name=f"inner_{self._bodies}")

    def _call(self, name: str, inputs: list[Any], outputs: int, **attributes: Any) -> tuple[Any, ...]:
        """Write an operator with a graph within, of which the number of results is no part of its schema."""
        recorder = self._recorder()
        node = self.ir.Node(
            "", name, inputs, self.ir.convenience.convert_attributes(attributes), num_outputs=outputs,
            version=self.op.version,
        )  # fmt: skip
        recorder.nodes.append(node)
        return tuple(node.outputs)

    def _recorder(self) -> Any:
        from onnxscript import evaluator

        return evaluator.default()
