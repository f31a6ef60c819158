"""Formulas of ATen operators that fuse several steps: norms, softmax, attention."""

from __future__ import annotations

from ..operators.traits import Trait, named
from ..operators.work import NORM_FLOPS, SOFTMAX_FLOPS, Call, Work, attention_work, half, minimum, moved
from .registry import formula


@formula(*named(Trait.NORM), "aten.native_layer_norm", "aten._native_batch_norm_legit_no_training")
def norm(call: Call) -> Work:
    """FLOPs: 7 per element."""
    return moved(call, NORM_FLOPS * call.output.numel)


@formula(*named(Trait.SOFTMAX))
def softmax(call: Call) -> Work:
    """FLOPs: 5 per element."""
    return moved(call, SOFTMAX_FLOPS * call.output.numel)


@formula("aten.scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call) -> Work:
    """As attention; causal queries are aligned with the first keys, as torch defines it."""
    queries, keys = call.tensor("query").shape[-2], call.tensor("key").shape[-2]
    causal = bool(call.arguments.get("is_causal"))
    pairs = queries * keys
    if causal:
        seen = minimum(queries, keys)
        pairs = half(seen * (seen + 1)) + (queries - seen) * keys
    return attention_work(call, "query", "key", "value", pairs, keys)
