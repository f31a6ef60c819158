"""Rewriting of products with weights as linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_size, same_value
from ..rewriting.cleanup import merge_permutes
from ..running.fold import depends_on_weights_alone
from ..schema import argument, is_operator, operator_name

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


def raise_linears(program: Program) -> None:
    """Rewrite ``x @ w``, ``x @ w.T``, ``mm``, ``addmm`` and an added bias as linears, and unflatten them."""
    for node in list(program.graph.nodes):
        if is_operator(node, "aten.einsum"):
            _einsum(program, node)
    for node in list(program.graph.nodes):
        if node._erased or not is_operator(node, "aten.matmul", "aten.mm", "aten.addmm"):
            continue
        _product(program, node)
    for node in list(program.graph.nodes):
        if not node._erased and is_operator(node, "aten.add"):
            _bias(program, node)
    for node in list(program.graph.nodes):
        if not node._erased and is_operator(node, "aten.reshape"):
            _unflatten(program, node)
    for node in list(program.graph.nodes):
        if not node._erased and is_operator(node, "aten.native_layer_norm"):
            _layer_norm(program, node)


def _einsum(program: Program, node: fx.Node) -> None:
    """Rewrite an einsum of two operands over one index as a matrix product between permutations."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    left, _, remainder = equation.partition(",")
    right, arrow, out = remainder.partition("->")
    if (
        not arrow
        or not isinstance(operands, (list, tuple))
        or len(operands) != 2
        or not (left + right + out).isalpha()
    ):
        return
    summed = [i for i in left if i in right and i not in out]
    batch = [i for i in left if i in right and i in out]
    rows, columns = ([i for i in part if i not in other] for part, other in ((left, right), (right, left)))
    indices = [*batch, *rows, *columns]
    if len(summed) != 1 or len(columns) != 1 or (batch and len(rows) != 1) or sorted(indices) != sorted(out):
        return
    if any(len(set(part)) < len(part) for part in (left, right, out)):
        return
    call = program.edit.call
    with program.edit.before(node):
        first = call(aten.permute.default, operands[0], [left.index(i) for i in [*batch, *rows, *summed]])
        second = call(
            aten.permute.default, operands[1], [right.index(i) for i in [*batch, *summed, *columns]]
        )
        product = call(aten.matmul.default, first, second)
        new = call(aten.permute.default, product, [indices.index(i) for i in out])
    if same_value(node.meta["val"], new.meta["val"]):
        program.edit.replace(node, new, record=False)
        for permuted in (new, second, first):
            merge_permutes(program, permuted)
    else:
        program.edit.erase_dead([new])


def _matrix(program: Program, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node in depends_on_weights_alone(program)
        and node.meta["val"].dim() == 2
        and node.meta["val"].dtype.is_floating_point
    )


def _product(program: Program, node: fx.Node) -> None:
    bias: fx.Node | None = None
    if operator_name(node.target) == "aten.addmm":
        bias_node, x, matrix = node.args
        if argument(node, "beta") != 1 or argument(node, "alpha") != 1 or not isinstance(bias_node, fx.Node):
            return
        if bias_node not in depends_on_weights_alone(program) or bias_node.meta["val"].dim() != 1:
            return
        bias = bias_node
    else:
        x, matrix = node.args[:2]
    if not _matrix(program, matrix) or not isinstance(x, fx.Node) or x in depends_on_weights_alone(program):
        return
    if x.meta["val"].dim() < 1 or x.meta["val"].dtype != matrix.meta["val"].dtype:  # type: ignore[union-attr]
        return
    assert isinstance(matrix, fx.Node)
    with program.edit.before(node):
        if is_operator(matrix, "aten.permute") and list(matrix.args[1]) == [1, 0]:  # type: ignore[arg-type]
            weight: Any = matrix.args[0]
        else:
            weight = program.edit.call(aten.permute.default, matrix, [1, 0])
        new = program.edit.call(aten.linear.default, x, weight, bias)
    program.edit.replace(node, new, record=False)


def _bias(program: Program, node: fx.Node) -> None:
    if len(node.args) != 2 or node.kwargs:
        return
    first, second = node.args
    for linear, bias in ((first, second), (second, first)):
        if not is_operator(linear, "aten.linear") or not isinstance(bias, fx.Node):
            continue
        assert isinstance(linear, fx.Node)
        if len(linear.args) > 2 or len(linear.users) != 1 or bias not in depends_on_weights_alone(program):
            continue
        value = bias.meta["val"]
        if (
            value.dim() != 1
            or not same_size(value.shape[0], linear.meta["val"].shape[-1])
            or value.dtype != linear.meta["val"].dtype
        ):
            continue
        with program.edit.before(node):
            new = program.edit.call(aten.linear.default, linear.args[0], linear.args[1], bias)
        program.edit.replace(node, new, record=False)
        return


def _unflatten(program: Program, node: fx.Node) -> None:
    """Replace ``reshape(linear(reshape(x, [-1, n])), [..., m])`` by ``linear(x)``."""
    linear = node.args[0]
    if not is_operator(linear, "aten.linear") or len(linear.users) != 1:  # type: ignore[union-attr]
        return
    assert isinstance(linear, fx.Node)
    flat = linear.args[0]
    if not is_operator(flat, "aten.reshape"):
        return
    assert isinstance(flat, fx.Node)
    x = flat.args[0]
    assert isinstance(x, fx.Node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if len(before) != len(after) or not all(
        same_size(a, b) for a, b in zip(before[:-1], after[:-1], strict=True)
    ):
        return
    if not same_size(before[-1], flat.meta["val"].shape[-1]) or not same_size(
        after[-1], linear.meta["val"].shape[-1]
    ):
        return
    with program.edit.before(node):
        new = program.edit.call(aten.linear.default, x, *linear.args[1:])
    if same_value(new.meta["val"], node.meta["val"]):
        program.edit.replace(node, new, record=False)
    else:
        program.graph.erase_node(new)


def _layer_norm(program: Program, node: fx.Node) -> None:
    """Replace a ``native_layer_norm`` of which only the first result is read by ``layer_norm``."""
    if any(user.args[1] != 0 for user in node.users):
        return
    x, shape, weight, bias, eps = node.args
    for user in list(node.users):
        with program.edit.before(user):
            new = program.edit.call(aten.layer_norm.default, x, shape, weight, bias, eps)
        program.edit.replace(user, new, record=False)
