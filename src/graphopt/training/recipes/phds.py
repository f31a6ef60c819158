"""Trains a mixture of experts to work with fewer active experts than before (MoE-PHDS, arXiv 2509.23012)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...ir.errors import UsageError
from ...ir.needs import GIVEN, below
from ...ir.option import option
from ...ir.program import Program
from ..forms import active_dials, soft_experts
from .base import Batch, Method, Recipe, called, language_loss


@dataclass(frozen=True, kw_only=True)
class PHDS(Method):
    """Every step draws one number of active experts for all layers; towards the end, a low number more and more often.

    Experts beyond the drawn number have the weight ``epsilon``. All weights are trained on the language loss. ``anchor``
    is the number favoured at the end of training: from the share ``anchor_from`` of the steps on, its probability rises
    to one.
    """

    name = "phds"
    paper = "arXiv 2509.23012"

    among: list[int] | None = option(  # noqa: RUF009
        None, help="numbers of experts to draw from; by default, from half the trained number to all"
    )
    anchor: int | None = option(
        None, help="the low number favoured at the end", low=1, needs={"anchor_from": below(1)}
    )
    anchor_from: float = option(
        0.939,
        help="share of training after which the anchor comes in",
        source="paper",
        low=0,
        high=1,
        needs={"anchor": GIVEN},
    )
    epsilon: float = option(1e-6, help="weight of experts left out", source="paper", low=0, high=1)

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through dial-top-k."""
        form = soft_experts(program, self.epsilon)
        dials = active_dials(program)
        trained_count = int(min(program.dials[name].high for name in dials))
        among = self.among or list(range(max(1, (trained_count + 1) // 2), trained_count + 1))
        out_of_range = [
            k for k in [*among, *([self.anchor] if self.anchor else [])] if not 1 <= k <= trained_count
        ]
        if out_of_range:
            raise UsageError(
                f"{self.name}: {out_of_range[0]} active experts are outside the range from 1 to the trained {trained_count}"
            )

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            k = among[int(torch.randint(len(among), ()))]
            anchor_probability = (done - self.anchor_from) / max(1e-9, 1 - self.anchor_from)
            if self.anchor is not None and float(torch.rand(())) < anchor_probability:
                k = self.anchor
            return {**batch, "active": torch.tensor(k)}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            settings = dict.fromkeys(dials, float(batch["active"]))
            return language_loss(called(module, batch, **settings), batch)

        return Recipe(self.name, loss, transform, form=form)
