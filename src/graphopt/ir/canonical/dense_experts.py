"""Recognition of MoE layers that run every expert on every token, with scores of zero for unchosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..operators.traits import Trait, has
from ..rewriting.cleanup import replace_or_erase
from ..running.activation import activation_of_experts
from ..running.fold import depends_on_weights_alone
from ..running.region import evaluated
from ..schema import arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program


def raise_dense_experts(program: Program) -> list[str]:
    """Replace ``sum over experts of f(score * x)``, as in Llama 4, by one operator; return what was not recognised.

    Experts have no biases, so an expert with a score of 0 returns 0, and only chosen experts need to be computed.
    """
    unrecognised: list[str] = []
    constant = depends_on_weights_alone(program)

    def stacked(node: Any) -> bool:
        return (
            is_operator(node, "aten.bmm")
            and node.args[1] in constant
            and node.args[0] not in constant
            and isinstance(node.args[0], fx.Node)
        )

    for up in [n for n in program.graph.nodes if stacked(n)]:
        down = next((n for n in _downstream(up) if stacked(n)), None)
        total = (
            None if down is None else next((n for n in _downstream(down) if is_operator(n, "aten.sum")), None)
        )
        scored = _scores(up.args[0])
        if down is None or total is None or scored is None:
            continue
        reason = _recognise(program, up, down, total, *scored)
        if reason:
            unrecognised.append(f"{up.name}: {reason}")
    return unrecognised


def _downstream(node: fx.Node, limit: int = 12) -> list[fx.Node]:
    reached: dict[fx.Node, None] = {}
    work = list(node.users)
    while work and len(reached) < limit:
        current = work.pop(0)
        if current not in reached:
            reached[current] = None
            work.extend(current.users)
    return list(reached)


def _recognise(
    program: Program,
    up: fx.Node,
    down: fx.Node,
    total: fx.Node,
    rows: fx.Node,
    scores: fx.Node,
    chosen: fx.Node,
) -> str:
    inputs, weighed = _inputs(program, up.args[0], rows, scores, chosen)
    if inputs is None or not torch.equal(inputs, weighed):
        return "the experts' inputs are not tokens times scores, with 0 for experts that are not chosen"
    gate = activation_of_experts(up, down.args[0])  # type: ignore[arg-type]
    if gate is None:
        return "an activation that graphopt.routed_ffn does not know"
    if not _sums(program, down, total):
        return "expert outputs are not summed"
    with program.edit.before(total):
        weights = program.edit.call(torch.ops.aten.gather.default, scores, 1, chosen)
        new = program.edit.call(
            torch.ops.graphopt.routed_ffn.default,
            rows, chosen, weights, up.args[1], down.args[1],
            transposed=True, weigh_inputs=True, **gate,
        )  # fmt: skip
    if not replace_or_erase(program, total, new):
        return "the recognised operator has another type or shape"
    return ""


def _scores(inputs: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return tokens (tokens, size), scores (tokens, experts) and indices of chosen experts (tokens, k), if found."""
    while has(inputs, Trait.RESHAPE | Trait.CAST):
        inputs = inputs.args[0]
    if not is_operator(inputs, "aten.mul"):
        return None
    rows = scores = None
    for factor in inputs.args:
        source = factor
        while has(source, Trait.RESHAPE | Trait.REORDER | Trait.CAST):
            source = source.args[0]
        if has(source, Trait.REPEAT) or is_operator(source, "aten.repeat"):
            rows = source.args[0]
        else:
            scores = source
    if not (isinstance(rows, fx.Node) and isinstance(scores, fx.Node)):
        return None
    node: Any = scores
    for _ in range(6):
        if is_operator(node, "aten.scatter"):
            chosen = arguments(node)["index"]
            if is_operator(chosen, "getitem") and is_operator(chosen.args[0], "aten.topk"):
                return rows, scores, chosen
            return None
        node = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return None


def _inputs(
    program: Program, inputs: Any, rows: fx.Node, scores: fx.Node, chosen: fx.Node
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the actual and the expected inputs of the experts, evaluated on random tokens and logits."""
    logits = arguments(chosen.args[0])["self"]  # type: ignore[arg-type]
    evaluation = evaluated(program, [inputs, scores, chosen], [rows, logits])
    if evaluation is None:
        return None, torch.empty(0)
    (actual, table, numbers), (tokens, _) = evaluation
    chosen_scores = torch.zeros_like(table).scatter(1, numbers, table.gather(1, numbers))
    return actual, chosen_scores.T.unsqueeze(-1) * tokens


def _sums(program: Program, down: fx.Node, total: fx.Node) -> bool:
    evaluation = evaluated(program, [total], [down])
    if evaluation is None:
        return False
    (result,), (outputs,) = evaluation
    expected = outputs.sum(0)
    return result.shape == expected.shape and bool(torch.allclose(result, expected, rtol=1e-12, atol=1e-12))
