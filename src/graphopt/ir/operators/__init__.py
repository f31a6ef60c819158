"""The dialect: few, meaningful operators under ``torch.ops.graphopt``.

Each is defined by a reference in plain PyTorch, registered as a composite, so that autograd,
``torch.compile``, ``run_decompositions`` and the ONNX exporter see through it to ATen.
"""

from __future__ import annotations

from .attention import attention
from .collectives import all_gather, all_reduce, local_embedding, local_slice, reduce_scatter, unreduced
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
from .quantized import quantized_all_reduce, quantized_sum
from .rotary import rotary
from .routed_ffn import routed_ffn
from .routing import active_experts, active_weights

__all__ = [
    "DIALECT",
    "active_experts",
    "active_weights",
    "all_gather",
    "all_reduce",
    "attention",
    "bias_sequence",
    "dialect_operator",
    "kernel_diagonal",
    "kernel_scaled",
    "kernel_sequence",
    "kernel_spread",
    "local_embedding",
    "local_slice",
    "norm_scale",
    "norm_shift",
    "quantized_all_reduce",
    "quantized_sum",
    "reduce_scatter",
    "rms_norm",
    "rotary",
    "routed_ffn",
    "unreduced",
]
