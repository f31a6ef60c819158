"""The dialect: few, meaningful operators under ``torch.ops.graphopt``.

Each is defined by a reference in plain PyTorch, registered as a composite, so that autograd,
``torch.compile``, ``run_decompositions`` and the ONNX exporter see through it to ATen.
"""

from __future__ import annotations

from .attention import attention
from .library import DIALECT, dialect_operator
from .norm import rms_norm
from .rotary import rotary
from .routed_ffn import routed_ffn

__all__ = ["DIALECT", "attention", "dialect_operator", "rms_norm", "rotary", "routed_ffn"]
