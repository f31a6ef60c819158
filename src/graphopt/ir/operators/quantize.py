"""Simulated quantisation, and attention masks as numbers that can be quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import visible_keys
from .library import composite_operator
from .spec import OperatorSpec, Trait, like_first

INTEGERS = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "int4": (-8, 7),
}
"""Least and largest number of each type."""
HIDDEN = -30000.0
"""A value that hides a key whatever its score, and is representable in sixteen bits."""


@composite_operator(
    "fake_quantize(Tensor x, float scale, int zero_point, *, str dtype) -> Tensor",
    spec=OperatorSpec(shape=like_first, traits=Trait.ROUNDING),
)
def fake_quantize(x: Tensor, scale: float, zero_point: int, *, dtype: str) -> Tensor:
    """Return ``(clamp(round(x / scale) + zero_point) - zero_point) * scale``: x quantised and dequantised.

    Args:
        x: of any shape.
        scale: the value of one step.
        zero_point: the integer that stands for 0.
        dtype: of the integers, see ``INTEGERS``.
    """
    low, high = INTEGERS[dtype]
    wide = x if x.dtype == torch.float64 else x.float()
    steps = wide / scale
    if type(x) is Tensor and not torch.is_grad_enabled():
        # in place, to save memory: logits of a large vocabulary are larger than most weights
        return steps.round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale).to(x.dtype)
    return (steps.round() + zero_point).clamp(low, high).sub(zero_point).mul(scale).to(x.dtype)


@composite_operator(
    "fake_quantize_channels(Tensor x, Tensor scale, Tensor? integers=None, *, int axis, str dtype) -> Tensor",
    spec=OperatorSpec(shape=like_first, traits=Trait.ROUNDING),
)
def fake_quantize_channels(
    x: Tensor, scale: Tensor, integers: Tensor | None = None, *, axis: int, dtype: str
) -> Tensor:
    """Return x quantised and dequantised symmetrically, with a scale for each entry of a dimension; 0 stays 0.

    Args:
        x: of any shape.
        scale: (entries of the dimension,); or, for a matrix whose axis is 0, (rows, blocks): the columns are divided into
            this many blocks, each with its own scales.
        integers: of x's shape, stored instead of the nearest integers where calibration chose others; x is then the
            value that was quantised.
        axis: the dimension.
        dtype: of the integers.
    """
    high = INTEGERS[dtype][1]
    wide = x if x.dtype == torch.float64 else x.float()
    if scale.dim() == 2:
        step = scale.to(wide.dtype).repeat_interleave(x.shape[1] // scale.shape[1], 1)
    else:
        step = scale.to(wide.dtype).reshape([-1 if d == axis else 1 for d in range(x.dim())])
    whole = (wide / step).round().clamp(-high, high) if integers is None else integers.to(wide.dtype)
    return whole.mul(step).to(x.dtype)


@composite_operator(
    "additive_mask(Tensor? key_mask, Tensor? segments, Tensor? visible, SymInt queries, SymInt keys, *, bool causal=False, "
    "int? window=None, float hidden=-30000.) -> Tensor"
)
def additive_mask(
    key_mask: Tensor | None, segments: Tensor | None, visible: Tensor | None, queries: int, keys: int, *,
    causal: bool = False, window: int | None = None, hidden: float = HIDDEN,
) -> Tensor:  # fmt: skip
    """Return attention's masks as numbers to add to scores: 0 where a key is seen, ``hidden`` elsewhere.

    Args:
        key_mask: (batch, keys), true where a key may be seen.
        segments: (batch, keys), integers; a query sees keys of its own segment.
        visible: (batch, 1, queries, keys), true where a key may be seen.
        queries: how many.
        keys: how many.
        causal: a query sees no later position.
        window: number of positions seen.
        hidden: low enough that the softmax is zero, but no lower, since a quantised range has to hold it.

    Returns:
        (batch or 1, 1, queries, keys), float32.
    """
    masks = [t for t in (key_mask, segments, visible) if t is not None]
    device = masks[0].device if masks else torch.device("cpu")
    seen = visible_keys(queries, keys, key_mask, segments, causal, window, device)
    if visible is not None:
        seen = visible if seen is None else seen & visible
    if seen is None:
        return torch.zeros(1, 1, queries, keys)
    if seen.shape[2] != queries:
        seen = seen.expand(-1, -1, queries, -1)
    return torch.where(seen, 0.0, hidden)
