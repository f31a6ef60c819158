"""Recognition of MoE layers that add the results of one expert after the other, 0 for tokens that did not choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_size
from ..operators.traits import Trait, has
from ..rewriting.cleanup import replace_or_erase
from ..running.activation import activation_between, activation_of_experts
from ..running.fold import depends_on_weights_alone
from ..schema import arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class _Term:
    """What one expert adds: rows times factors, where it was chosen.

    Attributes:
        table: of choices, (experts, k, tokens).
        weights: (tokens, k).
        rows: (tokens, size), what the expert returns for every token.
    """

    table: fx.Node
    weights: fx.Node
    rows: fx.Node


@dataclass(frozen=True)
class _Expert:
    """The projections of an expert: the first reads tokens, gate and up apart or in one."""

    up: tuple[fx.Node, ...]
    down: fx.Node
    activation: dict[str, Any]


def recognise_looped_experts(program: Program) -> list[str]:
    """Replace ``0 + where(chosen, expert(x) * weight, 0) + ...`` by one operator; return what was not recognised.

    Experts that return their inputs, as in LongCat Flash, are a product of their own.
    """
    unrecognised: list[str] = []
    constant = depends_on_weights_alone(program)
    for node in list(program.graph.nodes):
        if node._erased or any(_adds(user) and user.args[0] is node for user in node.users):
            continue
        terms = _terms(node)
        if terms:
            reason = _recognise(program, node, terms, constant)
            if reason:
                unrecognised.append(f"{node.name}: {reason}")
    return unrecognised


def _adds(node: Any) -> bool:
    return is_operator(node, "aten.add") and len(node.args) == 2 and is_operator(node.args[1], "aten.where")


def _terms(node: fx.Node) -> list[_Term]:
    """Return the terms of a sum that begins with zeros, of experts in order; empty if it is none."""
    terms: list[_Term] = []
    while _adds(node):
        term = _term(node.args[1])
        if term is None or (terms and len(node.users) > 1):
            return []
        terms.append(term)
        node = node.args[0]  # type: ignore[assignment]
    if not terms or not _is_zero(node):
        return []
    return terms[::-1]


def _is_zero(node: Any) -> bool:
    return is_operator(node, "aten.zeros_like", "aten.zeros")


def _term(node: Any) -> _Term | None:
    chosen, product, other = node.args
    if not (_is_zero(other) and is_operator(product, "aten.mul") and is_operator(chosen, "aten.unsqueeze")):
        return None
    more = chosen.args[0]
    count = more.args[0] if is_operator(more, "aten.gt") and more.args[1] == 0 else None
    if not is_operator(count, "aten.sum") or list(arguments(count)["dim"] or []) != [0]:  # type: ignore[arg-type]
        return None
    part = count.args[0]  # type: ignore[union-attr]
    rows, factor = product.args
    if not is_operator(factor, "aten.index") or not isinstance(rows, fx.Node):
        return None
    values, indices = factor.args
    if len(indices) != 2 or not is_operator(indices[0], "aten.arange") or len(indices[0].args) != 1:
        return None
    place = indices[1]
    if not is_operator(place, "aten.argmax") or place.args[0] is not part:
        return None
    if not is_operator(values, "aten.unsqueeze") or values.args[1] not in (2, -1):
        return None
    while has(part, Trait.RESHAPE) and part.meta["val"].dim() == 2:
        part = part.args[0]
    if not is_operator(part, "aten.select") or part.args[1] != 0:
        return None
    return _Term(part.args[0], values.args[0], rows)


def _choices(program: Program, table: fx.Node, weights: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return experts and weights, (tokens, k), from a table in which a token has an expert at most once."""
    if not is_operator(table, "aten.permute") or list(table.args[1]) != [2, 1, 0]:  # type: ignore[arg-type]
        return None
    ones = table.args[0]
    if is_operator(ones, "aten.one_hot"):
        experts: Any = ones.args[0]  # type: ignore[union-attr]
        source = experts.args[0] if is_operator(experts, "getitem") else None
        if is_operator(source, "aten.topk") or same_size(experts.meta["val"].shape[1], 1):
            return experts, weights
    if not same_size(table.meta["val"].shape[1], 1):
        return None
    # without a place in the capacity of its expert, a token has none
    call = program.edit.call
    experts = call(torch.ops.aten.argmax.default, ones, -1)
    any_expert = call(torch.ops.aten.sum.dim_IntList, ones, [-1])
    return experts, call(torch.ops.aten.mul.Tensor, weights, any_expert)


def _expert(rows: fx.Node, x: fx.Node, constant: set[fx.Node]) -> _Expert | None:
    if not is_operator(rows, "aten.linear") or rows.args[1] not in constant:
        return None
    hidden = rows.args[0]
    work, up = [hidden], dict[fx.Node, None]()
    while work and len(up) < 3:
        node = work.pop()
        if isinstance(node, fx.Node) and is_operator(node, "aten.linear"):
            if node.args[0] is not x or node.args[1] not in constant:
                return None
            up[node] = None
        elif isinstance(node, fx.Node):
            work.extend(node.all_input_nodes)
    first = tuple(up)
    if len(first) == 1:
        activation = activation_of_experts(first[0], hidden)  # type: ignore[arg-type]
        return None if activation is None else _Expert(first, rows, activation)
    if len(first) != 2:
        return None
    for gate, other in (first, first[::-1]):
        found = activation_between(other, gate, hidden)  # type: ignore[arg-type]
        if found is not None:
            return _Expert((gate, other), rows, {"gated": True, "interleaved": False, **found})
    return None


def _recognise(program: Program, total: fx.Node, terms: list[_Term], constant: set[fx.Node]) -> str:
    table, weights = terms[0].table, terms[0].weights
    if any(t.table is not table or t.weights is not weights for t in terms):
        return "its terms are not of one choice"
    x = _tokens(terms[0].rows, constant)
    if x is None:
        return "experts do not begin with a projection of the tokens"
    count = next((i for i, t in enumerate(terms) if t.rows is x), len(terms))
    experts = [_expert(t.rows, x, constant) for t in terms[:count]]
    if any(t.rows is not x for t in terms[count:]):
        return "experts that compute come after some that do not"
    found = [e for e in experts if e is not None]
    if len(found) < count or not count or any(e.activation != found[0].activation for e in found):
        return "an activation that graphopt.routed_ffn does not know"
    if any(len(e.up) != len(found[0].up) for e in found):
        return "experts differ"
    with program.edit.before(total):
        choices = _choices(program, table, weights)
        if choices is None:
            return "a token may choose an expert twice"
        call = program.edit.call
        chosen, factors = choices
        identity = None
        if count < len(terms):
            absent = call(torch.ops.aten.ge.Scalar, chosen, count)
            share = call(torch.ops.aten.mul.Tensor, factors, absent)
            identity = call(
                torch.ops.aten.mul.Tensor, x, call(torch.ops.aten.sum.dim_IntList, share, [-1], True)
            )
            factors = call(torch.ops.aten.mul.Tensor, factors, call(torch.ops.aten.lt.Scalar, chosen, count))
            chosen = call(torch.ops.aten.clamp.default, chosen, None, count - 1)
        parts = range(len(found[0].up))
        ups = [_stacked(program, [e.up[i].args[1] for e in found]) for i in parts]
        biases = [_stacked(program, [arguments(e.up[i]).get("bias") for e in found]) for i in parts]
        if (len(parts) == 2) and (biases[0] is None) != (biases[1] is None):
            return "gate and up projection differ in their biases"
        up = ups[0] if len(ups) == 1 else call(torch.ops.aten.cat.default, ups, 1)
        bias = (
            biases[0] if len(ups) == 1 or biases[0] is None else call(torch.ops.aten.cat.default, biases, 1)
        )
        new = call(
            torch.ops.graphopt.routed_ffn.default, x, chosen, factors, up,
            _stacked(program, [e.down.args[1] for e in found]), bias,
            _stacked(program, [arguments(e.down).get("bias") for e in found]), **found[0].activation,
        )  # fmt: skip
        if identity is not None:
            new = call(torch.ops.aten.add.Tensor, new, identity)
    if not replace_or_erase(program, total, new):
        return "the recognised operator has another type or shape"
    return ""


def _tokens(rows: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """Return what the first expert's first projection reads."""
    work: list[Any] = [rows.args[0]] if is_operator(rows, "aten.linear") else []
    seen: set[fx.Node] = set()
    while work and len(seen) < 30:
        node = work.pop(0)
        if is_operator(node, "aten.linear") and node.args[1] in constant:
            return node.args[0]  # type: ignore[no-any-return]
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            work.extend(node.all_input_nodes)
    return None


def _stacked(program: Program, matrices: list[Any]) -> Any:
    """Return the experts' matrices as one tensor: that which they are selected from, or a stack."""
    if all(m is None for m in matrices):
        return None
    call = program.edit.call
    if all(is_operator(m, "aten.permute") for m in matrices):
        whole = _stacked(program, [m.args[0] for m in matrices])
        return call(torch.ops.aten.permute.default, whole, [0, 2, 1])
    if all(is_operator(m, "aten.select") and m.args[1:] == (0, i) for i, m in enumerate(matrices)):
        whole = matrices[0].args[0]
        if all(m.args[0] is whole for m in matrices):
            count = whole.meta["val"].shape[0]
            if same_size(count, len(matrices)):
                return whole
            return call(torch.ops.aten.slice.Tensor, whole, 0, 0, len(matrices))
    return call(torch.ops.aten.stack.default, matrices)
