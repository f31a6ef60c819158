"""Trains heads to predict the tokens after the next (Medusa, arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.errors import UsageError
from ...ir.facts import MultiTokenHeads
from ...ir.needs import NONZERO, Needs
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...ir.running.execute import interpret
from ...ir.vocabulary import kept_tokens, over_all_tokens
from .base import Batch, Method, Recipe, called, language_loss, masked_mean

OUTPUT = "multi_token_logits"
PREFIX = "multi_token_heads."
HEADS_COUNT: Needs = [{"joint": False}, {"joint_weight": NONZERO}]


@dataclass(frozen=True, kw_only=True)
class Medusa(Method):
    """Sum over heads k of ``decay^k`` times the cross-entropy of the token k + 2 positions ahead.

    Medusa-1 trains only the heads, with the model frozen. ``joint`` is Medusa-2: the model is trained with them,
    on its own loss plus ``joint_weight`` times the heads'. With ``targets=model`` heads learn what the model itself
    would predict there (soft targets from its own logits), which does not require text that it was trained on.
    """

    name = "medusa"
    paper = "arXiv 2401.10774"

    decay: float = option(
        0.8, help="weight of each further head", source="paper", low=0, high=1, needs=HEADS_COUNT
    )
    targets: str = option(
        "text", help="what heads learn to predict", choices=("text", "model"), needs=HEADS_COUNT
    )
    joint: bool = option(False, help="train the model as well (Medusa-2)")
    joint_weight: float = option(
        0.2, help="weight of the heads' loss", source="recalled", low=0, needs={"joint": True}
    )

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through attach-multi-token-heads."""
        if OUTPUT not in program.outputs:
            raise UsageError(
                "this program has no multi-token heads", hint="run the pass attach-multi-token-heads first"
            )

        if program.outputs[OUTPUT].meta["val"].shape[2] == 1:
            refuse_set(self.name, self, ("decay",), "this program has one head, which has weight 1")

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            outputs = called(module, batch)
            from_model = self.targets == "model"
            heads = head_loss(outputs[OUTPUT], outputs["logits"], batch, self.decay, from_model, tokens)
            return language_loss(outputs, batch) + self.joint_weight * heads if self.joint else heads

        tokens = kept_tokens(program, OUTPUT)
        names = {w.name for w in program.weights.values() if w.name.startswith(PREFIX)}
        return Recipe(
            self.name, loss, trainable=lambda name: self.joint or name in names, form=program, after=with_accuracy
        )  # fmt: skip


def with_accuracy(program: Program, batches: Sequence[Batch]) -> Program:
    """Return the program with the measured accuracy of each head, from which decoding builds its tree."""
    measured = program.copy()
    accuracy = tuple(map(tuple, head_accuracy(program, batches)))
    measured.facts.add(replace(program.facts[MultiTokenHeads], accuracy=accuracy))
    return measured


def head_accuracy(program: Program, batches: Sequence[Batch], ranks: int = 8) -> list[list[float]]:
    """Return (heads, ranks): how often the prediction of each rank is what the model itself predicts at that position.

    Each head is measured on its own, whether or not the heads before it were right, so a tree meets these rates only if
    depths are independent; they are measured against the model's own most likely tokens, not against the text.
    """
    right: torch.Tensor | None = None
    counted = 0.0
    for batch in batches:
        inputs = {n: batch[n] for n in program.signature.inputs if n in batch}
        outputs = over_all_tokens(program, interpret(program, program.bind((), inputs)))
        head_logits, predicted = outputs[OUTPUT], outputs["logits"].argmax(-1)
        heads = head_logits.shape[2]
        if predicted.shape[1] <= heads + 1:
            continue
        mask = batch.get("attention_mask", torch.ones_like(predicted)).bool()
        best = head_logits.topk(min(ranks, head_logits.shape[-1]), dim=-1).indices
        last = predicted.shape[1] - heads - 1
        counted_positions = mask[:, :last] & mask[:, heads + 1 :]
        hits = torch.stack(
            [
                (best[:, :last, k] == predicted[:, k + 1 : k + 1 + last, None])[counted_positions]
                .double()
                .sum(0)
                for k in range(heads)
            ]
        )
        right = hits if right is None else right + hits
        counted += float(counted_positions.sum())
    if right is None or not counted:
        raise UsageError("rows are too short to measure the heads on", hint="use longer rows of data")
    return [[round(float(x), 4) for x in row] for row in right / counted]


def head_loss(
    said: torch.Tensor,
    logits: torch.Tensor,
    batch: Batch,
    decay: float,
    from_model: bool = False,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the heads' loss.

    Args:
        said: (batch, sequence, heads, vocabulary), logits of the heads.
        logits: (batch, sequence, vocabulary), of the model.
        batch: with ``input_ids``; positions whose target is padding do not count.
        decay: weight of each further head.
        from_model: use the model's own distributions one position earlier as targets, instead of the text.
        tokens: the heads' vocabulary, ascending; other tokens are not used as targets, and the model's distribution is
            restricted to it.
    """
    ids = batch["input_ids"]
    counted = batch
    if tokens is not None:
        tokens = tokens.to(ids.device)
        logits = logits.index_select(-1, tokens)
        representable = torch.isin(ids, tokens)
        ids = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        if not from_model:
            mask = batch.get("loss_mask", torch.ones_like(ids))
            counted = {**batch, "loss_mask": mask * representable}
    total = said.new_zeros((), dtype=torch.float32)
    for head in range(said.shape[2]):
        ahead = head + 2
        if ids.shape[1] <= ahead:
            break
        predicted = said[:, :-ahead, head].float().transpose(1, 2)
        # the model's logits at a position predict the token after it
        target = (
            logits[:, ahead - 1 : -1].detach().float().softmax(-1).transpose(1, 2)
            if from_model
            else ids[:, ahead:]
        )
        losses = F.cross_entropy(predicted, target, reduction="none")
        total = total + decay**head * masked_mean(losses, counted, ahead=ahead)
    return total
