"""Helpers that every translation to ONNX needs."""

from __future__ import annotations

from typing import Any


class Nodes:
    """Writes nodes while the exporter records them.

    Values made by the exporter have a type and sizes; those in between have only what is set on them here.
    """

    def __init__(self) -> None:
        import onnx_ir
        from onnxscript import opset18

        self.ir = onnx_ir
        # the exporter writes opset 18 and converts, and does not inline functions of another opset
        self.op: Any = opset18

    def number(self, value: float, dtype: Any) -> Any:
        """Return a scalar constant."""
        return self.op.Constant(value=self.ir.tensor(value, dtype=dtype))

    def integers(self, *values: int) -> Any:
        """Return a constant vector of int64."""
        return self.op.Constant(value=self.ir.tensor(list(values), dtype=self.ir.DataType.INT64))

    def cast(self, value: Any, dtype: Any) -> Any:
        """Return the value cast to another type."""
        if value.dtype == dtype:
            return value
        result = self.op.Cast(value, to=dtype)
        result.dtype, result.shape = dtype, value.shape
        return result

    def half(self, value: Any) -> bool:
        """Tell whether a value has a type of 16 bits."""
        return value.dtype in (self.ir.DataType.FLOAT16, self.ir.DataType.BFLOAT16)

    def common(self, first: Any, second: Any) -> Any:
        """Return the common type in which two floating-point values are computed."""
        if first.dtype == second.dtype:
            return first.dtype
        double = self.ir.DataType.DOUBLE
        return double if double in (first.dtype, second.dtype) else self.ir.DataType.FLOAT


def same_size(first: Any, second: Any) -> bool:
    """Return whether two dimensions are known to be equal for all inputs."""
    if isinstance(first, int) or isinstance(second, int):
        return bool(first == second)
    return first.value is not None and bool(first.value == second.value)


def is_scalar(value: Any) -> bool:
    """Tell whether a value is known to have one element."""
    return value.shape is not None and all(size == 1 for size in value.shape)
