"""Small steps that every translation into ONNX needs."""

from __future__ import annotations

from typing import Any


class Nodes:
    """Writes nodes while the exporter records them.

    Values that the exporter made know their type and sizes; those in between know what is set on them here.
    """

    def __init__(self) -> None:
        import onnx_ir
        from onnxscript import opset18

        self.ir = onnx_ir
        # the exporter writes at 18 and converts, and inlines nothing written at another
        self.op: Any = opset18

    def number(self, value: float, dtype: Any) -> Any:
        """Return a scalar constant."""
        return self.op.Constant(value=self.ir.tensor(value, dtype=dtype))

    def integers(self, *values: int) -> Any:
        """Return a constant vector of int64."""
        return self.op.Constant(value=self.ir.tensor(list(values), dtype=self.ir.DataType.INT64))

    def cast(self, value: Any, dtype: Any) -> Any:
        """Return the value in another type."""
        if value.dtype == dtype:
            return value
        result = self.op.Cast(value, to=dtype)
        result.dtype, result.shape = dtype, value.shape
        return result

    def half(self, value: Any) -> bool:
        """Tell whether a value has a type of 16 bits."""
        return value.dtype in (self.ir.DataType.FLOAT16, self.ir.DataType.BFLOAT16)

    def common(self, first: Any, second: Any) -> Any:
        """Return the type that two floating values are computed in together."""
        if first.dtype == second.dtype:
            return first.dtype
        double = self.ir.DataType.DOUBLE
        return double if double in (first.dtype, second.dtype) else self.ir.DataType.FLOAT


def same_size(first: Any, second: Any) -> bool:
    """Tell whether two dimensions are equal for all inputs, as far as is known."""
    if isinstance(first, int) or isinstance(second, int):
        return bool(first == second)
    return first.value is not None and bool(first.value == second.value)


def is_scalar(value: Any) -> bool:
    """Tell whether a value is known to have one element."""
    return value.shape is not None and all(size == 1 for size in value.shape)
