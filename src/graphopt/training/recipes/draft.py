"""A draft learns to say what its model says (after EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.errors import UsageError
from ...ir.option import option
from ...ir.program import Program
from .base import Batch, Method, Recipe, called, masked_mean

PREFIX = "draft."


@dataclass(frozen=True, kw_only=True)
class Draft(Method):
    """Cross-entropy of the draft's prediction with the model's own distribution one place later; the model stays as it is.

    ``noise`` shakes what the draft is given of the next token: with this probability another token of the batch stands
    there, so that it does not lean on words alone.
    """

    name = "draft"
    paper = "arXiv 2503.01840"

    noise: float = option(0.0, help="probability that the token given is another one", low=0, high=1)

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through attach-draft."""
        if "draft_logits" not in program.outputs:
            raise UsageError("this program has no draft", hint="run the pass attach-draft first")

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            ids = batch["input_ids"]
            following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
            if self.noise:
                others = following.flatten()[torch.randint(following.numel(), following.shape)]
                following = torch.where(torch.rand(following.shape) < self.noise, others, following)
            return {**batch, "draft_ids": following}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            found = called(module, batch, draft_ids=batch["draft_ids"])
            # the draft at t and the model at t + 1 are about the same token
            target = found["logits"][:, 1:].detach().float().softmax(-1).transpose(1, 2)
            said = found["draft_logits"][:, :-1].float().transpose(1, 2)
            each = F.cross_entropy(said, target, reduction="none")
            mask = batch.get("attention_mask")
            return masked_mean(each, {} if mask is None else {"attention_mask": mask[:, 1:]})

        names = {w.name for w in program.weights.values() if w.name.startswith(PREFIX)}
        return Recipe(self.name, loss, transform, trainable=lambda name: name in names, form=program)
