"""graphopt's operator set in ONNX: fused operators if ONNX has the same semantics, otherwise a few plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .experts import Experts
from .linear_attention import LinearAttention
from .masks import Masks
from .nodes import is_scalar, same_size
from .runtime_operators import RuntimeWriter, translations

FUSED_FROM = 23
"""First opset with Attention, RMSNormalization and RotaryEmbedding."""

QUANTIZED_FROM = 21
"""First opset whose QuantizeLinear makes integers of 16 and 4 bits."""

_THROUGH = {"Cos", "Sin", "Cast", "Unsqueeze", "Mul", "Identity", "Reshape"}


def translation_table(opset: int, kernels: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of each graphopt operator, for ``custom_translation_table``.

    Args:
        opset: of the file; from 23 on attention, RMS norm and rotary embedding stay one node each.
        kernels: use operators that ONNX Runtime has beside the standard's.
    """
    writer = OperatorWriter(opset, kernels)
    operators = torch.ops.graphopt
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    names = (
        "attention", "rms_norm", "rotary", "routed_ffn", "fake_quantize", "fake_quantize_channels",
        "linear_attention", "linear_attention_state", "causal_conv1d",
    )  # fmt: skip
    for name in names:
        table[getattr(operators, name).default] = _unannotated(getattr(writer, name))
    if writer.kernels is not None:
        for operator, method in translations(writer.kernels).items():
            table[operator] = _unannotated(method)
    # the exporter handles these two only after its decomposition, which is most of its time
    table[torch.ops.aten.to.dtype] = _unannotated(writer.to)
    table[torch.ops.aten.batch_norm.default] = _unannotated(writer.batch_norm)
    return table


def _unannotated(method: Callable[..., Any]) -> Callable[..., Any]:
    # the exporter reads annotations as ONNX types and writes an attribute on the function
    return lambda *args, **kwargs: method(*args, **kwargs)


class OperatorWriter(Experts, LinearAttention):
    """Writes nodes while the exporter records them; one object per export, so that layers can share masks."""

    def __init__(self, opset: int, kernels: bool = False):
        super().__init__()
        from onnxscript import values

        self.fused: Any = values.Opset("", FUSED_FROM) if opset >= FUSED_FROM else None
        self.wide: Any = values.Opset("", opset) if opset >= QUANTIZED_FROM else None
        self.masks = Masks()
        self.kernels = RuntimeWriter(self.masks) if kernels else None

    def fake_quantize(self, x: Any, scale: float, zero_point: int, *, dtype: str) -> Any:
        """``graphopt.fake_quantize``: QuantizeLinear and DequantizeLinear."""
        kind = self.ir.DataType[dtype.upper()]
        return self._pair(x, self.number(scale, x.dtype), self.number(zero_point, kind), kind, {})

    def fake_quantize_channels(
        self, x: Any, scale: Any, integers: Any = None, *, axis: int, dtype: str
    ) -> Any:
        """``graphopt.fake_quantize_channels``: the same along an axis, or in blocks of it, with zero point 0."""
        import numpy

        assert integers is None, "weights are replaced by their integers before they are written"
        kind = self.ir.DataType[dtype.upper()]
        zeros = numpy.zeros([int(s) for s in scale.shape], kind.numpy())
        zero = self.op.Constant(value=self.ir.tensor(zeros, dtype=kind))
        if len(scale.shape) == 2:
            return self._pair(
                x, scale, zero, kind, {"axis": 1, "block_size": int(x.shape[1]) // int(scale.shape[1])}
            )
        return self._pair(x, scale, zero, kind, {"axis": axis})

    def _pair(self, x: Any, scale: Any, zero: Any, kind: Any, options: dict[str, int]) -> Any:
        if self.wide is None:
            raise ValueError("quantised programs are written at opset 21 or later")
        stored = self.wide.QuantizeLinear(x, scale, zero, **options)
        stored.dtype, stored.shape = kind, x.shape
        back = self.wide.DequantizeLinear(stored, scale, zero, **options)
        back.dtype, back.shape = x.dtype, x.shape
        return back

    def _can_fuse(self, value: Any) -> bool:
        return self.fused is not None and (value.dtype == self.ir.DataType.FLOAT or self.half(value))

    def to(self, x: Any, dtype: Any, *rest: Any, **options: Any) -> Any:
        """``aten.to.dtype``."""
        return self.op.Cast(x, to=dtype)

    def batch_norm(
        self, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any
    ) -> Any:
        """``aten.batch_norm`` of a model in evaluation mode."""
        if training or mean is None or variance is None:
            raise ValueError("a batch norm in training mode has no ONNX form for inference")
        eps = rest[1]
        if weight is None or bias is None:
            zero = self.op.Mul(mean, self.number(0.0, mean.dtype))
            weight = self.op.Add(zero, self.number(1.0, mean.dtype)) if weight is None else weight
            bias = zero if bias is None else bias
        return self.op.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)

    def rms_norm(
        self, x: Any, weight: Any, eps: float, *, float32: bool = True, weight_before_cast: bool = False
    ) -> Any:
        """``graphopt.rms_norm``."""
        op, kind = self.op, x.dtype
        if self.kernels is not None and self._norm_has_kernel(x, weight):
            if weight is None:
                weight = op.Constant(value=self.ir.tensor([1.0] * int(x.shape[-1]), dtype=kind))
            return self.kernels.rms_norm(x, weight, eps)
        same_order = not self.half(x) or (float32 and not weight_before_cast)
        if self._can_fuse(x) and same_order and weight is not None and weight.dtype == kind:
            return self.fused.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)
        wide = self.cast(x, self.ir.DataType.FLOAT) if float32 and self.half(x) else x
        mean = op.ReduceMean(op.Mul(wide, wide), self.integers(-1), keepdims=1)
        scaled = op.Div(wide, op.Sqrt(op.Add(mean, self.number(eps, wide.dtype))))
        scaled.dtype = wide.dtype
        if weight is None:
            return self.cast(scaled, kind)
        if weight_before_cast:
            product = op.Mul(scaled, self.cast(weight, wide.dtype))
            product.dtype = wide.dtype
            return self.cast(product, kind)
        scaled = self.cast(scaled, kind)
        common = self.common(scaled, weight)
        # constants second: some accelerator compilers support no other order
        return op.Mul(self.cast(scaled, common), self.cast(weight, common))

    def _norm_has_kernel(self, x: Any, weight: Any) -> bool:
        floats = (self.ir.DataType.FLOAT, self.ir.DataType.FLOAT16)
        if x.dtype not in floats or not isinstance(x.shape[-1], int):
            return False
        return weight is None or (weight.dtype == x.dtype and list(weight.shape) == [x.shape[-1]])

    def rotary(self, x: Any, cos: Any, sin: Any, *, interleaved: bool = False) -> Any:
        """``graphopt.rotary``."""
        op = self.op
        common = self.common(x, cos)
        x, cos, sin = (self.cast(value, common) for value in (x, cos, sin))
        rank, size = len(x.shape), int(x.shape[-1])
        repeats = not interleaved and self._halves_repeat(cos) and self._halves_repeat(sin)
        if repeats and (self._can_fuse(x) or self._rotary_has_kernel(x)):
            tables = [self._half_table(table, x) for table in (cos, sin)]
            if all(table is not None for table in tables):
                if self.kernels is not None:
                    return self.kernels.rotary(x, *tables)
                return self.fused.RotaryEmbedding(x, *tables)
        if interleaved:
            pairs = op.Reshape(x, self.integers(*[0] * (rank - 1), size // 2, 2))
            first, second = op.Split(pairs, axis=-1, num_outputs=2)
            turned = op.Concat(op.Neg(second), first, axis=-1)
            turned = op.Reshape(turned, self.integers(*[0] * (rank - 1), size))
        else:
            first, second = op.Split(x, axis=-1, num_outputs=2)
            turned = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(turned, sin))

    def _rotary_has_kernel(self, x: Any) -> bool:
        floats = (self.ir.DataType.FLOAT, self.ir.DataType.FLOAT16)
        return self.kernels is not None and x.dtype in floats and len(x.shape) == 4

    def _halves_repeat(self, table: Any) -> bool:
        """Return whether a table has two equal halves, of which ONNX's operator reads one."""
        for _ in range(12):
            node = table.producer()
            if node is None:
                return False
            if node.op_type == "Concat":
                axis = node.attributes["axis"].as_int()
                last = axis == -1 or (table.shape is not None and axis == len(table.shape) - 1)
                return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            if node.op_type not in _THROUGH:
                return False
            if node.op_type == "Mul":
                operands = [value for value in node.inputs if not is_scalar(value)]
                if len(operands) != 1:
                    return False
                table = operands[0]
                continue
            if node.op_type in ("Unsqueeze", "Reshape") and not _keeps_last(node):
                return False
            table = node.inputs[0]
        return False

    def _half_table(self, table: Any, x: Any) -> Any:
        """Return the first half of a (batch or 1, 1, length, size) table as (batch, length, size / 2)."""
        if len(x.shape) != 4 or table.shape is None or len(table.shape) != 4 or table.shape[1] != 1:
            return None

        def half() -> Any:
            op = self.op
            flat = op.Squeeze(table, self.integers(1))
            flat = op.Slice(flat, self.integers(0), self.integers(int(x.shape[-1]) // 2), self.integers(-1))
            if same_size(table.shape[0], x.shape[0]):
                return flat
            batch = op.Shape(x, start=0, end=1)
            return op.Expand(flat, op.Concat(batch, self.integers(1, 1), axis=0))

        return self.masks.once(("rotary", str(x.shape[0])), (table,), half)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
        sinks: Any = None,
        segments: Any = None,
        visible: Any = None,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Any:
        """``graphopt.attention``; masks are added, never boolean, and finite."""
        # versions of ONNX's specification apply softcap before or after the mask, and runtimes differ
        fused = self._can_fuse(q) and sinks is None and softcap is None
        alone = all(mask is None for mask in (key_mask, segments, bias, window, visible))
        own_causal = fused and causal and alone and same_size(q.shape[2], k.shape[2])
        mask = self.masks.additive(
            q, k, key_mask, segments, visible, causal=causal and not own_causal, window=window, dtype=q.dtype
        )
        if bias is not None:
            bias = self._four_dimensions(self.cast(bias, q.dtype))
            mask = bias if mask is None else self.op.Add(bias, mask)
        if fused:
            if mask is not None and not (causal or any(m is not None for m in (window, segments, visible))):
                mask = self.masks.for_every_query(mask, q)
            return self.fused.Attention(q, k, v, mask, scale=scale, is_causal=int(own_causal))[0]
        return self._plain_attention(q, k, v, mask, sinks, scale, softcap)

    def _four_dimensions(self, bias: Any) -> Any:
        # Attention does not broadcast a mask of fewer dimensions in the usual way
        missing = 4 - len(bias.shape)
        if missing == 0:
            return bias
        result = self.op.Unsqueeze(bias, self.integers(*range(missing)))
        result.dtype, result.shape = bias.dtype, self.ir.Shape([1] * missing + list(bias.shape))
        return result

    def _plain_attention(
        self, q: Any, k: Any, v: Any, mask: Any, sinks: Any, scale: float, softcap: float | None
    ) -> Any:
        op, kind = self.op, q.dtype
        heads, groups = int(q.shape[1]), int(k.shape[1])
        scaled = op.Mul(q, self.number(scale, q.dtype))
        if heads != groups:
            # queries of a group are put side by side, so that no key or value is copied
            scaled = op.Reshape(scaled, self.integers(0, groups, -1, int(q.shape[3])))
        scores = op.MatMul(scaled, op.Transpose(k, perm=[0, 1, 3, 2]))
        if heads != groups:
            scores = op.Reshape(scores, self.integers(0, heads, -1, 0))
        scores.dtype = kind
        if softcap is not None:
            cap = self.number(softcap, q.dtype)
            scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
        if mask is not None:
            scores = op.Add(scores, mask)
        scores.dtype = kind
        if sinks is None:
            weights = op.Softmax(scores, axis=-1)
        else:
            weights = self._softmax_with_sinks(scores, sinks)
        if heads != groups:
            weights = op.Reshape(weights, self.integers(0, groups, -1, 0))
        result = op.MatMul(weights, v)
        if heads != groups:
            result = op.Reshape(result, self.integers(0, heads, -1, int(v.shape[3])))
        return result

    def _softmax_with_sinks(self, scores: Any, sinks: Any) -> Any:
        op, kind = self.op, scores.dtype
        wide = self.ir.DataType.FLOAT if self.half(scores) else kind
        scores = self.cast(scores, wide)
        column = op.Reshape(self.cast(sinks, wide), self.integers(1, -1, 1, 1))
        top = op.Max(op.ReduceMax(scores, self.integers(-1), keepdims=1), column)
        powers = op.Exp(op.Sub(scores, top))
        total = op.Add(op.ReduceSum(powers, self.integers(-1), keepdims=1), op.Exp(op.Sub(column, top)))
        weights = op.Div(powers, total)
        weights.dtype = wide
        return self.cast(weights, kind)


def _keeps_last(node: Any) -> bool:
    """Return whether Unsqueeze or Reshape keeps the last dimension."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return before is not None and after is not None and same_size(before[-1], after[-1])
