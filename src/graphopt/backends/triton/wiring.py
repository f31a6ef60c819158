"""The table of operators and their kernels, and how programs use it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import UsageError
from ...ir.operators import KERNELS, fused, gated_lora, nested_ffn, quantized, rms_norm, routed_ffn
from ...ir.operators import attention as attention_reference
from ...ir.operators import causal_conv1d as conv_reference
from ...ir.operators import linear_attention as linear_reference
from ...ir.operators import linear_attention_state as state_reference
from .kernels import (
    causal_conv,
    feed_forward,
    gated,
    linear_attention,
    linear_top_k,
    norm,
    packing,
    tree_attention,
)
from .kernels import gated_lora as lora


@dataclass(frozen=True)
class Kernel:
    """A kernel for one operator.

    Attributes:
        launch: computes the operator with the kernel.
        reference: the operator in plain PyTorch.
        takes: whether the kernel supports these arguments.
    """

    launch: Callable[..., Any]
    reference: Callable[..., Any]
    takes: Callable[..., bool]


def _takes_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None,
    sinks: Tensor | None = None, segments: Tensor | None = None, visible: Tensor | None = None, *, scale: float,
    causal: bool = False, window: int | None = None, softcap: float | None = None,
) -> bool:  # fmt: skip
    return tree_attention.takes(q, k, v, bias, segments, visible, causal, window)


def _takes_nested(
    x: Tensor, choice: Tensor, widths: list[int], up: Tensor, down: Tensor, gate: Tensor | None = None,
    *biases: Tensor | None, **options: Any,
) -> bool:  # fmt: skip
    return feed_forward.takes(x, up, down, gate)


def _takes_routed(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *biases: Tensor | None,
    **options: Any,
) -> bool:
    return feed_forward.takes(x, up, down)


def _takes_packing(bits: int) -> bool:
    return 2 <= bits <= 8


def _takes_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, float32: bool = True, weight_before_cast: bool = False
) -> bool:
    return norm.takes(x, weight, float32)


def _takes_added_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, float32: bool = True,
    weight_before_cast: bool = False,
) -> bool:  # fmt: skip
    same = x.shape == residual.shape and x.dtype == residual.dtype
    return same and norm.takes(x, weight, float32)


def _takes_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> bool:  # fmt: skip
    return causal_conv.takes(x, weight, step_mask)


def _takes_linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None, state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> bool:  # fmt: skip
    return linear_attention.takes(k, v, step_mask, q, g, beta, state)


def _takes_state(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, taken: Tensor, step_mask: Tensor | None = None
) -> bool:  # fmt: skip
    return linear_attention.takes(k, v, step_mask, g, beta, state)


# references that consult the table themselves are unwrapped to avoid infinite recursion
TABLE = {
    "add_rms_norm": Kernel(norm.add_rms_norm, fused.add_rms_norm, _takes_added_norm),
    "attention": Kernel(tree_attention.attention, attention_reference, _takes_attention),
    "causal_conv1d": Kernel(causal_conv.causal_conv1d, conv_reference, _takes_convolution),
    "gated_lora": Kernel(
        lora.gated_lora, gated_lora, lambda y, x, down, up, marks, scale: lora.takes(y, x, down, up)
    ),
    "gated_product": Kernel(gated.gated_product, fused.gated_product, lambda gate, up, **_: gated.takes(gate, up)),
    "linear_attention": Kernel(linear_attention.linear_attention, linear_reference, _takes_linear),
    "linear_attention_state": Kernel(linear_attention.linear_attention_state, state_reference, _takes_state),
    "linear_top_k": Kernel(linear_top_k.linear_top_k, fused.linear_top_k, linear_top_k.takes),
    "nested_ffn": Kernel(feed_forward.nested_ffn, nested_ffn, _takes_nested),
    "quantize_pack": Kernel(
        packing.quantize_pack, inspect.unwrap(quantized.quantize_pack),
        lambda x, columns, scale, kept, bits, block, width: _takes_packing(bits),
    ),
    "rms_norm": Kernel(norm.rms_norm, rms_norm, _takes_norm),
    "routed_ffn": Kernel(feed_forward.routed_ffn, routed_ffn, _takes_routed),
    "unpack_sum": Kernel(
        packing.unpack_sum, inspect.unwrap(quantized.unpack_sum),
        lambda payload, columns, scales, count, kept, bits, block: _takes_packing(bits),
    ),
}  # fmt: skip
"""Kernels by operator."""

_operators: dict[str, Any] = {}


def operator(name: str) -> Any:
    """Return the operator ``graphopt_triton::name``, which runs the kernel on a GPU and the reference elsewhere.

    The operator branches on the device instead of having an implementation per device, so that torch.compile and
    AOTInductor trace it on CPUs and GPUs alike.
    """
    if name not in _operators:
        _register(name)
    return _operators[name]


def _register(name: str) -> None:
    kernel = TABLE[name]

    def body(*args: Any, **kwargs: Any) -> Any:
        on_gpu = any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args)
        return (kernel.launch if on_gpu else kernel.reference)(*args, **kwargs)

    body.__signature__ = _signature(kernel.reference)  # type: ignore[attr-defined]
    _operators[name] = torch.library.triton_op(f"graphopt_triton::{name}", body, mutates_args=())


def _signature(reference: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature with resolved annotations, from which torch makes a schema."""
    hints = typing.get_type_hints(reference)
    signature = inspect.signature(reference)
    typed = [p.replace(annotation=hints[n]) for n, p in signature.parameters.items()]
    return signature.replace(parameters=typed, return_annotation=hints["return"])


def _hook(name: str, everywhere: bool, reached: set[str] | None) -> Callable[..., Any]:
    kernel = TABLE[name]

    def either(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not everywhere and not any(t.device.type == "cuda" for t in tensors):
            return None
        # kernels have no gradients
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None
        if not kernel.takes(*args, **kwargs):
            return None
        if reached is not None:
            reached.add(name)
        return operator(name)(*args, **kwargs)

    return either


@contextmanager
def kernels_in_use(
    names: Iterable[str] | None = None, everywhere: bool = False, reached: set[str] | None = None
) -> Iterator[None]:
    """Make operators on a GPU run these kernels, by default all of them, while the context is open.

    Args:
        names: operators, see ``TABLE``.
        everywhere: use the kernels' operators on any device; without a GPU they run their references.
        reached: receives the names of the operators that were called.

    Raises:
        UsageError: there is no such kernel.
    """
    selected = list(TABLE) if names is None else list(names)
    for name in selected:
        if name not in TABLE:
            raise UsageError(f"there is no kernel for {name!r}", hint=", ".join(sorted(TABLE)))
    for name in selected:
        # now, not while torch.compile is tracing
        if name not in _operators:
            _register(name)
    before = dict(KERNELS)
    KERNELS.update({name: _hook(name, everywhere, reached) for name in selected})
    try:
        yield
    finally:
        KERNELS.clear()
        KERNELS.update(before)
