"""The dialect: few, meaningful operators under ``torch.ops.graphopt``.

Each is defined by a reference in plain PyTorch, registered as a composite, so that autograd,
``torch.compile``, ``run_decompositions`` and the ONNX exporter see through it to ATen.
"""

from __future__ import annotations

from .attention import attention
from .kernels import (
    bias_sequence,
    kernel_diagonal,
    kernel_scaled,
    kernel_sequence,
    kernel_spread,
    norm_scale,
    norm_shift,
)
from .library import DIALECT, dialect_operator
from .norm import rms_norm
from .rotary import rotary
from .routed_ffn import routed_ffn

__all__ = [
    "DIALECT",
    "attention",
    "bias_sequence",
    "dialect_operator",
    "kernel_diagonal",
    "kernel_scaled",
    "kernel_sequence",
    "kernel_spread",
    "norm_scale",
    "norm_shift",
    "rms_norm",
    "rotary",
    "routed_ffn",
]
