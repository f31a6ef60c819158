"""Operators that are linear over space or time, read as affine forms of their input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, named
from ...ir.schema import arguments, operator_name
from ...ir.sizes import expression
from .forms import Build, Form, Reader, extension
from .geometry import Axis

aten, composites = torch.ops.aten, torch.ops.graphopt
CONVOLUTIONS = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}
POOLINGS = {"aten.avg_pool1d": 1, "aten.avg_pool2d": 2, "aten.avg_pool3d": 3}
SCALES = ("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub", "aten.neg")
MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class NotLinear(Exception):
    """Raised where an operator that looks linear is not one convolution; the message says why."""


def spatial_axes(node: fx.Node) -> int:
    """Return the number of spatial or temporal axes of a value (batch, channels, ...); -1 if it is no such value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not 3 <= value.dim() <= 5 or not value.dtype.is_floating_point:
        return -1
    return value.dim() - 2 if isinstance(value.shape[1], int) else -1


def as_it_is(node: fx.Node) -> Form:
    """Return a value as the affine form of itself: one kernel offset that changes nothing."""
    axes = spatial_axes(node)
    channels = int(node.meta["val"].shape[1])
    dtype = node.meta["val"].dtype

    build = _diagonal(lambda read: (None, None), channels, axes, dtype)
    return Form(
        node, node, channels, channels, channels, (Axis(),) * axes, "", build, False,
        vector=lambda read: (None, None),
    )  # fmt: skip


def _diagonal(vector: Build, channels: int, axes: int, dtype: torch.dtype) -> Build:
    """Return the function that builds the kernel of a scale and shift per channel."""

    def build(read: Reader) -> tuple[Any, Any]:
        scale, shift = vector(read)
        if scale is None:
            scale = read.constant([channels], 1.0, dtype)
        return read.apply(composites.kernel_diagonal.default, scale, channels, axes), shift

    return build


def read_operator(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    """Return the affine form of an operator over its input; None if it is not of a supported kind.

    Raises:
        NotLinear: it is of a supported kind, but not one convolution of its input.
    """
    reader = _FORM_READERS.get(operator_name(node.target)) if node.op == "call_function" else None
    if reader is None or node in constant or spatial_axes(node) < 0:
        return None
    form = reader(node, constant)
    if form is not None and form.source.meta["val"].dtype != node.meta["val"].dtype:
        types = (str(n.meta["val"].dtype).removeprefix("torch.") for n in (node, form.source))
        raise NotLinear("it returns {} for an input of {}, which no convolution does".format(*types))
    return form


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


def _convolution(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    args = arguments(node)
    source, weight, bias = args["input"], args["weight"], args["bias"]
    axes = spatial_axes(node)
    if source.meta["val"].dim() != axes + 2:
        return None
    if weight not in constant or (bias is not None and bias not in constant):
        raise NotLinear("its kernel depends on the input")
    if len(weight.users) > 1:
        raise NotLinear(f"its kernel {weight.name} is shared with {_other_reader(weight, node)}")
    shape = [int(s) for s in weight.meta["val"].shape]
    steps, strides = _per_axis(args["dilation"], axes), _per_axis(args["stride"], axes)
    padding = args["padding"]
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, shape[2:], strict=True)]
        paddings = [(s // 2, s - s // 2) for s in spans]
    else:
        paddings = [(p, p) for p in _per_axis(padding, axes)]
    kernel_axes = tuple(
        Axis(-low, step if count > 1 else 1, count, stride, high)
        for (low, high), step, count, stride in zip(paddings, steps, shape[2:], strides, strict=True)
    )
    return Form(
        source,
        node,
        shape[0],
        shape[1] * int(args["groups"]),
        int(args["groups"]),
        kernel_axes,
        extension(kernel_axes, "zeros"),
        lambda read: (read(weight), None if bias is None else read(bias)),
        bias is not None,
        frozenset([node]),
        1,
    )


def _other_reader(weight: fx.Node, node: fx.Node) -> str:
    return next((u.name for u in weight.users if u is not node), "another use")


def _pooling(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    args = arguments(node)
    axes = spatial_axes(node)
    source = args["self"]
    if args["ceil_mode"]:
        raise NotLinear("its last window may be cut short (ceil_mode)")
    sizes = _per_axis(args["kernel_size"], axes)
    strides = _per_axis(args["stride"] or sizes, axes)
    padding = _per_axis(args["padding"], axes)
    if any(padding) and not args["count_include_pad"]:
        raise NotLinear("its windows count fewer values at the border (count_include_pad=False)")
    divisor = args.get("divisor_override") or math.prod(sizes)
    channels = int(node.meta["val"].shape[1])
    dtype = node.meta["val"].dtype
    kernel_axes = tuple(
        Axis(-p, 1, size, stride, p) for p, size, stride in zip(padding, sizes, strides, strict=True)
    )

    def build(read: Reader) -> tuple[Any, Any]:
        return read.constant([channels, 1, *sizes], 1.0 / divisor, dtype), None

    return Form(
        source, node, channels, channels, channels, kernel_axes, extension(kernel_axes, "zeros"), build, False,
        frozenset([node]), 1,
    )  # fmt: skip


def _pointwise(node: fx.Node, source: fx.Node, vector: Build, biased: bool) -> Form:
    channels = int(node.meta["val"].shape[1])
    axes = spatial_axes(node)
    build = _diagonal(vector, channels, axes, node.meta["val"].dtype)
    return Form(
        source, node, channels, channels, channels, (Axis(),) * axes, "", build, biased, frozenset([node]),
        vector=vector,
    )  # fmt: skip


def _batch_norm(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    args = arguments(node)
    if args["training"]:
        raise NotLinear("it is a BatchNorm in training mode: its statistics depend on the batch")
    if args["running_mean"] is None or args["running_var"] is None:
        raise NotLinear("it is a BatchNorm without running statistics")
    weight, bias = args["weight"], args["bias"]
    tensors = [args["running_mean"], args["running_var"], weight, bias]
    if any(t is not None and t not in constant for t in tensors):
        raise NotLinear("its statistics depend on the input")

    def vector(read: Reader) -> tuple[Any, Any]:
        scale = read.apply(
            composites.norm_scale.default, read(args["running_var"]), None if weight is None else read(weight),
            float(args["eps"]),
        )  # fmt: skip
        return scale, read.apply(
            composites.norm_shift.default,
            read(args["running_mean"]),
            scale,
            None if bias is None else read(bias),
        )

    return _pointwise(node, args["input"], vector, True)


def _padding(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    args = arguments(node)
    source = args["self"]
    mode = MODES.get(args.get("mode", "constant"))
    if mode is None:
        return None
    value = args.get("value") or 0.0
    sizes = args["pad"]
    if not all(isinstance(s, int) for s in sizes):
        return None
    if mode == "zeros" and value != 0:
        raise NotLinear(f"it pads with {value}")
    axes = spatial_axes(node)
    if len(sizes) > 2 * axes:
        return None
    paddings = [(0, 0)] * axes
    for index in range(len(sizes) // 2):
        paddings[axes - 1 - index] = (int(sizes[2 * index]), int(sizes[2 * index + 1]))
    kernel_axes = tuple(Axis(-low, 1, 1, 1, high) for low, high in paddings)
    identity = as_it_is(source)
    return Form(
        source, node, identity.outputs, identity.inputs, identity.groups, kernel_axes,
        extension(kernel_axes, mode), identity.build, False, frozenset([node]),
    )  # fmt: skip


def _slice(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    args = arguments(node)
    source, axis = args["self"], int(args["dim"]) - 2
    if args["step"] != 1 or axis < 0 or spatial_axes(source) < 0:
        return None
    start = args["start"] or 0
    before, after = (n.meta["val"].shape[axis + 2] for n in (source, node))
    if not isinstance(start, int):
        return None
    try:
        removed = int(expression(after) - expression(before))
        start = start + int(before) if start < 0 and isinstance(before, int) else start
    except TypeError:
        return None  # the removed length depends on the size
    if start < 0:
        return None
    kernel_axes = [Axis()] * spatial_axes(node)
    kernel_axes[axis] = Axis(start, 1, 1, 1, removed + start)
    identity = as_it_is(source)
    return Form(
        source, node, identity.outputs, identity.inputs, identity.groups, tuple(kernel_axes), "", identity.build, False,
        frozenset([node]),
    )  # fmt: skip


def _scale_or_shift(node: fx.Node, constant: set[fx.Node]) -> Form | None:
    """Return the affine form of multiplication by, or addition of, one value per channel; None if it is no such thing."""
    operands = list(node.args[:2])
    if node.kwargs or len(node.args) > 2:
        return None
    varying = [a for a in operands if isinstance(a, fx.Node) and a not in constant]
    if len(varying) != 1 or spatial_axes(varying[0]) < 0:
        return None
    source = varying[0]
    if (
        source.meta["val"].shape[1] != node.meta["val"].shape[1]
        or source.meta["val"].dim() != node.meta["val"].dim()
    ):
        return None
    other = next((a for a in operands if a is not source), None)
    axes, channels = spatial_axes(node), int(node.meta["val"].shape[1])
    if isinstance(other, fx.Node) and not one_a_channel(other, axes, channels):
        return None
    source_first = operands[0] is source
    name = str(node.target).split(".")[1]
    if name == "div" and not source_first:
        return None
    dtype = node.meta["val"].dtype

    def vector(read: Reader) -> tuple[Any, Any]:
        if name == "neg":
            return read.constant([channels], -1.0, dtype), None
        value = _per_channel(read, other, channels, dtype)
        if name == "mul":
            return value, None
        if name == "div":
            return read.apply(aten.reciprocal.default, value), None
        negative = (name == "sub" and not source_first) or name == "rsub"
        scale = read.constant([channels], -1.0, dtype) if negative else None
        return scale, read.apply(aten.neg.default, value) if name == "sub" and source_first else value

    return _pointwise(node, source, vector, name not in ("mul", "div", "neg"))


def one_a_channel(node: fx.Node, axes: int, channels: int) -> bool:
    """Tell whether a constant has one value per channel, or one for all, when broadcast to (batch, channels, ...)."""
    shape = list(node.meta["val"].shape)
    shape = [1] * (axes + 2 - len(shape)) + shape
    return (
        len(shape) == axes + 2
        and shape[1] in (1, channels)
        and all(s == 1 for i, s in enumerate(shape) if i != 1)
    )


def _per_channel(read: Reader, other: Any, channels: int, dtype: torch.dtype) -> Any:
    """Return the constant operand as one value per channel."""
    if not isinstance(other, fx.Node):
        return read.constant([channels], float(other), dtype)
    count = math.prod(int(s) for s in other.meta["val"].shape)
    flat = read.apply(aten.reshape.default, read(other), [count])
    return read.apply(aten.expand.default, flat, [channels]) if count != channels else flat


_FORM_READERS: dict[str, Callable[[fx.Node, set[fx.Node]], Form | None]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(POOLINGS, _pooling),
    **dict.fromkeys(SCALES, _scale_or_shift),
    **dict.fromkeys(named(Trait.PADDING), _padding),
    "aten.batch_norm": _batch_norm,
    "aten.slice": _slice,
}

__all__ = ["CONVOLUTIONS", "NotLinear", "as_it_is", "one_a_channel", "read_operator", "spatial_axes"]
