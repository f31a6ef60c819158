"""Recognition of attention scores: the product of queries and keys, and the operators between it and the softmax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_shape, same_size
from ..operators.traits import Trait, has
from ..running.fold import depends_on_weights_alone
from ..schema import argument, arguments, is_operator
from .constants import constant

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten
_PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm")
# scores this low have no weight after a softmax
_HIDDEN = -1e4


@dataclass
class Scores:
    """Scores as attention's arguments: ``softcap(scale * q @ k^T) + added``."""

    q: fx.Node
    k: fx.Node
    scale: float
    added: list[tuple[fx.Node, float]] = field(default_factory=list)
    """What is added to the scores, with a factor."""
    softcap: float | None = None
    causal: bool = False
    four_dimensional: fx.Node | None = None
    sinks: fx.Node | None = None


def peel(program: Program, softmax: fx.Node) -> Scores | str:
    """Return the scores that a softmax reads, or why they are not those of an attention.

    Additions, scalings, masks, caps, casts and reshapes are peeled off one by one until the product of two
    values is reached.
    """
    node = softmax.args[0]
    added: list[tuple[fx.Node, float]] = []
    sinks: fx.Node | None = None
    factor = 1.0
    capped: float | None = None
    shaped: fx.Node | None = None
    for _ in range(32):
        if not isinstance(node, fx.Node):
            return ""
        if node.meta["val"].dim() == 4:
            shaped = node
        if is_operator(node, *_PRODUCTS):
            scores = _product(program, node, added, factor, capped, shaped)
            if isinstance(scores, Scores):
                scores.sinks = sinks
            return scores
        if is_operator(node, "aten.cat") and sinks is None and factor == 1.0 and capped is None:
            scores_and_sinks = _sinks(program, node)
            if scores_and_sinks is None:
                return ""
            node, sinks, lower = scores_and_sinks
            if lower is not None:
                added.append((lower, 1.0))
            continue
        step = _step(program, node)
        if step is None:
            return ""
        node, kind, value = step
        if kind == "add":
            if capped is not None:
                return "a bias is added before the scores are capped"
            added.append((value, factor))
        elif kind == "shift":
            if capped is not None or sinks is not None:
                return "scores are shifted before they are capped or joined with sinks"
        elif kind == "scale":
            factor *= value
        elif kind == "cap":
            if factor != 1.0:
                return "scores are scaled after they are capped"
            capped = value
    return ""


def _sinks(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return scores, sinks and what is added to the scores of ``cat([scores, sinks])``; None for other joins.

    Sinks are a vector with a value per head. Where each token has its own, that value is subtracted from all scores of
    the token instead, next to a sink of zero: the weights are the same.
    """
    parts = node.args[0]
    if argument(node, "dim") not in (-1, 3) or not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    scores, column = parts
    if not isinstance(column, fx.Node) or not isinstance(scores, fx.Node):
        return None
    own = column
    while has(column, Trait.RESHAPE | Trait.REPEAT | Trait.CAST):
        inner = column.args[0]
        assert isinstance(inner, fx.Node)
        column = inner
    heads = scores.meta["val"].shape[1]
    if column in depends_on_weights_alone(program):
        fits = column.meta["val"].dim() == 1 and same_size(column.meta["val"].shape[0], heads)
        return (scores, column, None) if fits else None
    of_tokens = own.meta["val"].dim() == 4 and isinstance(heads, int)
    if not of_tokens or not same_shape(own.meta["val"].shape, [*scores.meta["val"].shape[:3], 1]):
        return None
    none = torch.zeros(heads, dtype=own.meta["val"].dtype)
    zeros = program.edit.add_weight(f"sinks_of_{node.name}", none, kind="constant", persistent=False)
    with program.edit.before(node):
        return scores, zeros, program.edit.call(aten.neg.default, own)


def scaled_by_sinks(program: Program, output: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the product of an attention's output with ``sigmoid(logsumexp(scores) - sinks)``, and the sinks.

    One more score in the softmax, whose value counts nothing, scales all others by that much.
    """
    users = list(output.users)
    if len(users) != 1 or not is_operator(users[0], "aten.mul"):
        return None
    others = [n for n in users[0].all_input_nodes if n is not output]
    gate = _uncovered(others[0]) if len(others) == 1 else None
    if gate is None or not is_operator(gate, "aten.sigmoid"):
        return None
    difference = _uncovered(gate.args[0])
    if difference is None or not is_operator(difference, "aten.sub") or argument(difference, "alpha") != 1:
        return None
    total, sinks = (_uncovered(n) for n in difference.args[:2])
    if total is None or sinks is None or not is_operator(total, "aten.logsumexp"):
        return None
    rank = output.meta["val"].dim()
    dims = [int(d) % rank for d in argument(total, "dim")]
    weights = _uncovered(output.args[0])
    softmax = weights if weights is not None and has(weights, Trait.SOFTMAX) else None
    if (
        softmax is None
        or rank != 4
        or dims != [3]
        or _uncovered(softmax.args[0]) is not _uncovered(total.args[0])
    ):
        return None
    fits = sinks.meta["val"].dim() == 1 and same_size(sinks.meta["val"].shape[0], output.meta["val"].shape[1])
    return (users[0], sinks) if fits and sinks in depends_on_weights_alone(program) else None


def _uncovered(node: Any) -> fx.Node | None:
    """Return what a value holds under another shape or type."""
    while isinstance(node, fx.Node) and (
        has(node, Trait.RESHAPE | Trait.REPEAT | Trait.CAST | Trait.IDENTITY)
        or is_operator(node, "aten.dropout")
    ):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _step(program: Program, node: fx.Node) -> tuple[Any, str, Any] | None:
    if has(node, Trait.RESHAPE | Trait.CAST):
        return node.args[0], "", None
    if is_operator(node, "aten.sub") and argument(node, "alpha") == 1:
        if _own_maximum(node):
            # softmax does not change when a constant is subtracted from a row
            return node.args[0], "shift", None
        first, second = node.args[:2]
        if isinstance(second, fx.Node) and _leads_to_product(first):
            with program.edit.before(node):
                return first, "add", program.edit.call(aten.neg.default, second)
        return None
    if is_operator(node, "aten.maximum", "aten.clamp"):
        # a lower bound that keeps a sum of masks finite
        floor = node.args[1] if is_operator(node, "aten.maximum") else argument(node, "min")
        low = constant(program, floor)
        above = is_operator(node, "aten.clamp") and argument(node, "max") is not None
        return None if low is None or low > _HIDDEN or above else (node.args[0], "", None)
    if is_operator(node, "aten.add") and argument(node, "alpha") == 1:
        return _product_with_mask(program, node) or _sum(node)
    if is_operator(node, "aten.mul", "aten.div"):
        value = constant(program, node.args[1])
        if value is not None and is_operator(node, "aten.mul"):
            cap = _cap(program, node, value)
            if cap is not None:
                return cap, "cap", value
        if value is not None:
            return node.args[0], "scale", value if is_operator(node, "aten.mul") else 1.0 / value
        return None
    if is_operator(node, "aten.masked_fill", "aten.where"):
        return _choice(program, node)
    return None


def _sum(node: fx.Node) -> tuple[Any, str, Any] | None:
    first, second = node.args[:2]
    if not isinstance(second, fx.Node) or not isinstance(first, fx.Node):
        return None
    for deep in (False, True):
        # a bias may come from a product too, so the operand with the shorter path to a product is the scores
        if _leads_to_product(first, deep):
            return first, "add", second
        if _leads_to_product(second, deep):
            return second, "add", first
    return None


def _choice(program: Program, node: fx.Node) -> tuple[Any, str, Any] | None:
    """Return the peeling step for scores of which some are replaced by a number that hides them; None otherwise."""
    args = arguments(node)
    if is_operator(node, "aten.masked_fill"):
        scores, hidden, value = args["self"], args["mask"], args["value"]
    elif constant(program, args["self"]) is not None:
        scores, hidden, value = args["other"], args["condition"], args["self"]
    else:
        scores, hidden, value = args["self"], None, args["other"]
    low = constant(program, value)
    if low is None or low > _HIDDEN or not isinstance(scores, fx.Node):
        return None
    if hidden is None:
        return scores, "add", args["condition"]
    while is_operator(hidden, "aten.expand", "aten.expand_as") and hidden.args[0].meta["val"].dim() == 4:
        hidden = hidden.args[0]  # it is broadcast in any case, and the scores' shape says nothing about it
    if not isinstance(hidden, fx.Node):
        return None
    with program.edit.before(node):
        return scores, "add", program.edit.call(aten.bitwise_not.default, hidden)


def _product_with_mask(program: Program, node: fx.Node) -> tuple[Any, str, Any] | None:
    """Return the peeling step of ``scores * seen + low * (1 - seen)``, where ``seen`` is one or zero; None otherwise.

    A score that is hidden becomes ``low`` instead of one that lies ``low`` below the others, which a softmax cannot
    tell apart.
    """
    first, second = node.args[:2]
    if not is_operator(first, "aten.mul") or not is_operator(second, "aten.mul"):
        return None
    scores, seen = first.args[:2]  # type: ignore[union-attr]
    opposite, low = second.args[0], constant(program, second.args[1])  # type: ignore[union-attr]
    if low is None or low > _HIDDEN or not isinstance(seen, fx.Node) or not isinstance(opposite, fx.Node):
        return None
    if is_operator(opposite, "aten.rsub"):
        one, taken = argument(opposite, "other"), opposite.args[0]
    elif is_operator(opposite, "aten.sub"):
        one, taken = opposite.args[0], opposite.args[1]
    else:
        return None
    if taken is not seen or argument(opposite, "alpha") != 1 or constant(program, one) != 1.0:
        return None
    if not _zero_or_one(program, seen):
        return None
    with program.edit.before(node):
        return scores, "add", program.edit.call(aten.to.dtype, seen, torch.bool)


def _zero_or_one(program: Program, node: fx.Node) -> bool:
    """Tell whether a value is cut out of a table that is zero or one everywhere."""
    while has(node, Trait.RESHAPE | Trait.CAST) or is_operator(node, "aten.slice", "aten.select"):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    weight = program.weights.get(node.name)
    if weight is None or weight.trainable:
        return False
    table = weight.source.load()
    return bool(((table == 0) | (table == 1)).all())


def _own_maximum(node: fx.Node) -> bool:
    """Tell whether the maximum of the scores is subtracted from them, one value per row."""
    subtracted: Any = node.args[1]
    other = subtracted
    if is_operator(other, "getitem") and other.args[1] == 0:
        other = other.args[0]
    if not is_operator(other, "aten.amax", "aten.max") or other.args[0] is not node.args[0]:
        return False
    shape = subtracted.meta["val"].shape
    return not shape or same_size(shape[-1], 1)


def _cap(program: Program, node: fx.Node, value: float) -> fx.Node | None:
    """Return the scores of ``value * tanh(scores / value)``; None otherwise."""
    tanh = node.args[0]
    if not is_operator(tanh, "aten.tanh"):
        return None
    inner = tanh.args[0]  # type: ignore[union-attr]
    if is_operator(inner, "aten.div") and constant(program, inner.args[1]) == value:  # type: ignore[union-attr]
        source = inner.args[0]  # type: ignore[union-attr]
        return source if isinstance(source, fx.Node) else None
    return None


def _leads_to_product(start: Any, deep: bool = False) -> bool:
    """Tell whether a value comes from a product through operators that :func:`peel` removes.

    Args:
        start: the value.
        deep: also follow the second operands of additions and both branches of ``where``.
    """
    work = [start]
    for _ in range(32):
        if not work:
            return False
        node = work.pop()
        if is_operator(node, *_PRODUCTS):
            return True
        if is_operator(node, "aten.where"):
            args = arguments(node)
            work.extend([args["other"], args["self"]] if deep else [args["self"]])
        elif is_operator(node, "aten.add") and deep:
            work.extend([node.args[1], node.args[0]])
        elif has(node, Trait.RESHAPE | Trait.CAST) or is_operator(
            node, "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.masked_fill", "aten.tanh",
            "aten.maximum", "aten.clamp",
        ):  # fmt: skip
            work.append(node.args[0])
    return False


def _product(
    program: Program,
    node: fx.Node,
    added: list[tuple[fx.Node, float]],
    factor: float,
    capped: float | None,
    shaped: fx.Node | None,
) -> Scores | str:
    if is_operator(node, "aten.baddbmm"):
        args = arguments(node)
        q, transposed = args["batch1"], args["batch2"]
        beta, alpha = args["beta"], args["alpha"]
        added = [*added, (args["self"], factor * float(beta))]
        factor *= float(alpha)
    else:
        q, transposed = node.args[:2]
    while is_operator(transposed, "aten.mul", "aten.div"):
        # DeBERTa scales the keys instead of the scores
        value = constant(program, transposed.args[1])
        if value is None:
            break
        factor *= value if is_operator(transposed, "aten.mul") else 1.0 / value
        transposed = transposed.args[0]
    if not is_operator(transposed, "aten.permute"):
        return "the second operand of the scores is not a transpose"
    assert isinstance(transposed, fx.Node)
    assert isinstance(q, fx.Node)
    k, order = transposed.args[0], [int(d) for d in transposed.args[1]]  # type: ignore[union-attr, arg-type]
    assert isinstance(k, fx.Node)
    rank = len(order)
    plain = [*range(rank - 2), rank - 1, rank - 2]
    if order != plain:
        with program.edit.before(node):
            # fold the swap of the last two dimensions out of a longer permutation
            k = program.edit.call(aten.permute.default, k, [*order[:-2], order[-1], order[-2]])
    if q.meta["val"].dim() not in (3, 4) or not same_size(q.meta["val"].shape[-1], k.meta["val"].shape[-1]):
        return "queries and keys have unsupported ranks or different sizes"
    return Scores(q, k, factor, added, capped, False, shaped)
