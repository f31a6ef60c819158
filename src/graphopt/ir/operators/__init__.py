"""graphopt's operator set: a few high-level composite operators under ``torch.ops.graphopt``.

Each is defined by a reference in plain PyTorch, registered as a composite, so that autograd,
``torch.compile``, ``run_decompositions`` and the ONNX exporter see through it to ATen.
"""

from __future__ import annotations

from .attention import attention
from .cache import cache_positions, cache_store, cache_visible
from .cache_codes import cache_codes, cache_load, cache_low, cache_scale
from .causal_conv import causal_conv1d, causal_conv1d_state
from .collectives import all_gather, all_reduce, local_embedding, local_slice, reduce_scatter, unreduced
from .fused import add_rms_norm, gated_product, linear_top_k
from .kernels import (
    bias_sequence,
    kernel_diagonal,
    kernel_scaled,
    kernel_sequence,
    kernel_spread,
    norm_scale,
    norm_shift,
)
from .library import COMPOSITES, KERNELS, composite_operator
from .linear_attention import linear_attention, linear_attention_state
from .mask_tokens import gated_lora, marked_embedding
from .nested_ffn import nested_ffn, nested_similarity, soft_nested_ffn
from .norm import rms_norm
from .quantize import additive_mask, fake_quantize, fake_quantize_channels
from .quantized import quantized_all_reduce, quantized_sum
from .rotary import rotary
from .routed_ffn import routed_ffn
from .routing import active_experts, active_weights, choose_width, skipped, softened_weights

__all__ = [
    "COMPOSITES",
    "KERNELS",
    "active_experts",
    "active_weights",
    "add_rms_norm",
    "additive_mask",
    "all_gather",
    "all_reduce",
    "attention",
    "bias_sequence",
    "cache_codes",
    "cache_load",
    "cache_low",
    "cache_positions",
    "cache_scale",
    "cache_store",
    "cache_visible",
    "causal_conv1d",
    "causal_conv1d_state",
    "choose_width",
    "composite_operator",
    "fake_quantize",
    "fake_quantize_channels",
    "gated_lora",
    "gated_product",
    "kernel_diagonal",
    "kernel_scaled",
    "kernel_sequence",
    "kernel_spread",
    "linear_attention",
    "linear_attention_state",
    "linear_top_k",
    "local_embedding",
    "local_slice",
    "marked_embedding",
    "nested_ffn",
    "nested_similarity",
    "norm_scale",
    "norm_shift",
    "quantized_all_reduce",
    "quantized_sum",
    "reduce_scatter",
    "rms_norm",
    "rotary",
    "routed_ffn",
    "skipped",
    "soft_nested_ffn",
    "softened_weights",
    "unreduced",
]
