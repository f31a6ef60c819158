"""A draft learns to say what its model says (after EAGLE-3, arXiv 2503.01840)."""

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
from ..forms import given_features
from .base import Batch, Method, Recipe, called, masked_mean

PREFIX = "draft."


@dataclass(frozen=True, kw_only=True)
class Draft(Method):
    """Cross-entropy of the draft's prediction with the model's own distribution one place later; the model stays as it is.

    While decoding, candidates after the first come from the draft's own hidden states. So it is trained on them as well:
    in the second step, and those after, a ``share`` of the places is given what the step before made of the place before,
    in place of the model's features (EAGLE-3's training-time test, at random places instead of with a mask for each step).
    Each step counts ``decay`` times the one before.

    ``noise`` shakes what the draft is given of the next token: with this probability another token of the batch stands
    there, so that it does not lean on words alone.
    """

    name = "draft"
    paper = "arXiv 2503.01840"

    steps: int = option(
        2, help="how often the draft goes on from its own hidden states, the first included", low=1
    )
    share: float = option(
        0.5, help="of the places that are given them", low=0, high=1, needs={"steps": above(1)}
    )
    decay: float = option(
        0.8, help="weight of each further step", source="paper", low=0, high=1, needs={"steps": above(1)}
    )
    noise: float = option(0.0, help="probability that the token given is another one", low=0, high=1)

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
            use_supplied[:, :, 0] = False  # nothing stands before the first place
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
        form = given_features(program)
        return Recipe(self.name, loss, transform, trainable=lambda name: name in names, form=form)


def _imitation(program: Program, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    # the draft at t and the model at t + 1 are about the token at t + 2, which is not there for the last two places;
    # a draft of some tokens learns how likely they are among themselves
    logits = kept_logits(program, "draft_logits", outputs["logits"])
    target = logits[:, 1:-1].detach().float().softmax(-1).transpose(1, 2)
    prediction = outputs["draft_logits"][:, :-2].float().transpose(1, 2)
    return masked_mean(F.cross_entropy(prediction, target, reduction="none"), batch, ahead=2)
