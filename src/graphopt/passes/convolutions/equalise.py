"""Scaling channels between two convolutions so that their ranges meet (Nagel et al., 2019, arXiv 1906.04721)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator
from ..shared.matrices import per_group, repeated
from .reading import CONVOLUTIONS

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """Two convolutions and the operators between them, each read by the next alone."""

    first: fx.Node
    between: tuple[fx.Node, ...]
    second: fx.Node


def find_pairs(program: Program) -> list[Pair]:
    """Return pairs of convolutions between which channels can be scaled without changing any output."""
    constant = depends_on_weights_alone(program)
    return [
        pair for node in program.graph.nodes
        if _convolution(node, constant) and (pair := _pair(node, constant)) is not None
    ]  # fmt: skip


def _convolution(node: fx.Node, constant: set[fx.Node]) -> bool:
    return is_operator(node, *CONVOLUTIONS) and node.args[1] in constant and len(node.args[1].users) == 1  # type: ignore[union-attr]


def _pair(node: fx.Node, constant: set[fx.Node]) -> Pair | None:
    between: list[fx.Node] = []
    place = node
    while len(place.users) == 1:
        user = next(iter(place.users))
        if _convolution(user, constant) and user.args[0] is place:
            return Pair(node, tuple(between), user)
        padding = has(user, Trait.PADDING) and not arguments(user).get("value")
        passes = padding or has(user, Trait.HOMOGENEOUS) or is_operator(user, "aten.slice")
        if not passes or user.args[0] is not place:
            return None
        between.append(user)
        place = user
    return None


def equalise(program: Program, pair: Pair) -> fx.Node:
    """Scale channel c of the first by 1 / s and of the second by s, with s the root of the ratio of their ranges.

    Returns:
        The node that took the second convolution's place.
    """
    call = program.edit.call
    first, second = arguments(pair.first), arguments(pair.second)
    one, two = first["weight"], second["weight"]
    groups = int(second["groups"])
    with program.edit.before(pair.second):
        scale = program.edit.emit(lambda a, b: _scale(a, b, groups), one, two)
        axes = one.meta["val"].dim() - 1
        rows = call(aten.reshape.default, scale, [-1, *[1] * axes])
        bias = first["bias"]
        place = repeated(
            program, pair.first, first["input"], call(aten.div.Tensor, one, rows),
            None if bias is None else call(aten.div.Tensor, bias, scale),
        )  # fmt: skip
        for node in pair.between:
            place = call(node.target, place, *node.args[1:], **node.kwargs)
        columns = per_group(program, scale, [int(s) for s in two.meta["val"].shape], groups)
        new = repeated(program, pair.second, place, call(aten.mul.Tensor, two, columns), second["bias"])
    program.edit.replace(pair.second, new)
    return new


def _scale(one: Any, two: Any, groups: int) -> Any:
    """The geometric mean of both ranges over the second's, a value a channel."""
    channels = int(one.shape[0])
    outputs, each = int(two.shape[0]), int(two.shape[1])
    first = torch.amax(torch.abs(torch.reshape(one, [channels, -1])), [1])
    apart = torch.reshape(torch.abs(two), [groups, outputs // groups, each, -1])
    second = torch.reshape(torch.amax(apart, [1, 3]), [channels])
    # a channel of zeros has no range to meet
    first, second = torch.clamp(first, 1e-12), torch.clamp(second, 1e-12)
    return torch.clamp(torch.sqrt(torch.div(first, second)), 1e-4, 1e4)
