"""Formulas of operators that stand for a whole part: attention, mixtures of experts, norms, rotation."""

from __future__ import annotations

from .operands import Call, Size, Work, half, maximum, minimum, moved, product
from .registry import formula

NORM_FLOPS = 7
"""Operations per element of a norm (LLM-Viewer)."""

SOFTMAX_FLOPS = 5
"""Operations per score of a softmax (LLM-Viewer)."""

ACTIVATION_FLOPS = 4
"""Operations per element of SiLU, GELU and the like: negate, exponential, add, divide."""


@formula(
    "graphopt.rms_norm", "aten.rms_norm", "aten.layer_norm", "aten.native_layer_norm", "aten.group_norm",
    "aten.batch_norm", "aten.instance_norm", "aten._native_batch_norm_legit_no_training",
)  # fmt: skip
def norm(call: Call) -> Work:
    """FLOPs: 7 per element."""
    return moved(call, NORM_FLOPS * call.output.numel)


@formula("graphopt.add_rms_norm")
def add_rms_norm(call: Call) -> Work:
    """FLOPs: 8 per element. Bytes: two values read and two written."""
    x = call.tensor("x")
    work = moved(call, (NORM_FLOPS + 1) * x.numel)
    return Work(work.flops, work.weight_bytes, 4 * x.bytes)


@formula("graphopt.gated_product")
def gated_product(call: Call) -> Work:
    """FLOPs: 5 per element."""
    return moved(call, (ACTIVATION_FLOPS + 1) * call.output.numel)


@formula("graphopt.linear_top_k")
def linear_top_k(call: Call) -> Work:
    """FLOPs: 2 · rows · size · vocabulary. Bytes: operands and the k entries found, not the logits."""
    x, weight = call.tensor("x"), call.tensor("weight")
    rows = product(x.shape[:-1])
    work = moved(call, rows * (2 * x.shape[-1] + 1) * weight.shape[0])
    return Work(work.flops, work.weight_bytes, x.bytes + rows * call.arguments["k"] * (x.dtype.itemsize + 8))


@formula("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(call: Call) -> Work:
    """FLOPs: 5 per element."""
    return moved(call, SOFTMAX_FLOPS * call.output.numel)


@formula("graphopt.rotary")
def rotary(call: Call) -> Work:
    """FLOPs: 3 per element, two multiplications and an addition."""
    return moved(call, 3 * call.output.numel)


def _ramp(rows: Size, window: int | None) -> Size:
    """Return the sum of ``min(row, window)`` over rows 1, 2, ..."""
    if window is None:
        return half(rows * (rows + 1))
    full = minimum(rows, window)
    return half(full * (full + 1)) + (rows - full) * window


def visible_pairs(queries: Size, keys: Size, causal: bool, window: int | None) -> Size:
    """Return how many (query, key) pairs take part in attention, per head and sequence.

    Queries are aligned with the last keys: causal over n positions, n (n + 1) / 2 pairs. ``window`` counts
    positions seen, the own one included, to both sides when not causal. Masks and segments are values, not
    sizes: what they hide is counted.
    """
    if not causal and window is None:
        return queries * keys
    seeing = minimum(queries, keys)
    left = _ramp(keys, window) - _ramp(maximum(keys - queries, 0), window)
    return left if causal else left + _ramp(seeing, window) - seeing


def _attention(call: Call, q: str, k: str, v: str, pairs: Size, keys: Size) -> Work:
    query, key, value = call.tensor(q), call.tensor(k), call.tensor(v)
    rows = product(query.shape[:-2]) * pairs
    flops = rows * (2 * query.shape[-1] + 2 * value.shape[-1] + SOFTMAX_FLOPS)
    if keys == key.shape[-2]:
        return moved(call, flops)
    read = {n: product(t.shape[:-2]) * keys * t.shape[-1] for n, t in ((k, key), (v, value))}
    return moved(call, flops, read)


@formula("graphopt.attention")
def attention(call: Call) -> Work:
    """FLOPs: visible pairs · heads · batch · (2 · head size + 2 · value size + 5 for the softmax).

    Bytes are those of a fused kernel: no score leaves the chip, keys and values are read once at their own
    number of heads, and only those that some query's window reaches.
    """
    window = call.arguments.get("window")
    queries, keys = call.tensor("q").shape[-2], call.tensor("k").shape[-2]
    pairs = visible_pairs(queries, keys, bool(call.arguments.get("causal")), window)
    reached = keys if window is None or queries == keys else minimum(keys, queries + (window - 1))
    return _attention(call, "q", "k", "v", pairs, reached)


@formula("graphopt.cache_store")
def cache_store(call: Call) -> Work:
    """Bytes: the new tokens' values, read and written in place; no arithmetic."""
    values = call.tensor("values")
    return Work(0, 0, 2 * product(values.shape) * values.dtype.itemsize)


@formula("graphopt.cache_visible")
def cache_visible(call: Call) -> Work:
    """Two comparisons for each token and slot; bytes of the result."""
    pairs = product(call.tensor("positions").shape) * call.tensor("cache").shape[2]
    return Work(2 * pairs, 0, pairs)


@formula("graphopt.gated_lora")
def gated_lora(call: Call) -> Work:
    """FLOPs: 2 · rank · (in + out) a token, and two for each element of the result; at all places, marked or not."""
    rank, inner = call.tensor("down").shape
    rows = product(call.tensor("x").shape[:-1])
    return moved(call, rows * 2 * rank * (inner + call.output.shape[-1]) + 2 * call.output.numel)


@formula("aten.scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call) -> Work:
    """As attention; causal queries are aligned with the first keys, as torch defines it."""
    queries, keys = call.tensor("query").shape[-2], call.tensor("key").shape[-2]
    causal = bool(call.arguments.get("is_causal"))
    pairs = queries * keys
    if causal:
        seen = minimum(queries, keys)
        pairs = half(seen * (seen + 1)) + (queries - seen) * keys
    return _attention(call, "query", "key", "value", pairs, keys)


@formula("graphopt.routed_ffn")
def routed_ffn(call: Call) -> Work:
    """FLOPs: tokens · k · (2 · elements of one expert's matrices + its activation + 2 · size to combine).

    Bytes: weights of min(tokens · k, experts) experts, the operands, the result, and the hidden values
    written and read once between the two products.
    """
    x, up, down = call.tensor("x"), call.tensor("up"), call.tensor("down")
    tokens, chosen = call.tensor("experts").shape
    rows = tokens * chosen
    experts = up.shape[0]
    inner = down.shape[1] if call.arguments.get("transposed") else down.shape[2]
    each = ACTIVATION_FLOPS + (1 if call.arguments.get("gated") else 0)
    matrices = product(up.shape[1:]) + product(down.shape[1:])
    flops = rows * (2 * matrices + each * inner + 2 * x.shape[-1])
    touched = minimum(rows, experts)
    stacked = ("up", "down", "up_bias", "down_bias")
    given = [name for name in stacked if call.arguments.get(name) is not None]
    work = moved(call, flops, {name: touched * product(call.tensor(name).shape[1:]) for name in given})
    hidden = 2 * rows * inner * x.dtype.itemsize
    return Work(work.flops, work.weight_bytes, work.activation_bytes + hidden)


@formula("graphopt.nested_ffn")
def nested_ffn(call: Call) -> Work:
    """FLOPs of the largest width, as any token may need it: tokens · (2 · elements of the matrices + activation).

    What tokens really use is measured: see :func:`graphopt.sweep`. Bytes as of a mixture: hidden values are written
    and read once between the two products.
    """
    return _nested(call, max(call.arguments["widths"]))


@formula("graphopt.soft_nested_ffn")
def soft_nested_ffn(call: Call) -> Work:
    """As nested_ffn at its largest width, and a factor for each channel."""
    return _nested(call, max(call.arguments["widths"]))


@formula("graphopt.nested_similarity")
def nested_similarity(call: Call) -> Work:
    """As nested_ffn at its largest width, and a product of outputs for each width."""
    return _nested(call, max(call.arguments["widths"]))


def _nested(call: Call, width: int) -> Work:
    x, up = call.tensor("x"), call.tensor("up")
    tokens = product(x.shape[:-1])
    matrices = [name for name in ("up", "gate", "down") if call.arguments.get(name) is not None]
    each = ACTIVATION_FLOPS + len(matrices) - 2
    flops = tokens * width * (2 * len(matrices) * x.shape[-1] + each)
    work = moved(call, flops, dict.fromkeys(matrices, width * x.shape[-1]) if width < up.shape[0] else {})
    return Work(work.flops, work.weight_bytes, work.activation_bytes + 2 * tokens * width * x.dtype.itemsize)
