"""Recognition of MoE layers, written as gathered batched products, as ``graphopt.routed_ffn``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..facts import note_capture
from ..infer import same_size
from ..operators.traits import Trait, has
from ..rewriting.cleanup import replace_or_erase
from ..running.activation import activation_of_experts
from ..running.fold import depends_on_weights_alone
from ..schema import arguments, is_operator
from .dense_experts import recognise_dense_experts
from .looped_experts import recognise_looped_experts
from .sorted_experts import recognise_sorted_experts

if TYPE_CHECKING:
    from ..program import Program


def recognise_experts(program: Program) -> None:
    """Replace pairs of gathered products over the same experts by one operator."""
    unrecognised = [
        *recognise_dense_experts(program),
        *recognise_sorted_experts(program),
        *recognise_looped_experts(program),
    ]
    products = [p for n in program.graph.nodes if (p := _gathered(program, n)) is not None]
    for up in products:
        for down in products:
            if (
                up is not down
                and not down["node"]._erased
                and not up["node"]._erased
                and down["ids"] is up["ids"]
                and _reaches(up["node"], down["input"])
            ):
                reason = _recognise(program, up, down)
                if reason:
                    unrecognised.append(f"{up['node'].name}: {reason}")
    note_capture(program, plain_experts=tuple(unrecognised))


def _gathered(program: Program, node: fx.Node) -> dict[str, Any] | None:
    """Return the operands of a ``bmm`` of rows and matrices gathered by expert, with its bias; None otherwise."""
    if not is_operator(node, "aten.bmm"):
        return None
    for position, matrix in enumerate(node.args):
        transposed_view = False
        if is_operator(matrix, "aten.permute"):
            transposed_view, matrix = True, matrix.args[0]  # type: ignore[union-attr]
        gathered = _index_of(program, matrix)
        if gathered is None:
            continue
        weight, ids = gathered
        rows = node.args[1 - position]
        if not is_operator(rows, "aten.unsqueeze"):
            continue
        # w @ x keeps (out, in); x @ w keeps (in, out)
        transposed = (position == 1) != transposed_view
        result = node
        while len(result.users) == 1 and has(next(iter(result.users)), Trait.RESHAPE):
            result = next(iter(result.users))
        bias = None
        if len(result.users) == 1:
            user = next(iter(result.users))
            if is_operator(user, "aten.add"):
                other = next((a for a in user.args if a is not result), None)
                gathered_bias = _index_of(program, other)
                if gathered_bias is not None and gathered_bias[1] is ids:
                    bias, result = gathered_bias[0], user
        return {
            "node": node, "weight": weight, "ids": ids, "input": rows.args[0],  # type: ignore[union-attr]
            "transposed": transposed, "bias": bias, "result": result,
        }  # fmt: skip
    return None


def _index_of(program: Program, node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the weight and the expert indices of a selection of matrices or rows; None for anything else."""
    if is_operator(node, "aten.index"):
        weight, indices = node.args[:2]
        if isinstance(indices, (list, tuple)) and len(indices) == 1:
            ids = indices[0]
        else:
            return None
    elif is_operator(node, "aten.index_select") and node.args[1] == 0:
        weight, ids = node.args[0], node.args[2]
    else:
        return None
    if weight in depends_on_weights_alone(program) and isinstance(ids, fx.Node):
        return weight, ids
    return None


def _reaches(source: fx.Node, target: Any) -> bool:
    # breadth first: an activation is a few operators long
    work: list[Any] = [target]
    seen: set[fx.Node] = set()
    while work:
        node = work.pop(0)
        if node is source:
            return True
        if isinstance(node, fx.Node) and node not in seen and len(seen) < 80:
            seen.add(node)
            work.extend(node.all_input_nodes)
    return False


def _recognise(program: Program, up: dict[str, Any], down: dict[str, Any]) -> str:
    if up["transposed"] != down["transposed"]:
        return "the two projections are stored in different orders"
    gate = activation_of_experts(up["result"], down["input"])
    if gate is None:
        return "an activation that graphopt.routed_ffn does not know"
    rows, k = _repeated(up["input"])
    if rows is None:
        return "tokens are not repeated once per expert"
    ids = _flattened(up["ids"], k)
    if ids is None:
        return "expert indices are not a flattened (tokens, k) table"
    end = _combined(down["result"], k)
    if end is None:
        return "expert outputs are not weighted and summed per token"
    weights, result = end
    with program.edit.before(result):
        new = program.edit.call(
            torch.ops.graphopt.routed_ffn.default,
            rows, ids, weights, up["weight"], down["weight"], up["bias"], down["bias"],
            transposed=up["transposed"], **gate,
        )  # fmt: skip
    if not replace_or_erase(program, result, new):
        return "the recognised operator has another type or shape"
    return ""


def _repeated(node: Any) -> tuple[fx.Node | None, int]:
    if is_operator(node, "aten.repeat_interleave"):
        args = arguments(node)
        if isinstance(args.get("repeats"), int) and args.get("dim") == 0:
            return args["self"], int(args["repeats"])
    return None, 0


def _of_columns(table: fx.Node, k: int) -> bool:
    shape = table.meta["val"].shape
    return len(shape) == 2 and same_size(shape[1], k)


def _flattened(ids: fx.Node, k: int) -> fx.Node | None:
    if is_operator(ids, "aten.reshape"):
        table = ids.args[0]
        if isinstance(table, fx.Node) and _of_columns(table, k):
            return table
    return None


def _combined(node: fx.Node, k: int) -> tuple[fx.Node, fx.Node] | None:
    """Return weights and result of ``(out * weights[:, None]).view(tokens, k, size).sum(1)``; None otherwise."""
    if len(node.users) != 1:
        return None
    product = next(iter(node.users))
    if not is_operator(product, "aten.mul") or len(product.users) != 1:
        return None
    factor = next((a for a in product.args if a is not node), None)
    if not has(factor, Trait.RESHAPE):
        return None
    flat = factor.args[0]  # type: ignore[union-attr]
    table = flat.args[0] if is_operator(flat, "aten.reshape") else flat  # type: ignore[union-attr]
    if not isinstance(table, fx.Node) or not _of_columns(table, k):
        return None
    folded = next(iter(product.users))
    if not is_operator(folded, "aten.reshape") or len(folded.users) != 1:
        return None
    total = next(iter(folded.users))
    if not is_operator(total, "aten.sum") or list(arguments(total)["dim"] or []) != [1]:
        return None
    if len(total.users) == 1 and is_operator(next(iter(total.users)), "aten.to"):
        total = next(iter(total.users))
    return table, total
