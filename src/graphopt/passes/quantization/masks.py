"""Values of additive masks: large enough to hide keys, and no larger than quantisation ranges allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...ir.operators.quantize import HIDDEN
from ...ir.program import Program
from ...ir.schema import arguments, is_operator
from ..framework.plan import Site
from .ranges import watch

if TYPE_CHECKING:
    from ...measure.context import Context

BEYOND = 20.0
"""Margin beyond the widest row of scores: hidden keys keep a weight of at most exp(-20)."""


def mask_sites(program: Program, context: Context) -> tuple[list[Site], list[str]]:
    """Return the sites that set each mask's value for hidden keys, and notes on values that were set explicitly.

    The magnitude is 1.25 times the widest row of scores in calibration (from highest to lowest, before masks), plus
    ``BEYOND``.

    Args:
        program: legalised, so that masks are operators of their own.
        context: with calibration data.
    """
    readers = {
        node: terms for node in program.nodes
        if is_operator(node, "graphopt.attention") and (terms := _masks_of(arguments(node)["bias"]))[0]
    }  # fmt: skip
    if not readers:
        return [], []
    spans = _spans(program, context, readers)
    sites, notes = [], []
    for mask in dict.fromkeys(mask for masks, _ in readers.values() for mask in masks):
        widest = max(spans.get(node, 0.0) for node, (masks, _) in readers.items() if mask in masks)
        hidden = float(arguments(mask)["hidden"])
        required = -(1.25 * widest + BEYOND)
        if hidden == HIDDEN:
            sites.append(Site(mask.name, what="mask", hidden=round(required, 3)))
        elif hidden > -(widest + BEYOND / 2):
            notes.append(
                f"{mask.name}: {hidden:g} is added to scores of hidden keys, and scores differ by up to {widest:.4g} in a "
                f"row: keys may be seen through it; leave hidden out of fit-target, or set it to {required:.4g}"
            )
    return sites, notes


def _masks_of(bias: fx.Node | None) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the masks among the terms of a bias, and the other terms."""
    masks: list[fx.Node] = []
    others: list[fx.Node] = []
    work = [bias] if bias is not None else []
    while work:
        node = work.pop()
        if is_operator(node, "graphopt.additive_mask"):
            masks.append(node)
        elif is_operator(node, "aten.add") and all(isinstance(a, fx.Node) for a in node.args):
            work.extend(node.all_input_nodes)
        else:
            others.append(node)
    return masks, others


def _spans(
    program: Program, context: Context, readers: dict[fx.Node, tuple[list[fx.Node], list[fx.Node]]]
) -> dict[fx.Node, float]:
    """Return the widest row of scores of each attention."""
    recorded: dict[fx.Node, Tensor] = {}
    for node, (_, others) in readers.items():
        call = arguments(node)
        recorded |= dict.fromkeys([call["q"], call["k"], *others], torch.empty(0))
    spans: dict[fx.Node, float] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if node in recorded:
            recorded[node] = value
        if node in readers:
            args = arguments(node)
            scores = _scores(recorded[args["q"]], recorded[args["k"]], args["scale"], args["softcap"])
            for other in readers[node][1]:
                scores = scores + recorded[other].float()
            widest = float((scores.amax(-1) - scores.amin(-1)).max())
            spans[node] = max(widest, spans.get(node, 0.0))

    watch(program, context, see, "observing scores")
    return spans


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    q, k = q.float(), k.float()
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
