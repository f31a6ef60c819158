"""A value as one convolution of an earlier value, exactly: how forms arise, follow one another and add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from .algebra import in_sequence, on_lattice, with_groups
from .geometry import Axis, lattice, one_after_another

Build = Callable[["Reader"], tuple[Any, Any]]


class Reader(Protocol):
    """Turns what kernels are made of into tensors, or into operands of the graph."""

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of a node that depends on weights alone."""

    def constant(self, shape: list[int], value: float, dtype: torch.dtype) -> Any:
        """Return a tensor of equal values."""


@dataclass(frozen=True)
class Form:
    """``value = convolution(source)`` with these taps, groups and this extension beyond the ends.

    Args:
        source: what is read.
        value: what is computed.
        outputs: channels of the value.
        inputs: channels of the source.
        groups: of the convolution.
        axes: spatial axes.
        mode: how the source goes on beyond its ends: "zeros", "reflect", "replicate", "circular", or "" where
            nothing beyond them is read.
        build: given what turns a node into a tensor or an operand, returns kernel and bias.
        biased: whether there is a bias.
        nodes: what is computed by the form, the value included; empty for a value as it is.
        convolutions: how many of them are convolutions or poolings.
        branches: how many terms the form has summed up.
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

    @property
    def size(self) -> int:
        """Multiply-adds for each value it gives."""
        return self.inputs // self.groups * math.prod(axis.count for axis in self.axes)


def extension(axes: tuple[Axis, ...], mode: str) -> str:
    """Return the mode, or "" where it does not matter."""
    return mode if any(axis.extends for axis in axes) else ""


def follow(second: Form, first: Form) -> Form | str:
    """Return the form of ``second`` over the source of ``first``, whose value is the source of ``second``.

    What lies beyond the ends of the value between the two is the second's padding, not what the first would
    have computed there; where that differs, the two are no convolution, and the reason is returned.
    """
    mode = first.mode
    if second.mode:
        problem = _border(second, first)
        if problem:
            return problem
        mode = second.mode
    groups = math.gcd(first.groups, second.groups)
    axes = tuple(one_after_another(a, b) for a, b in zip(first.axes, second.axes, strict=True))
    places = [
        (_ratio(a.stride * b.step, axis.step, b.count), _ratio(a.step, axis.step, a.count), axis.count)
        for a, b, axis in zip(first.axes, second.axes, axes, strict=True)
    ]

    def build(read: Reader) -> tuple[Any, Any]:
        one, one_bias = first.build(read)
        two, two_bias = second.build(read)
        one, two = with_groups(one, first.groups, groups), with_groups(two, second.groups, groups)
        return in_sequence(one, one_bias, two, two_bias, groups, places)

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
    )


def _ratio(step: int, lattice_step: int, count: int) -> int:
    return step // lattice_step if count > 1 else 1


def _border(second: Form, first: Form) -> str:
    """Say why padding the value between two forms is not what the first gives there, or "" if it is."""
    pointwise = all(one.count == 1 for one, two in zip(first.axes, second.axes, strict=True) if two.extends)
    name = first.value.name
    if second.mode != "zeros":
        still = all(a == Axis() for a in first.axes)
        return "" if still else f"{name} is padded by {second.mode} after an operator that is not pointwise"
    if first.biased:
        return f"{name} adds a constant before zero padding, so its border would be another"
    if not pointwise:
        return f"{name} is padded with zeros between two kernels, so its border would be another"
    if first.mode not in ("", "zeros"):
        return f"{name} is padded by {first.mode} and then by zeros"
    for one, two in zip(first.axes, second.axes, strict=True):
        if (two.low > 0 and one.low < 0) or (two.high > 0 and one.high < 0):
            return f"{name} is cut and then padded with zeros"
    return ""


def add(value: fx.Node, first: Form, second: Form) -> Form | str:
    """Return the form of a sum of two forms over the same source, or why there is none."""
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
    terms = [(form, _spread(form, axes)) for form in (first, second)]

    def build(read: Reader) -> tuple[Any, Any]:
        kernels, biases = [], []
        for form, (ratios, before) in terms:
            kernel, bias = form.build(read)
            kernel = with_groups(kernel, form.groups, groups)
            kernels.append(on_lattice(kernel, ratios, before, [a.count for a in axes]))
            biases += [] if bias is None else [bias]
        return kernels[0] + kernels[1], (
            biases[0] + biases[1] if len(biases) == 2 else next(iter(biases), None)
        )

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


def _sizes_known(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape[2:])


def _spread(form: Form, axes: list[Axis]) -> tuple[list[int], list[int]]:
    """How far apart a form's taps come to lie on a common lattice, and after how many places."""
    ratios = [_ratio(a.step, b.step, a.count) for a, b in zip(form.axes, axes, strict=True)]
    return ratios, [(a.first - b.first) // b.step for a, b in zip(form.axes, axes, strict=True)]
