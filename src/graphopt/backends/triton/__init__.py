"""Triton kernels for operators that passes introduce: on a GPU, in the interpreter, or compiled ahead of time."""

from __future__ import annotations

from .lower import KernelUse, TritonReport, as_json, lower_triton

__all__ = ["KernelUse", "TritonReport", "as_json", "lower_triton"]
