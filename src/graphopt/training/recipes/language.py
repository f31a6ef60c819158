"""Ordinary fine-tuning on next tokens: what every other recipe is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...ir.option import option
from ...ir.program import Program
from .base import Batch, Method, Recipe, called, language_loss


@dataclass(frozen=True, kw_only=True)
class Language(Method):
    """All weights learn to predict the next token. Dials stand where ``dial`` puts them all, else at their defaults."""

    name = "language"

    dial: float | None = option(None, help="where the program's dials stand while it is trained")

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe; the program is trained as it is."""
        settings = dict.fromkeys(program.dials, self.dial) if self.dial is not None else {}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            return language_loss(called(module, batch, **settings), batch)

        return Recipe(self.name, loss, form=program)
