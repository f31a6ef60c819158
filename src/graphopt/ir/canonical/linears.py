"""Rewriting of products with weights as linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_size
from ..rewriting.cleanup import merge_permutes, replace_or_erase
from ..rewriting.match import Match, find
from ..rewriting.pattern import Wild, call
from ..running.fold import depends_on_weights_alone
from ..schema import argument, is_operator

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


def raise_linears(program: Program) -> None:
    """Rewrite ``x @ w``, ``x @ w.T``, ``mm``, ``addmm`` and an added bias as linears, and unflatten them."""
    for node in list(program.graph.nodes):
        if is_operator(node, "aten.einsum"):
            _einsum(program, node)
    # rewriting makes nothing else constant that is looked at afterwards
    constant = depends_on_weights_alone(program)
    for node in list(program.graph.nodes):
        if not node._erased and is_operator(node, "aten.matmul", "aten.mm", "aten.addmm"):
            _product(program, node, constant)
    for match in find(program.graph, call("add")(call("linear")(Wild("x"), Wild("weight")), Wild("bias"))):
        _add_bias(program, match, constant)
    flat = call("reshape", name="flat", shared=True)(Wild("x"), Wild("rows"))
    linear = call("linear", name="linear")(flat, Wild("weight"), Wild("bias"))
    for match in find(program.graph, call("reshape")(linear, Wild("shape"))):
        _unflatten(program, match)
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
    emit = program.edit.call
    with program.edit.before(node):
        first = emit(aten.permute.default, operands[0], [left.index(i) for i in [*batch, *rows, *summed]])
        second = emit(
            aten.permute.default, operands[1], [right.index(i) for i in [*batch, *summed, *columns]]
        )
        product = emit(aten.matmul.default, first, second)
        new = emit(aten.permute.default, product, [indices.index(i) for i in out])
    if replace_or_erase(program, node, new):
        for permuted in (new, second, first):
            merge_permutes(program, permuted)


def _product(program: Program, node: fx.Node, constant: set[fx.Node]) -> None:
    """Replace a product with a matrix that no input changes by a linear."""
    bias: Any = None
    if is_operator(node, "aten.addmm"):
        bias, x, matrix = node.args
        if argument(node, "beta") != 1 or argument(node, "alpha") != 1:
            return
        if bias not in constant or bias.meta["val"].dim() != 1:
            return
    else:
        x, matrix = node.args[:2]
    if (
        not isinstance(matrix, fx.Node)
        or matrix not in constant
        or not isinstance(x, fx.Node)
        or x in constant
    ):
        return
    value, weight_value = x.meta["val"], matrix.meta["val"]
    if weight_value.dim() != 2 or not weight_value.dtype.is_floating_point:
        return
    if value.dim() < 1 or value.dtype != weight_value.dtype:
        return
    with program.edit.before(node):
        if is_operator(matrix, "aten.permute") and list(matrix.args[1]) == [1, 0]:  # type: ignore[arg-type]
            weight: Any = matrix.args[0]
        else:
            weight = program.edit.call(aten.permute.default, matrix, [1, 0])
        new = program.edit.call(aten.linear.default, x, weight, bias)
    program.edit.replace(node, new, record=False)


def _add_bias(program: Program, match: Match, constant: set[fx.Node]) -> None:
    """Replace ``linear(x, weight) + bias`` by ``linear(x, weight, bias)``."""
    node, bias = match.roots[0], match["bias"]
    if bias not in constant:
        return
    value, result = bias.meta["val"], node.meta["val"]
    if value.dim() == 1 and same_size(value.shape[0], result.shape[-1]) and value.dtype == result.dtype:
        with program.edit.before(node):
            new = program.edit.call(aten.linear.default, match["x"], match["weight"], bias)
        program.edit.replace(node, new, record=False)


def _unflatten(program: Program, match: Match) -> None:
    """Replace ``reshape(linear(reshape(x, [-1, n])), [..., m])`` by ``linear(x)``."""
    node, x = match.roots[0], match["x"]
    flat, product = (match[name].meta["val"].shape for name in ("flat", "linear"))
    before, after = x.meta["val"].shape, node.meta["val"].shape
    pairs = [*zip(before[:-1], after[:-1], strict=False), (before[-1], flat[-1]), (after[-1], product[-1])]
    if len(before) == len(after) and all(same_size(*pair) for pair in pairs):
        with program.edit.before(node):
            new = program.edit.call(aten.linear.default, x, match["weight"], match["bias"])
        replace_or_erase(program, node, new)


def _layer_norm(program: Program, node: fx.Node) -> None:
    """Replace a ``native_layer_norm`` of which only the first result is read by ``layer_norm``."""
    if any(user.args[1] != 0 for user in node.users):
        return
    x, shape, weight, bias, eps = node.args
    for user in list(node.users):
        with program.edit.before(user):
            new = program.edit.call(aten.layer_norm.default, x, shape, weight, bias, eps)
        program.edit.replace(user, new, record=False)
