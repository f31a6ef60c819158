"""Trains a draft to predict what its model predicts (after EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.errors import UsageError
from ...ir.needs import above
from ...ir.option import option
from ...ir.program import Program
from ...ir.vocabulary import kept_logits
from ..forms import with_features_as_input
from .base import Batch, Method, Recipe, called, masked_mean

PREFIX = "draft."


@dataclass(frozen=True, kw_only=True)
class Draft(Method):
    """Cross-entropy of the draft's prediction with the model's own distribution one position later; the model is frozen.

    In decoding, candidates after the first come from the draft's own hidden states, so the draft is trained on them as
    well: from the second step on, a ``share`` of the positions gets the previous step's hidden state of the previous
    position instead of the model's features (EAGLE-3's training-time test, at random positions instead of with a mask
    for each step). Each step is weighted by ``decay`` relative to the one before.

    ``noise`` perturbs the next token that the draft reads: with this probability it is replaced by another token of the
    batch, so that the draft does not rely on tokens alone.
    """

    name = "draft"
    paper = "arXiv 2503.01840"

    steps: int = option(
        2,
        help="number of steps, the first from the model's features, the others from the draft's own hidden states",
        low=1,
    )
    share: float = option(
        0.5,
        help="share of positions that read the draft's hidden states",
        low=0,
        high=1,
        needs={"steps": above(1)},
    )
    decay: float = option(
        0.8, help="weight of each further step", source="paper", low=0, high=1, needs={"steps": above(1)}
    )
    noise: float = option(0.0, help="probability that the draft reads a different token", low=0, high=1)

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through attach-draft."""
        if "draft_logits" not in program.outputs:
            raise UsageError("this program has no draft", hint="run the pass attach-draft first")
        features = program.outputs["draft_features"].meta["val"]
        size, dtype = int(features.shape[-1]), features.dtype

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            ids = batch["input_ids"]
            following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
            if self.noise:
                others = following.flatten()[torch.randint(following.numel(), following.shape)]
                following = torch.where(torch.rand(following.shape) < self.noise, others, following)
            use_supplied = torch.rand(self.steps - 1, *ids.shape, 1) < self.share
            use_supplied[:, :, 0] = False  # nothing comes before the first position
            return {**batch, "draft_ids": following, "taken": use_supplied}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            ids, total = batch["input_ids"], torch.zeros((), device=batch["input_ids"].device)
            supplied = torch.zeros(*ids.shape, size, dtype=dtype, device=ids.device)
            nothing_supplied = torch.zeros(1, *ids.shape, 1, dtype=torch.bool, device=ids.device)
            for step, use_supplied in enumerate(torch.cat([nothing_supplied, batch["taken"]])):
                outputs = called(
                    module,
                    batch,
                    draft_ids=batch["draft_ids"],
                    draft_given=supplied,
                    draft_taken=use_supplied,
                )
                total = total + self.decay**step * _imitation(program, outputs, batch)
                supplied = torch.cat([outputs["draft_hidden"][:, :1], outputs["draft_hidden"][:, :-1]], 1)
            return total

        names = {w.name for w in program.weights.values() if w.name.startswith(PREFIX)}
        form = with_features_as_input(program)
        return Recipe(self.name, loss, transform, trainable=lambda name: name in names, form=form)


def _imitation(program: Program, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    # the draft at t and the model at t + 1 predict the token at t + 2, which does not exist for the last two positions;
    # a draft with a trimmed vocabulary learns the distribution over its own tokens
    logits = kept_logits(program, "draft_logits", outputs["logits"])
    target = logits[:, 1:-1].detach().float().softmax(-1).transpose(1, 2)
    prediction = outputs["draft_logits"][:, :-2].float().transpose(1, 2)
    return masked_mean(F.cross_entropy(prediction, target, reduction="none"), batch, ahead=2)
