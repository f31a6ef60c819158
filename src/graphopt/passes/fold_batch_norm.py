"""BatchNorm in evaluation mode, folded into the convolution or linear beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.export_blockers import block_export
from ..ir.fold import depends_on_weights_alone
from ..ir.program import Program
from ..ir.readers import readers
from ..ir.schema import arguments, is_operator
from .plan import Site

aten = torch.ops.aten
CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_MATRICES = (*CONVOLUTIONS, "aten.linear")


def plan_batch_norm(program: Program, node: fx.Node, untie: bool) -> dict[str, Any] | str:
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
    x = found["input"]
    before = _before(program, x, constant, untie)
    if before == "":
        return {"direction": "before"}
    after = _after(program, node, constant, untie)
    if after == "":
        return {"direction": "after"}
    return f"before it: {before}; after it: {after}"


def _before(program: Program, x: Any, constant: set[fx.Node], untie: bool) -> str:
    if not is_operator(x, *_MATRICES):
        return "no convolution or linear"
    if x.args[1] not in constant:
        return "its matrix depends on the input"
    if len(x.users) != 1:
        return f"{x.name} is read by others too"
    if len(readers(program, x.args[1])) > 1 and not untie:
        return f"the matrix of {x.name} is used elsewhere; untie=true gives each its own"
    if is_operator(x, "aten.linear") and x.meta["val"].dim() != 2:
        return "channels of the linear are not those of the norm"
    return ""


def _after(program: Program, node: fx.Node, constant: set[fx.Node], untie: bool) -> str:
    if not node.users:
        return "nothing"
    for user in node.users:
        if not is_operator(user, *_MATRICES) or user.args[0] is not node or user.args[1] not in constant:
            return f"{user.name} has no matrix to hold it"
        if is_operator(user, *CONVOLUTIONS) and any(_padding(user)):
            return f"{user.name} pads with zeros, which the norm would have shifted"
        if is_operator(user, "aten.linear") and node.meta["val"].dim() != 2:
            return "channels of the linear are not those of the norm"
        if len(readers(program, user.args[1])) > 1 and not untie:  # type: ignore[arg-type]
            return f"the matrix of {user.name} is used elsewhere; untie=true gives each its own"
    return ""


def _padding(node: fx.Node) -> list[int]:
    padding = arguments(node)["padding"]
    if isinstance(padding, str):
        return [0] if padding == "valid" else [1]
    return [padding] if isinstance(padding, int) else list(padding)


def fold_batch_norm(program: Program, node: fx.Node, site: Site, nodes: dict[str, fx.Node]) -> None:
    """Fold one BatchNorm: ``y = x * t + (beta - mean * t)`` with ``t = gamma / sqrt(var + eps)``."""
    del nodes
    scale, shift = _affine(program, node)
    if site["direction"] == "before":
        _into_before(program, node, scale, shift)
    else:
        for user in list(node.users):
            _into_after(program, node, user, scale, shift)
        program.edit.erase_dead([node])
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


def _shaped(program: Program, vector: fx.Node, shape: list[int]) -> fx.Node:
    return program.edit.call(aten.reshape.default, vector, shape)


def _into_before(program: Program, node: fx.Node, scale: fx.Node, shift: fx.Node) -> None:
    matrix_node: Any = arguments(node)["input"]
    weight = matrix_node.args[1]
    call = program.edit.call
    with program.edit.before(node):
        rows = _shaped(program, scale, [-1, *[1] * (weight.meta["val"].dim() - 1)])
        folded = call(aten.mul.Tensor, weight, rows)
        bias = arguments(matrix_node)["bias"]
        offset = shift if bias is None else call(aten.add.Tensor, call(aten.mul.Tensor, bias, scale), shift)
        new = repeated(program, matrix_node, matrix_node.args[0], folded, offset)
    program.edit.replace(node, new)


def _into_after(program: Program, node: fx.Node, user: fx.Node, scale: fx.Node, shift: fx.Node) -> None:
    x = arguments(node)["input"]
    weight: Any = user.args[1]
    call = program.edit.call
    shape = [int(s) for s in weight.meta["val"].shape]
    groups = int(arguments(user).get("groups", 1))
    with program.edit.before(user):
        columns, offsets = (per_group(program, v, shape, groups) for v in (scale, shift))
        folded = call(aten.mul.Tensor, weight, columns)
        moved = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weight, offsets), list(range(1, len(shape))))
        bias = arguments(user)["bias"]
        offset = moved if bias is None else call(aten.add.Tensor, moved, bias)
        new = repeated(program, user, x, folded, offset)
    program.edit.replace(user, new)


def per_group(program: Program, vector: fx.Node, shape: list[int], groups: int) -> fx.Node:
    """Lay a value per input channel out for a (outputs, inputs / groups, ...) matrix."""
    rest = [1] * (len(shape) - 2)
    if groups == 1:
        return _shaped(program, vector, [1, shape[1], *rest])
    grouped = _shaped(program, vector, [groups, 1, shape[1]])
    spread = program.edit.call(aten.expand.default, grouped, [groups, shape[0] // groups, shape[1]])
    return _shaped(program, spread, [shape[0], shape[1], *rest])


def repeated(program: Program, node: fx.Node, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Repeat a convolution or linear with another input, matrix and bias."""
    return program.edit.call(node.target, x, weight, bias, *node.args[3:], **node.kwargs)
