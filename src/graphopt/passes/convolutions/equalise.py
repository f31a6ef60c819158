"""Scaling channels between two convolutions so that their ranges match (Nagel et al., 2019, arXiv 1906.04721)."""

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
    """Two convolutions and the operators between them, each read only by the next."""

    first: fx.Node
    between: tuple[fx.Node, ...]
    second: fx.Node


def find_pairs(program: Program) -> list[Pair]:
    """Return pairs of convolutions between which channels can be scaled without changing any output."""
    constant = depends_on_weights_alone(program)
    return [
        pair for node in program.graph.nodes
        if _has_own_kernel(node, constant) and (pair := _pair_from(node, constant)) is not None
    ]  # fmt: skip


def _has_own_kernel(node: fx.Node, constant: set[fx.Node]) -> bool:
    return is_operator(node, *CONVOLUTIONS) and node.args[1] in constant and len(node.args[1].users) == 1  # type: ignore[union-attr]


def _pair_from(node: fx.Node, constant: set[fx.Node]) -> Pair | None:
    between: list[fx.Node] = []
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        if _has_own_kernel(user, constant) and user.args[0] is current:
            return Pair(node, tuple(between), user)
        padding = has(user, Trait.PADDING) and not arguments(user).get("value")
        commutes = padding or has(user, Trait.HOMOGENEOUS) or is_operator(user, "aten.slice")
        if not commutes or user.args[0] is not current:
            return None
        between.append(user)
        current = user
    return None


def equalise(program: Program, pair: Pair) -> fx.Node:
    """Scale channel c of the first by 1 / s and of the second by s, with s the root of the ratio of their ranges.

    Returns:
        The node that replaced the second convolution.
    """
    call = program.edit.call
    first, second = arguments(pair.first), arguments(pair.second)
    first_weight, second_weight = first["weight"], second["weight"]
    groups = int(second["groups"])
    with program.edit.before(pair.second):
        scale = program.edit.emit(lambda a, b: _equalising_scale(a, b, groups), first_weight, second_weight)
        axes = first_weight.meta["val"].dim() - 1
        rows = call(aten.reshape.default, scale, [-1, *[1] * axes])
        bias = first["bias"]
        value = repeated(
            program, pair.first, first["input"], call(aten.div.Tensor, first_weight, rows),
            None if bias is None else call(aten.div.Tensor, bias, scale),
        )  # fmt: skip
        for node in pair.between:
            value = call(node.target, value, *node.args[1:], **node.kwargs)
        columns = per_group(program, scale, [int(s) for s in second_weight.meta["val"].shape], groups)
        new = repeated(
            program, pair.second, value, call(aten.mul.Tensor, second_weight, columns), second["bias"]
        )
    program.edit.replace(pair.second, new)
    return new


def _equalising_scale(first_weight: Any, second_weight: Any, groups: int) -> Any:
    """Return the geometric mean of both ranges over the second's, one value per channel."""
    channels = int(first_weight.shape[0])
    outputs, group_inputs = int(second_weight.shape[0]), int(second_weight.shape[1])
    first = torch.amax(torch.abs(torch.reshape(first_weight, [channels, -1])), [1])
    grouped = torch.reshape(torch.abs(second_weight), [groups, outputs // groups, group_inputs, -1])
    second = torch.reshape(torch.amax(grouped, [1, 3]), [channels])
    # a channel of zeros has no range to match
    first, second = torch.clamp(first, 1e-12), torch.clamp(second, 1e-12)
    return torch.clamp(torch.sqrt(torch.div(first, second)), 1e-4, 1e4)
