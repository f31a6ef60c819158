"""Ordinary fine-tuning on next tokens, the baseline for every other recipe."""

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
    """All weights learn to predict the next token. ``dial`` sets every run-time setting; by default each has its default.

    A program that skips layers after a prompt runs with and without them within one text. ``prompt`` trains it that way:
    this share of each row goes through all layers, the rest through the layers that are kept, using the keys and values
    of the first part. With ``dial=1`` whole rows go through the kept layers (Unified Layer Skipping, arXiv 2404.06954).
    """

    name = "language"

    dial: float | None = option(
        None, help="value of the program's run-time settings during training", needs={"prompt": ABSENT}
    )
    prompt: float | None = option(
        None,
        help="share of a row that counts as the prompt, for programs that skip layers after it",
        low=0,
        high=1,
    )

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe; the program is trained unchanged."""
        if self.prompt is not None:
            return self._after_prompts(program, self.prompt)
        if not program.dials:
            refuse_set(self.name, self, ("dial",), "this program has no run-time setting")
        settings = dict.fromkeys(program.dials, self.dial) if self.dial is not None else {}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            return language_loss(called(module, batch, **settings), batch)

        return Recipe(self.name, loss, form=program)

    def _after_prompts(self, program: Program, share: float) -> Recipe:
        def transform(batch: Batch, done: float = 0.0) -> Batch:
            ids = batch["input_ids"]
            seen = batch.get("attention_mask", torch.ones_like(ids))
            # counted over tokens, so that padding on either side is not part of a prompt
            return {**batch, CONTINUED: seen.cumsum(1) > share * seen.sum(1, keepdim=True)}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            return language_loss(called(module, batch, **{CONTINUED: batch[CONTINUED]}), batch)

        return Recipe(self.name, loss, transform, form=continued(program))
