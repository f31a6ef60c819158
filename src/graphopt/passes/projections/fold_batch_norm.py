"""BatchNorm in evaluation mode, folded into the convolution or linear beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.export_blockers import block_export
from ...ir.operators.traits import Trait, has, named
from ...ir.program import Program
from ...ir.ranks.dimensions import carried
from ...ir.running.fold import depends_on_weights_alone
from ...ir.running.readers import readers
from ...ir.schema import arguments, is_operator
from ..framework.plan import Site
from ..shared.matrices import _shaped, per_group, repeated

aten = torch.ops.aten
CONVOLUTIONS = named(Trait.CONVOLUTION)
TRANSPOSED = named(Trait.TRANSPOSED) - {"aten.convolution"}
_MATRICES = (*CONVOLUTIONS, *TRANSPOSED, "aten.linear")
_MOVES = Trait.VIEW | Trait.IDENTITY


@dataclass(frozen=True)
class Place:
    """A convolution or linear, and what moves its value or its input between it and the norm, in that order."""

    node: fx.Node
    path: tuple[fx.Node, ...]
    before: bool
    """Whether it lies before the norm."""

    def now(self, program: Program) -> Place:
        """Return it as it is after a norm on its other side was folded into it."""
        return replace(self, node=program.edit.now(self.node))


def find_batch_norm(
    program: Program, node: fx.Node, untie: bool
) -> tuple[Site, tuple[fx.Node, list[Place]]] | str:
    """Return where a BatchNorm goes: into the operator before it, or into those after it; else why not.

    Args:
        program: the program.
        node: the BatchNorm.
        untie: also where the matrix is used elsewhere, which then keeps its own.
    """
    found = arguments(node)
    if found["training"]:
        return "it is in training mode: its statistics depend on the batch"
    if found["running_mean"] is None or found["running_var"] is None:
        return "it has no running statistics"
    constant = depends_on_weights_alone(program)
    parameters = [found[name] for name in ("running_mean", "running_var", "weight", "bias")]
    if any(p is not None and p not in constant for p in parameters):
        return "its statistics depend on the input"
    before = _before(program, node, constant, untie)
    if not isinstance(before, str):
        return Site(node.name, direction="before"), (node, [before])
    after = _after(program, node, constant, untie)
    if not isinstance(after, str):
        return Site(node.name, direction="after"), (node, after)
    return f"before it: {before}; after it: {after}"


def _channel(node: fx.Node) -> int | None:
    """The dimension of channels in what a convolution or linear reads and gives; None where there is no batch."""
    rank: int = node.meta["val"].dim()
    if is_operator(node, "aten.linear"):
        return rank - 1
    return 1 if rank == node.args[1].meta["val"].dim() else None  # type: ignore[union-attr]


def _moved(step: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Where a dimension lies after a move that keeps its entries and their order."""
    place = carried(step, source, dim)
    return place.dim if place is not None and place.factor == place.divisor else None


def _before(program: Program, norm: fx.Node, constant: set[fx.Node], untie: bool) -> Place | str:
    path: list[fx.Node] = []
    x = arguments(norm)["input"]
    while has(x, _MOVES):
        if len(x.users) != 1:
            return f"{x.name} is read by others too"
        path.insert(0, x)
        x = x.args[0]
    if not is_operator(x, *_MATRICES):
        return "no convolution or linear"
    if x.args[1] not in constant:
        return "its matrix depends on the input"
    if len(x.users) != 1:
        return f"{x.name} is read by others too"
    if len(readers(program, x.args[1])) > 1 and not untie:
        return f"the matrix of {x.name} is used elsewhere; untie=true gives each its own"
    place, value = _channel(x), x
    for step in path:
        place = None if place is None else _moved(step, value, place)
        value = step
    if place != 1:
        return f"channels of {x.name} are not those of the norm"
    if norm.meta["val"].dtype != x.meta["val"].dtype:
        return f"{x.name} gives another type than the norm"
    return Place(x, tuple(path), before=True)


def _after(program: Program, norm: fx.Node, constant: set[fx.Node], untie: bool) -> list[Place] | str:
    found: list[Place] = []
    work: list[tuple[fx.Node, int, tuple[fx.Node, ...]]] = [(norm, 1, ())]
    while work:
        value, dim, path = work.pop(0)
        for user in value.users:
            if has(user, _MOVES) and user.args[0] is value:
                place = _moved(user, value, dim)
                if place is None:
                    return f"{user.name} mixes its channels with others"
                work.append((user, place, (*path, user)))
                continue
            problem = _reader(program, user, value, dim, constant, untie)
            if problem:
                return problem
            found.append(Place(user, path, before=False))
    return found or "nothing"


def _reader(
    program: Program, user: fx.Node, value: fx.Node, dim: int, constant: set[fx.Node], untie: bool
) -> str:
    """Say why an operator cannot hold the norm of what it reads, or "" if it can."""
    if not is_operator(user, *_MATRICES) or user.args[0] is not value or user.args[1] not in constant:
        return f"{user.name} has no matrix to hold it"
    if _channel(user) != dim:
        return f"channels of {user.name} are not those of the norm"
    if is_operator(user, *CONVOLUTIONS) and any(_padding(user)):
        return f"{user.name} pads with zeros, which the norm would have shifted"
    if is_operator(user, *TRANSPOSED) and not _pointwise(user):
        return f"{user.name} spreads its input, and with it what the norm has added, unevenly"
    if len(readers(program, user.args[1])) > 1 and not untie:  # type: ignore[arg-type]
        return f"the matrix of {user.name} is used elsewhere; untie=true gives each its own"
    return ""


def _padding(node: fx.Node) -> list[int]:
    padding = arguments(node)["padding"]
    if isinstance(padding, str):
        return [0] if padding == "valid" else [1]
    return [padding] if isinstance(padding, int) else list(padding)


def _pointwise(node: fx.Node) -> bool:
    found = arguments(node)
    taps = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]

    def all_are(value: Any, wanted: int) -> bool:
        return all(v == wanted for v in ([value] if isinstance(value, int) else value))

    return (
        all_are(list(taps), 1)
        and all_are(found["stride"], 1)
        and all_are(found["padding"], 0)
        and all_are(found["output_padding"], 0)
    )


def fold_batch_norm(program: Program, node: fx.Node, places: list[Place]) -> None:
    """Fold one BatchNorm: ``y = x * t + (beta - mean * t)`` with ``t = gamma / sqrt(var + eps)``."""
    scale, shift = _affine(program, node)
    for place in places:
        into = _into_before if place.before else _into_after
        into(program, node, place.now(program), scale, shift)
    if not any(place.before for place in places):
        program.edit.erase_dead([*(step for place in places for step in reversed(place.path)), node])
    block_export(program, "a BatchNorm was folded, which a checkpoint of this architecture would keep")


def _affine(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    found = arguments(node)
    call = program.edit.call
    with program.edit.before(node):
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, found["running_var"], found["eps"]))
        if found["weight"] is not None:
            scale = call(aten.mul.Tensor, scale, found["weight"])
        shift = call(aten.neg.default, call(aten.mul.Tensor, found["running_mean"], scale))
        if found["bias"] is not None:
            shift = call(aten.add.Tensor, shift, found["bias"])
    return scale, shift


def _groups(node: fx.Node) -> int:
    return int(arguments(node).get("groups", 1))


def _again(program: Program, path: tuple[fx.Node, ...], value: fx.Node) -> fx.Node:
    """Repeat moves on another value."""
    for step in path:
        value = program.edit.call(step.target, value, *step.args[1:], **step.kwargs)
    return value


def _into_before(program: Program, norm: fx.Node, place: Place, scale: fx.Node, shift: fx.Node) -> None:
    node = place.node
    weight: Any = node.args[1]
    call = program.edit.call
    shape = [int(s) for s in weight.meta["val"].shape]
    with program.edit.before(norm):
        if is_operator(node, *TRANSPOSED):
            rows = per_group(program, scale, shape, _groups(node))
        else:
            rows = _shaped(program, scale, [-1, *[1] * (len(shape) - 1)])
        folded = call(aten.mul.Tensor, weight, rows)
        bias = arguments(node)["bias"]
        offset = shift if bias is None else call(aten.add.Tensor, call(aten.mul.Tensor, bias, scale), shift)
        new = _again(program, place.path, repeated(program, node, node.args[0], folded, offset))
    program.edit.replace(norm, new)


def _into_after(program: Program, norm: fx.Node, place: Place, scale: fx.Node, shift: fx.Node) -> None:
    user = place.node
    weight: Any = user.args[1]
    call = program.edit.call
    shape = [int(s) for s in weight.meta["val"].shape]
    groups = _groups(user)
    with program.edit.before(user):
        x = _again(program, place.path, arguments(norm)["input"])
        if is_operator(user, *TRANSPOSED):
            columns, offsets = (_shaped(program, v, [-1, *[1] * (len(shape) - 1)]) for v in (scale, shift))
            parts = _shaped(
                program, call(aten.mul.Tensor, weight, offsets), [groups, shape[0] // groups, shape[1]]
            )
            moved = _shaped(program, call(aten.sum.dim_IntList, parts, [1]), [-1])
        else:
            columns, offsets = (per_group(program, v, shape, groups) for v in (scale, shift))
            moved = call(
                aten.sum.dim_IntList, call(aten.mul.Tensor, weight, offsets), list(range(1, len(shape)))
            )
        folded = call(aten.mul.Tensor, weight, columns)
        bias = arguments(user)["bias"]
        offset = moved if bias is None else call(aten.add.Tensor, moved, bias)
        new = repeated(program, user, x, folded, offset)
    program.edit.replace(user, new)
