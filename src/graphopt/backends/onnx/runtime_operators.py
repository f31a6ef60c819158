"""Operators that ONNX Runtime has beside ONNX's own, as nodes of a program and as nodes of a file.

A program holds them only between :func:`graphopt.backends.onnx.kernels.use_kernels` and its export: they have shapes and no
values, since what they compute is compared in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .masks import Masks

DOMAIN = "com.microsoft"
NORM = "SimplifiedLayerNormalization"
"""Root-mean-square norm; ONNX Runtime registers it in ONNX's own domain, where the standard does not have it."""

_LIBRARY = torch.library.Library("graphopt_runtime", "DEF")  # type: ignore[no-untyped-call]


def _shape_rule(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator whose only implementation gives results of the right shapes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(schema.split("(", 1)[0], function, "Meta")  # type: ignore[no-untyped-call]
        return function

    return register


@_shape_rule(
    "group_query_attention(Tensor q, Tensor? k, Tensor? v, Tensor past_key, Tensor past_value, Tensor last, "
    "Tensor total, Tensor? cos=None, Tensor? sin=None, Tensor? bias=None, Tensor? sinks=None, *, int heads, "
    "int groups, float scale, int? window=None, float? softcap=None, bool interleaved=False) "
    "-> (Tensor, Tensor, Tensor)"
)
def _group_query_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of new tokens that stores their keys and values first, in caches that may be updated in place.

    ``q`` (batch, tokens, heads · size); ``k`` and ``v`` (batch, tokens, groups · size), or None where ``q`` holds all;
    caches (batch, groups, capacity, size); ``last`` (batch), int32, the position of each row's last token; ``total``
    (), int32, the largest of them plus one; ``cos`` and ``sin`` (positions, half of the rotated size); ``bias`` (batch
    or 1, heads or 1, tokens, capacity); ``sinks`` (heads). Returns what attention gives, (batch, tokens, heads · size),
    and both caches.
    """
    width = options["heads"] * past_key.shape[-1]
    return (
        q.new_empty((*q.shape[:-1], width)),
        past_key.new_empty(past_key.shape),
        past_value.new_empty(past_value.shape),
    )


@_shape_rule("skip_rms_norm(Tensor x, Tensor skip, Tensor weight, float eps) -> (Tensor, Tensor)")
def _skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + skip``, and the sum."""
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_shape_rule(
    "matmul_nbits(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, *, int bits, int block, "
    "int columns, int level) -> Tensor"
)
def _matmul_nbits(x: Tensor, words: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Multiply ``x`` (..., columns) with a matrix of few bits: (..., rows)."""
    return x.new_empty((*x.shape[:-1], words.shape[0]))


@_shape_rule(
    "gather_blocks(Tensor words, Tensor indices, Tensor scales, Tensor? zeros, *, int bits, int block, int columns) "
    "-> Tensor"
)
def _gather_blocks(
    words: Tensor, indices: Tensor, scales: Tensor, *rest: Any, columns: int, **options: Any
) -> Tensor:
    """Return rows of a matrix of few bits: (..., columns)."""
    return scales.new_empty((*indices.shape, columns))


class RuntimeWriter:
    """Writes the nodes while the exporter records them."""

    def __init__(self, shared: Masks) -> None:
        self._shared = shared
        kernels = (
            "query key? value? past_key? past_value? seqlens_k total_sequence_length cos_cache? sin_cache? "
        )
        kernels += "position_ids? attention_bias? head_sink?"
        self._attention = _operator(
            "GroupQueryAttention",
            kernels,
            "output present_key present_value",
            "num_heads kv_num_heads scale:float local_window_size softcap:float do_rotary rotary_interleaved",
        )
        self._skip_norm = _operator(
            "SkipSimplifiedLayerNormalization",
            "input skip gamma",
            "output mean inv_std_var input_skip_bias_sum",
            "epsilon:float",
        )
        self._norm = _operator(NORM, "X scale", "Y", "epsilon:float axis stash_type", domain="")
        self._rotary = _operator(
            "RotaryEmbedding", "input position_ids cos_cache sin_cache", "output", "interleaved"
        )

        few = "words scales zeros?"
        self._product = _operator(
            "MatMulNBits", f"A {few} g_idx? bias?", "Y", "K N bits block_size accuracy_level"
        )
        self._lookup = _operator(
            "GatherBlockQuantized",
            "words indices scales zeros?",
            "output",
            "bits block_size gather_axis quantize_axis",
        )

    def matmul_nbits(
        self,
        x: Any,
        words: Any,
        scales: Any,
        zeros: Any,
        bias: Any,
        *,
        bits: int,
        block: int,
        columns: int,
        level: int,
    ) -> Any:
        """``graphopt_runtime.matmul_nbits``."""
        inputs = [x, words, scales, zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self._product(
            *inputs, K=columns, N=int(words.shape[0]), bits=bits, block_size=block, accuracy_level=level
        )

    def gather_blocks(
        self, words: Any, indices: Any, scales: Any, zeros: Any, *, bits: int, block: int, columns: int
    ) -> Any:
        """``graphopt_runtime.gather_blocks``."""
        # the product reads the same words in three dimensions
        flat = self._shared.op.Reshape(words, self._shared.integers(0, -1))
        inputs = [flat, indices, scales] + ([] if zeros is None else [zeros])
        return self._lookup(*inputs, bits=bits, block_size=block, gather_axis=0, quantize_axis=1)

    def group_query_attention(
        self, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, last: Any, total: Any, cos: Any = None,
        sin: Any = None, bias: Any = None, sinks: Any = None, *, heads: int, groups: int, scale: float,
        window: int | None = None, softcap: float | None = None, interleaved: bool = False,
    ) -> Any:  # fmt: skip
        """``graphopt_runtime.group_query_attention``."""
        options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups, "scale": scale}
        if window is not None:
            options["local_window_size"] = window
        if softcap is not None:
            options["softcap"] = softcap
        if cos is not None:
            options |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
        if bias is not None:
            bias = self._shared.once(("bias",), (bias, total), lambda: self._up_to(bias, total))
        inputs = [q, k, v, past_key, past_value, last, total, cos, sin, None, bias, sinks]
        while inputs[-1] is None:
            inputs.pop()
        return self._attention(*inputs, **options)

    def _up_to(self, bias: Any, total: Any) -> Any:
        """Return the part of a bias, which has all slots, for those that the kernel reads."""
        shared = self._shared
        end = shared.op.Reshape(shared.op.Cast(total, to=shared.ir.DataType.INT64), shared.integers(1))
        return shared.op.Slice(bias, shared.integers(0), end, shared.integers(3))

    def skip_rms_norm(self, x: Any, skip: Any, weight: Any, eps: float) -> Any:
        """``graphopt_runtime.skip_rms_norm``."""
        normed, _, _, total = self._skip_norm(x, skip, weight, epsilon=eps)
        return normed, total

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """Return the norm of ``x`` over its last dimension, times ``weight`` of the same type."""
        return self._norm(x, weight, axis=-1, epsilon=eps, stash_type=1)

    def rotary(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotate ``x`` (batch, heads, tokens, size) by angles (batch, tokens, size / 2) of channels i and i + size / 2."""
        shared = self._shared
        op, half = shared.op, int(x.shape[-1]) // 2

        def flat(table: Any) -> Any:
            return shared.once(("angles",), (table,), lambda: op.Reshape(table, shared.integers(-1, half)))

        def rows() -> Any:
            # the kernel looks angles up by position; these are computed for each token, so each has a row of its own
            shape = op.Shape(cos, start=0, end=2)
            zero, one = (shared.number(n, shared.ir.DataType.INT64) for n in (0, 1))
            count = op.ReduceProd(shape, keepdims=0)
            return op.Reshape(op.Range(zero, count, one), shape)

        return self._rotary(x, shared.once(("rows of angles",), (cos,), rows), flat(cos), flat(sin))


def translations(writer: RuntimeWriter) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of each operator of this file."""
    operators = torch.ops.graphopt_runtime
    return {
        operators.group_query_attention.default: writer.group_query_attention,
        operators.skip_rms_norm.default: writer.skip_rms_norm,
        operators.matmul_nbits.default: writer.matmul_nbits,
        operators.gather_blocks.default: writer.gather_blocks,
    }


def _operator(name: str, inputs: str, outputs: str, attributes: str, domain: str = DOMAIN) -> Any:
    """Return an operator that the exporter's tracer can record, of a schema that says no more than names.

    Args:
        name: of the operator.
        inputs: names; a question mark follows those that may be left out.
        outputs: names.
        attributes: names of integers, and of numbers with ``:float``.
        domain: where it is registered.
    """
    import onnx
    from onnxscript import values

    kinds = [
        "tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)", "tensor(int32)", "tensor(int64)",
        "tensor(uint8)",
    ]  # fmt: skip
    option = onnx.defs.OpSchema.FormalParameterOption
    names = [n.rstrip("?") for n in (*inputs.split(), *outputs.split())]
    count = len(inputs.split())
    parameters = [
        onnx.defs.OpSchema.FormalParameter(
            n.rstrip("?"), f"T{i}", param_option=option.Optional if n.endswith("?") else option.Single
        )
        for i, n in enumerate((*inputs.split(), *outputs.split()))
    ]
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=parameters[:count],
        outputs=parameters[count:],
        type_constraints=[(f"T{i}", kinds, "") for i in range(len(names))],
        attributes=[
            onnx.defs.OpSchema.Attribute(
                n.removesuffix(":float"),
                onnx.defs.OpSchema.AttrType.FLOAT
                if n.endswith(":float")
                else onnx.defs.OpSchema.AttrType.INT,
                "",
                required=False,
            )
            for n in attributes.split()
        ],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


def drop_unused_outputs(model: Any) -> None:
    """Leave out results that nothing reads, which a kernel would compute for their names' sake."""
    for node in model.graph:
        if node.domain == DOMAIN:
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""
