"""Mixture of experts in ONNX."""

from __future__ import annotations

from typing import Any

from .nodes import Nodes


class Experts(Nodes):
    """Translates ``graphopt.routed_ffn``."""

    def routed_ffn(
        self,
        x: Any,
        experts: Any,
        weights: Any,
        up: Any,
        down: Any,
        up_bias: Any = None,
        down_bias: Any = None,
        first: Any = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        transposed: bool = False,
        limit: float = 0.0,
        alpha: float = 1.0,
        weigh_inputs: bool = False,
    ) -> Any:
        """``graphopt.routed_ffn``: every expert on every token, times a gate that is mostly zero.

        Gathering the expert matrices of each token, as traced graphs do, copies them once per token; here they stay
        constants of ordinary matrix products, at the cost of more arithmetic.
        """
        op = self.op
        if first is not None:
            dtype = experts.dtype
            experts = op.Sub(experts, first)  # an expert that is not on this rank equals none of them
            experts.dtype = dtype
        count = int(up.shape[0])
        ids = op.Constant(value=self.ir.tensor(list(range(count)), dtype=experts.dtype))
        selected = op.Equal(op.Unsqueeze(experts, self.integers(-1)), ids)
        hot = op.Cast(selected, to=weights.dtype)

        def per_expert(factors: Any) -> Any:
            # (tokens, k, experts) -> (experts, tokens, 1)
            total = op.Transpose(op.ReduceSum(factors, self.integers(1), keepdims=0), perm=[1, 0])
            column = op.Unsqueeze(total, self.integers(-1))
            column.dtype = weights.dtype
            return column

        gate = per_expert(op.Mul(hot, op.Unsqueeze(weights, self.integers(-1))))

        def project(rows: Any, matrix: Any, bias: Any) -> Any:
            product = op.MatMul(rows, matrix if transposed else op.Transpose(matrix, perm=[0, 2, 1]))
            return product if bias is None else op.Add(product, op.Unsqueeze(bias, self.integers(1)))

        rows = op.Unsqueeze(x, self.integers(0))
        if weigh_inputs:
            rows, gate = op.Mul(rows, self.cast(gate, x.dtype)), per_expert(hot)
        hidden = project(rows, up, up_bias)
        inner = int(up.shape[2 if transposed else 1])
        hidden = self._activate(hidden, inner, x, activation, gated, interleaved, limit, alpha)
        result = project(hidden, down, down_bias)
        result.dtype = x.dtype
        common = self.common(result, gate)
        total = op.ReduceSum(
            op.Mul(self.cast(result, common), self.cast(gate, common)), self.integers(0), keepdims=0
        )
        total.dtype = common
        return self.cast(total, x.dtype)

    def _activate(
        self,
        hidden: Any,
        inner: int,
        like: Any,
        activation: str,
        gated: bool,
        interleaved: bool,
        limit: float,
        alpha: float,
    ) -> Any:
        op, up = self.op, None
        if gated and interleaved:
            pairs = op.Reshape(hidden, self.integers(0, 0, inner // 2, 2))
            hidden, up = (
                op.Squeeze(half, self.integers(-1)) for half in op.Split(pairs, axis=-1, num_outputs=2)
            )
        elif gated:
            hidden, up = op.Split(hidden, axis=-1, num_outputs=2)
        if activation == "swiglu_clamped":
            high, low = self.number(limit, like.dtype), self.number(-limit, like.dtype)
            hidden = op.Min(hidden, high)
            up = op.Add(op.Max(op.Min(up, high), low), self.number(1.0, like.dtype))
            return op.Mul(up, op.Mul(hidden, op.Sigmoid(op.Mul(hidden, self.number(alpha, like.dtype)))))
        if activation == "silu_softcapped":
            active = op.Mul(self._softcapped(hidden, limit, like), op.Sigmoid(hidden))
            return active if up is None else op.Mul(active, self._softcapped(up, alpha, like))
        if activation == "silu_clamped":
            high, low = self.number(limit, like.dtype), self.number(-limit, like.dtype)
            hidden = op.Min(hidden, high)
            up = None if up is None else op.Max(op.Min(up, high), low)
        if activation in ("silu", "silu_clamped"):
            active = op.Mul(hidden, op.Sigmoid(hidden))
        elif activation in ("gelu", "gelu_tanh"):
            active = self._gelu(hidden, activation == "gelu_tanh")
        elif activation in ("relu", "relu2"):
            active = op.Relu(hidden)
            if activation == "relu2":
                active = op.Mul(active, active)
        elif activation == "gelu_sigmoid":
            active = op.Mul(hidden, op.Sigmoid(op.Mul(hidden, self.number(1.702, like.dtype))))
        elif activation == "tanh":
            active = op.Tanh(hidden)
        else:
            raise ValueError(f"no ONNX form of the activation {activation!r}")
        return active if up is None else op.Mul(active, up)

    def _softcapped(self, value: Any, cap: float, like: Any) -> Any:
        bound = self.number(cap, like.dtype)
        return self.op.Mul(self.op.Tanh(self.op.Div(value, bound)), bound)

    def _gelu(self, hidden: Any, tanh: bool) -> Any:
        from onnxscript import opset20

        return opset20.Gelu(hidden, approximate="tanh" if tanh else "none")
