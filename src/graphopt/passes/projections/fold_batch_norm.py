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
    """A convolution or linear, and the views between it and the norm, in that order."""

    node: fx.Node
    path: tuple[fx.Node, ...]
    before: bool
    """Whether it lies before the norm."""

    def now(self, program: Program) -> Place:
        """Return it in its present state, after a norm on its other side was folded into it."""
        return replace(self, node=program.edit.now(self.node))


def find_batch_norm(
    program: Program, node: fx.Node, untie: bool
) -> tuple[Site, tuple[fx.Node, list[Place]]] | str:
    """Return where a BatchNorm is folded: into the operator before it, or into those after it; else why not.

    Args:
        program: the program.
        node: the BatchNorm.
        untie: also where the matrix is used elsewhere, which then keeps a copy of its own.
    """
    args = arguments(node)
    if args["training"]:
        return "it is in training mode: its statistics depend on the batch"
    if args["running_mean"] is None or args["running_var"] is None:
        return "it has no running statistics"
    constant = depends_on_weights_alone(program)
    parameters = [args[name] for name in ("running_mean", "running_var", "weight", "bias")]
    if any(p is not None and p not in constant for p in parameters):
        return "its statistics depend on the input"
    before = _place_before(program, node, constant, untie)
    if not isinstance(before, str):
        return Site(node.name, direction="before"), (node, [before])
    after = _places_after(program, node, constant, untie)
    if not isinstance(after, str):
        return Site(node.name, direction="after"), (node, after)
    return f"before it: {before}; after it: {after}"


def _channel(node: fx.Node) -> int | None:
    """Return the channel dimension of the input and output of a convolution or linear; None where there is no batch."""
    rank: int = node.meta["val"].dim()
    if is_operator(node, "aten.linear"):
        return rank - 1
    return 1 if rank == node.args[1].meta["val"].dim() else None  # type: ignore[union-attr]


def _dimension_after_move(step: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Return a dimension's position after a view, if that keeps its entries and their order; else None."""
    placement = carried(step, source, dim)
    return placement.dim if placement is not None and placement.factor == placement.divisor else None


def _place_before(program: Program, norm: fx.Node, constant: set[fx.Node], untie: bool) -> Place | str:
    path: list[fx.Node] = []
    x = arguments(norm)["input"]
    while has(x, _MOVES):
        if len(x.users) != 1:
            return f"{x.name} is read elsewhere as well"
        path.insert(0, x)
        x = x.args[0]
    if not is_operator(x, *_MATRICES):
        return "no convolution or linear"
    if x.args[1] not in constant:
        return "its matrix depends on the input"
    if len(x.users) != 1:
        return f"{x.name} is read elsewhere as well"
    if len(readers(program, x.args[1])) > 1 and not untie:
        return f"the matrix of {x.name} is used elsewhere; untie=true gives each its own"
    channel_dim, value = _channel(x), x
    for step in path:
        channel_dim = None if channel_dim is None else _dimension_after_move(step, value, channel_dim)
        value = step
    if channel_dim != 1:
        return f"channels of {x.name} are not those of the norm"
    if norm.meta["val"].dtype != x.meta["val"].dtype:
        return f"{x.name} has another dtype than the norm"
    return Place(x, tuple(path), before=True)


def _places_after(program: Program, norm: fx.Node, constant: set[fx.Node], untie: bool) -> list[Place] | str:
    targets: list[Place] = []
    work: list[tuple[fx.Node, int, tuple[fx.Node, ...]]] = [(norm, 1, ())]
    while work:
        value, dim, path = work.pop(0)
        for user in value.users:
            if has(user, _MOVES) and user.args[0] is value:
                moved_dim = _dimension_after_move(user, value, dim)
                if moved_dim is None:
                    return f"{user.name} mixes its channels with others"
                work.append((user, moved_dim, (*path, user)))
                continue
            problem = _reader_problem(program, user, value, dim, constant, untie)
            if problem:
                return problem
            targets.append(Place(user, path, before=False))
    return targets or "nothing"


def _reader_problem(
    program: Program, user: fx.Node, value: fx.Node, dim: int, constant: set[fx.Node], untie: bool
) -> str:
    """Return why an operator cannot absorb the norm of its input; "" if it can."""
    if not is_operator(user, *_MATRICES) or user.args[0] is not value or user.args[1] not in constant:
        return f"{user.name} has no matrix to absorb it"
    if _channel(user) != dim:
        return f"channels of {user.name} are not those of the norm"
    if is_operator(user, *CONVOLUTIONS) and any(_padding(user)):
        return f"{user.name} pads with zeros, which the norm would have shifted"
    if is_operator(user, *TRANSPOSED) and not _pointwise(user):
        return f"{user.name} spreads its input, and with it the norm's shift, unevenly"
    if len(readers(program, user.args[1])) > 1 and not untie:  # type: ignore[arg-type]
        return f"the matrix of {user.name} is used elsewhere; untie=true gives each its own"
    return ""


def _padding(node: fx.Node) -> list[int]:
    padding = arguments(node)["padding"]
    if isinstance(padding, str):
        return [0] if padding == "valid" else [1]
    return [padding] if isinstance(padding, int) else list(padding)


def _pointwise(node: fx.Node) -> bool:
    args = arguments(node)
    kernel_shape = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]

    def all_are(value: Any, expected: int) -> bool:
        return all(v == expected for v in ([value] if isinstance(value, int) else value))

    return (
        all_are(list(kernel_shape), 1)
        and all_are(args["stride"], 1)
        and all_are(args["padding"], 0)
        and all_are(args["output_padding"], 0)
    )


def fold_batch_norm(program: Program, node: fx.Node, places: list[Place]) -> None:
    """Fold one BatchNorm: ``y = x * t + (beta - mean * t)`` with ``t = gamma / sqrt(var + eps)``."""
    scale, shift = _scale_and_shift(program, node)
    for place in places:
        fold_into = _fold_into_before if place.before else _fold_into_after
        fold_into(program, node, place.now(program), scale, shift)
    if not any(place.before for place in places):
        program.edit.erase_dead([*(step for place in places for step in reversed(place.path)), node])
    block_export(program, "a BatchNorm was folded, which a checkpoint of this architecture would keep")


def _scale_and_shift(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    args = arguments(node)
    call = program.edit.call
    with program.edit.before(node):
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, args["running_var"], args["eps"]))
        if args["weight"] is not None:
            scale = call(aten.mul.Tensor, scale, args["weight"])
        shift = call(aten.neg.default, call(aten.mul.Tensor, args["running_mean"], scale))
        if args["bias"] is not None:
            shift = call(aten.add.Tensor, shift, args["bias"])
    return scale, shift


def _groups(node: fx.Node) -> int:
    return int(arguments(node).get("groups", 1))


def _repeat_path(program: Program, path: tuple[fx.Node, ...], value: fx.Node) -> fx.Node:
    """Repeat the views of a path on another value."""
    for step in path:
        value = program.edit.call(step.target, value, *step.args[1:], **step.kwargs)
    return value


def _fold_into_before(program: Program, norm: fx.Node, place: Place, scale: fx.Node, shift: fx.Node) -> None:
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
        new = _repeat_path(program, place.path, repeated(program, node, node.args[0], folded, offset))
    program.edit.replace(norm, new)


def _fold_into_after(program: Program, norm: fx.Node, place: Place, scale: fx.Node, shift: fx.Node) -> None:
    user = place.node
    weight: Any = user.args[1]
    call = program.edit.call
    shape = [int(s) for s in weight.meta["val"].shape]
    groups = _groups(user)
    with program.edit.before(user):
        x = _repeat_path(program, place.path, arguments(norm)["input"])
        if is_operator(user, *TRANSPOSED):
            columns, offsets = (_shaped(program, v, [-1, *[1] * (len(shape) - 1)]) for v in (scale, shift))
            parts = _shaped(
                program, call(aten.mul.Tensor, weight, offsets), [groups, shape[0] // groups, shape[1]]
            )
            contribution = _shaped(program, call(aten.sum.dim_IntList, parts, [1]), [-1])
        else:
            columns, offsets = (per_group(program, v, shape, groups) for v in (scale, shift))
            contribution = call(
                aten.sum.dim_IntList, call(aten.mul.Tensor, weight, offsets), list(range(1, len(shape)))
            )
        folded = call(aten.mul.Tensor, weight, columns)
        bias = arguments(user)["bias"]
        offset = contribution if bias is None else call(aten.add.Tensor, contribution, bias)
        new = repeated(program, user, x, folded, offset)
    program.edit.replace(user, new)
