"""Ordinary fine-tuning on next tokens: what every other recipe is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...ir.needs import ABSENT
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ..forms import CONTINUED, continued
from .base import Batch, Method, Recipe, called, language_loss


@dataclass(frozen=True, kw_only=True)
class Language(Method):
    """All weights learn to predict the next token. Dials stand where ``dial`` puts them all, else at their defaults.

    A program that skips layers after a prompt is used in both ways within a text. ``prompt`` trains it so: this share of
    each row is read by all layers, the rest by those that are kept, over the keys and values of the first part. With
    ``dial=1`` whole rows are read by those that are kept (Unified Layer Skipping, arXiv 2404.06954).
    """

    name = "language"

    dial: float | None = option(
        None, help="where the program's dials stand while it is trained", needs={"prompt": ABSENT}
    )
    prompt: float | None = option(
        None, help="share of a row that is a prompt, where layers are skipped after prompts", low=0, high=1
    )

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe; the program is trained as it is."""
        if self.prompt is not None:
            return self._after_prompts(program, self.prompt)
        if not program.dials:
            refuse_set(self.name, self, ("dial",), "this program has no dial")
        settings = dict.fromkeys(program.dials, self.dial) if self.dial is not None else {}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            return language_loss(called(module, batch, **settings), batch)

        return Recipe(self.name, loss, form=program)

    def _after_prompts(self, program: Program, share: float) -> Recipe:
        def transform(batch: Batch, done: float = 0.0) -> Batch:
            ids = batch["input_ids"]
            seen = batch.get("attention_mask", torch.ones_like(ids))
            # counted over tokens, so that padding on either side is no part of a prompt
            return {**batch, CONTINUED: seen.cumsum(1) > share * seen.sum(1, keepdim=True)}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            return language_loss(called(module, batch, **{CONTINUED: batch[CONTINUED]}), batch)

        return Recipe(self.name, loss, transform, form=continued(program))
