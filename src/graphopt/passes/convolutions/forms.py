"""Affine forms: a value as one convolution of an earlier value, exactly, and how forms compose and add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from .geometry import Axis, lattice, one_after_another

aten, composites = torch.ops.aten, torch.ops.graphopt
Build = Callable[["Reader"], tuple[Any, Any]]


class Reader(Protocol):
    """Computes kernels from tensors, or from nodes of the graph."""

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of a node that depends on weights alone."""

    def apply(self, operator: Any, *arguments: Any) -> Any:
        """Return the result of an operator called on such values."""

    def constant(self, shape: list[int], value: float, dtype: torch.dtype) -> Any:
        """Return a tensor of equal values."""


@dataclass(frozen=True)
class Form:
    """An affine form: ``value = convolution(source)`` with kernel offsets, groups and a border mode.

    Args:
        source: the input.
        value: the output.
        outputs: channels of the value.
        inputs: channels of the source.
        groups: groups of the convolution.
        axes: spatial axes.
        mode: how the source is extended beyond its ends: "zeros", "reflect", "replicate", "circular", or "" if
            nothing beyond them is read.
        build: a function that takes a reader and returns kernel and bias.
        vector: for values that are scaled and shifted per channel, a function that takes a reader and returns
            scale (None for 1) and shift (None for 0).
        biased: whether there is a bias.
        nodes: the nodes that the form computes, including the value; empty for a value as it is.
        convolutions: how many of them are convolutions or poolings.
        branches: how many terms the form sums up.
    """

    source: fx.Node
    value: fx.Node
    outputs: int
    inputs: int
    groups: int
    axes: tuple[Axis, ...]
    mode: str
    build: Build = field(repr=False, compare=False)
    biased: bool
    nodes: frozenset[fx.Node] = frozenset()
    convolutions: int = 0
    branches: int = 1
    vector: Build | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Multiply-adds per output value."""
        return self.inputs // self.groups * math.prod(axis.count for axis in self.axes)


def extension(axes: tuple[Axis, ...], mode: str) -> str:
    """Return the mode, or "" if nothing beyond the ends is read."""
    return mode if any(axis.extends for axis in axes) else ""


def follow(second: Form, first: Form) -> Form | str:
    """Return the affine form of ``second`` over the source of ``first``, whose value is the source of ``second``.

    Beyond the ends of the intermediate value lies the padding of the second, not what the first would have
    computed there; where these differ, the two are not one convolution, and the reason is returned.
    """
    mode = first.mode
    if second.mode:
        problem = _border_problem(second, first)
        if problem:
            return problem
        mode = second.mode
    groups = math.gcd(first.groups, second.groups)
    axes = tuple(one_after_another(a, b) for a, b in zip(first.axes, second.axes, strict=True))
    counts = [axis.count for axis in axes]
    spacings = [
        (_spacing(a.step, axis.step, a.count), _spacing(a.stride * b.step, axis.step, b.count))
        for a, b, axis in zip(first.axes, second.axes, axes, strict=True)
    ]

    def build(read: Reader) -> tuple[Any, Any]:
        first_kernel, first_bias = first.build(read)
        if second.vector is not None:
            return scaled(read, first_kernel, first_bias, *second.vector(read))
        second_kernel, second_bias = second.build(read)
        kernel = read.apply(
            composites.kernel_sequence.default, first_kernel, second_kernel, first.groups, second.groups, groups,
            [a for a, _ in spacings], [b for _, b in spacings], counts,
        )  # fmt: skip
        if first_bias is None:
            return kernel, second_bias
        return kernel, read.apply(
            composites.bias_sequence.default, first_bias, second_kernel, second.groups, second_bias
        )

    vector = None
    if first.vector is not None and second.vector is not None:
        inner, outer = first.vector, second.vector

        def vector(read: Reader) -> tuple[Any, Any]:
            scale, shift = inner(read)
            second_scale, second_shift = outer(read)
            if second_scale is not None:
                scale = second_scale if scale is None else read.apply(aten.mul.Tensor, scale, second_scale)
                shift = None if shift is None else read.apply(aten.mul.Tensor, shift, second_scale)
            return scale, second_shift if shift is None else shift if second_shift is None else read.apply(
                aten.add.Tensor, shift, second_shift
            )

    return Form(
        first.source,
        second.value,
        second.outputs,
        first.inputs,
        groups,
        axes,
        extension(axes, mode),
        build,
        first.biased or second.biased,
        first.nodes | second.nodes,
        first.convolutions + second.convolutions,
        max(first.branches, second.branches),
        vector,
    )


def scaled(read: Reader, kernel: Any, bias: Any, scale: Any, shift: Any) -> tuple[Any, Any]:
    """Return kernel and bias of a convolution whose value is scaled and shifted per channel."""
    if scale is not None:
        kernel = read.apply(composites.kernel_scaled.default, kernel, scale)
        bias = None if bias is None else read.apply(aten.mul.Tensor, bias, scale)
    if shift is not None:
        bias = shift if bias is None else read.apply(aten.add.Tensor, bias, shift)
    return kernel, bias


def _spacing(step: int, lattice_step: int, count: int) -> int:
    return step // lattice_step if count > 1 else 1


def _border_problem(second: Form, first: Form) -> str:
    """Return why the padding between two forms differs from what the first computes there; "" if it does not."""
    pointwise = all(
        inner.count == 1 for inner, outer in zip(first.axes, second.axes, strict=True) if outer.extends
    )
    name = first.value.name
    if second.mode != "zeros":
        unchanged = all(a == Axis() for a in first.axes)
        return (
            "" if unchanged else f"{name} is padded by {second.mode} after an operator that is not pointwise"
        )
    if first.biased:
        return f"{name} adds a constant before zero padding, so its border would be another"
    if not pointwise:
        return f"{name} is padded with zeros between two kernels, so its border would be another"
    if first.mode not in ("", "zeros"):
        return f"{name} is padded by {first.mode} and then by zeros"
    for inner, outer in zip(first.axes, second.axes, strict=True):
        if (outer.low > 0 and inner.low < 0) or (outer.high > 0 and inner.high < 0):
            return f"{name} is cut and then padded with zeros"
    return ""


def add(value: fx.Node, first: Form, second: Form) -> Form | str:
    """Return the affine form of the sum of two forms over the same source, or why there is none."""
    if first.outputs != second.outputs:
        return "its terms have different numbers of channels"
    if [a.stride for a in first.axes] != [a.stride for a in second.axes]:
        return "its terms have different strides"
    if first.mode and second.mode and first.mode != second.mode:
        return f"its terms are padded differently: {first.mode} and {second.mode}"
    axes = []
    for a, b in zip(first.axes, second.axes, strict=True):
        start, step, count = lattice([a, b])
        ends = {a.high - a.last, b.high - b.last}
        if len(ends) > 1 and (a.stride == 1 or not _sizes_known(value)):
            return "its terms have sizes that agree for some inputs only"
        end = start + step * (count - 1)
        axes.append(Axis(start, step, count, a.stride, max(ends) + end))
    groups = math.gcd(first.groups, second.groups)
    terms = [(form, _lattice_offsets(form, axes)) for form in (first, second)]
    counts = [a.count for a in axes]

    def build(read: Reader) -> tuple[Any, Any]:
        kernels, biases = [], []
        for form, (ratios, before) in terms:
            kernel, bias = form.build(read)
            if form.groups != groups or [a.count for a in form.axes] != counts:
                kernel = read.apply(
                    composites.kernel_spread.default, kernel, form.groups, groups, ratios, before, counts
                )
            kernels.append(kernel)
            biases += [] if bias is None else [bias]
        total = read.apply(aten.add.Tensor, *kernels)
        return total, read.apply(aten.add.Tensor, *biases) if len(biases) == 2 else next(iter(biases), None)

    return Form(
        first.source,
        value,
        first.outputs,
        first.inputs,
        groups,
        tuple(axes),
        extension(tuple(axes), first.mode or second.mode),
        build,
        first.biased or second.biased,
        first.nodes | second.nodes | {value},
        first.convolutions + second.convolutions,
        first.branches + second.branches,
    )


def negative(form: Form) -> Form:
    """Return the affine form of the negated value, for use as a term of a sum."""

    def build(read: Reader) -> tuple[Any, Any]:
        kernel, bias = form.build(read)
        return read.apply(aten.neg.default, kernel), None if bias is None else read.apply(
            aten.neg.default, bias
        )

    return replace(form, build=build, vector=None)


def _sizes_known(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape[2:])


def _lattice_offsets(form: Form, axes: list[Axis]) -> tuple[list[int], list[int]]:
    """Return, by axis, the spacing of a form's kernel offsets on a common lattice, and the position of the first."""
    ratios = [_spacing(a.step, b.step, a.count) for a, b in zip(form.axes, axes, strict=True)]
    return ratios, [(a.first - b.first) // b.step for a, b in zip(form.axes, axes, strict=True)]
