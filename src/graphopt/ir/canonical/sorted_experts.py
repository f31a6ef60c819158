"""Recognition of MoE layers that sort tokens by expert and give each expert a slice of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_shape, same_size
from ..operators.traits import Trait, has
from ..rewriting.cleanup import replace_or_erase
from ..running.activation import activation_of_experts
from ..running.fold import depends_on_weights_alone
from ..running.region import evaluated
from ..schema import arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class _Projection:
    """One product per expert: rows, split by the number of tokens of each, with matrices (experts, out, in)."""

    rows: fx.Node
    counts: tuple[Any, ...]
    weight: fx.Node
    result: fx.Node


def raise_sorted_experts(program: Program) -> list[str]:
    """Replace two projections per expert, as in JetMoE, by one operator; return what was not recognised."""
    unrecognised: list[str] = []
    constant = depends_on_weights_alone(program)
    projections = [p for n in program.graph.nodes if (p := _projection(n, constant)) is not None]
    for up in projections:
        for down in projections:
            if up is down or up.counts != down.counts or up.result._erased or down.result._erased:
                continue
            gate = activation_of_experts(up.result, down.rows)
            # projections with something else between them, such as attention, are not a feed-forward
            if gate is not None:
                reason = _recognise(program, up, down, gate)
                if reason:
                    unrecognised.append(f"{up.result.name}: {reason}")
    return unrecognised


def _projection(node: fx.Node, constant: set[fx.Node]) -> _Projection | None:
    if not is_operator(node, "aten.cat") or arguments(node).get("dim", 0) != 0:
        return None
    parts = arguments(node)["tensors"]
    split = weight = None
    for expert, part in enumerate(parts):
        if not is_operator(part, "aten.linear") or arguments(part).get("bias") is not None:
            return None
        rows, matrix = part.args[:2]
        if not (
            is_operator(rows, "getitem") and rows.args[1] == expert and is_operator(matrix, "aten.select")
        ):
            return None
        if matrix.args[1:] != (0, expert) or matrix.args[0] not in constant:
            return None
        split, weight = split or rows.args[0], weight or matrix.args[0]
        if rows.args[0] is not split or matrix.args[0] is not weight:
            return None
    if split is None or weight is None or not is_operator(split, "aten.split_with_sizes"):
        return None
    args = arguments(split)
    if args.get("dim", 0) != 0 or not same_size(weight.meta["val"].shape[0], len(parts)):
        return None
    return _Projection(args["self"], tuple(args["split_sizes"]), weight, node)


def _recognise(program: Program, up: _Projection, down: _Projection, gate: dict[str, Any]) -> str:
    table = _count_vector(up.counts)
    if table is None:
        return "the split sizes are not the experts' numbers of tokens"
    end = _weighted_sum(down.result)
    if end is None or not is_operator(up.rows, "aten.index"):
        return "expert outputs are not weighted and added to their tokens"
    result, weights, order, token = end
    chosen = _sorted_table(order)
    indices = up.rows.args[1]
    if chosen is None or not isinstance(indices, (list, tuple)) or list(indices) != [token]:
        return "the tokens are not sorted by expert"
    k = chosen.meta["val"].shape[1]
    if not isinstance(k, int):
        return "the number of experts for each token varies"
    counted = evaluated(program, [table, order, token], [_scores_of(chosen)])
    if counted is None:
        return "the order depends on more than the router's scores"
    (counts, positions, tokens), (scores,) = counted
    experts = scores.topk(k, dim=1).indices.flatten()
    right = (
        torch.equal(counts.long(), experts.bincount(minlength=len(up.counts)))
        and torch.equal(experts[positions], experts.sort().values)
        and torch.equal(tokens, positions // k)
    )
    if not right or not same_shape(weights.meta["val"].shape, chosen.meta["val"].shape):
        return "the tokens are not sorted by expert"
    with program.edit.before(result):
        new = program.edit.call(
            torch.ops.graphopt.routed_ffn.default,
            up.rows.args[0],
            chosen,
            weights,
            up.weight,
            down.weight,
            **gate,
        )
    if not replace_or_erase(program, result, new):
        return "the recognised operator has another type or shape"
    return ""


def _count_vector(counts: tuple[Any, ...]) -> fx.Node | None:
    """Return the vector whose elements, in order, are the counts; None if there is none."""
    table = None
    for position, count in enumerate(counts):
        element = count.args[0] if is_operator(count, "aten.item") else None
        if not is_operator(element, "getitem") or element.args[1] != position:  # type: ignore[union-attr]
            return None
        unbound = element.args[0]  # type: ignore[union-attr]
        if not is_operator(unbound, "aten.unbind") or table not in (None, unbound.args[0]):
            return None
        table = unbound.args[0]
    return table if isinstance(table, fx.Node) else None


def _weighted_sum(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Match ``zeros.index_add(0, token, out * weights.flatten()[order][:, None])``.

    Returns:
        Its result, weights (tokens, k), the order, and the token of each position; None for anything else.
    """
    if len(node.users) != 1:
        return None
    product = next(iter(node.users))
    factor = next((a for a in product.args if a is not node), None)
    if not is_operator(product, "aten.mul") or len(product.users) != 1:
        return None
    while has(factor, Trait.RESHAPE):
        factor = factor.args[0]  # type: ignore[union-attr]
    if not is_operator(factor, "aten.index"):
        return None
    flat, indices = factor.args[:2]  # type: ignore[union-attr]
    if not is_operator(flat, "aten.reshape") or not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    result = next(iter(product.users))
    args = arguments(result) if is_operator(result, "aten.index_add") else {}
    if args.get("source") is not product or args.get("dim") != 0 or args.get("alpha", 1) != 1:
        return None
    if not is_operator(args["self"], "aten.zeros"):
        return None
    weights = flat.args[0]  # type: ignore[union-attr]
    return result, weights, indices[0], args["index"]  # type: ignore[return-value]


def _sorted_table(order: Any) -> fx.Node | None:
    """Return the (tokens, k) expert indices that an order sorts."""
    if not (is_operator(order, "getitem") and order.args[1] == 1 and is_operator(order.args[0], "aten.sort")):
        return None
    flat = order.args[0].args[0]
    table = flat.args[0] if is_operator(flat, "aten.reshape") else None
    top = table.args[0] if is_operator(table, "getitem") and table.args[1] == 1 else None  # type: ignore[union-attr]
    return table if is_operator(top, "aten.topk") and table.meta["val"].dim() == 2 else None  # type: ignore[union-attr]


def _scores_of(chosen: fx.Node) -> fx.Node:
    return arguments(chosen.args[0])["self"]  # type: ignore[arg-type, no-any-return]
