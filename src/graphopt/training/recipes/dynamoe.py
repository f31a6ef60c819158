"""Routers learn how difficult a token is, and the model adapts to them (DynaMoE, arXiv 2502.12325)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.needs import NONZERO
from ...ir.option import option
from ...ir.program import Program
from ..forms import router_weights, shown_routers
from .base import Batch, Method, Recipe, called, language_loss, masked_mean


def difficulty(similarity: torch.Tensor, theta: float) -> torch.Tensor:
    """Return the label of each token: the narrowest width whose output is more similar than ``theta`` to the full one.

    Args:
        similarity: (..., widths), ``<O_e, O_last> / <O_last, O_last>``; the last is 1.
        theta: threshold; the higher, the wider the labels.

    Returns:
        (...), integers; the last width where no other is similar enough.
    """
    like = similarity > theta
    like = torch.cat([like[..., :-1], torch.ones_like(like[..., -1:])], -1)
    return like.int().argmax(-1)


@dataclass(frozen=True, kw_only=True)
class DynaMoE(Method):
    """Routers learn difficulty labels computed during training, for each token and layer; the model learns its text.

    The loss is ``language * CE(next token) + router * mean over layers of CE(router, label)``; a token's label is the
    narrowest expert e with ``<O_e, O> / <O, O> > theta``, where O is the output of the whole feed-forward for the same
    input. Tokens take the expert that their router finds likeliest; gradients reach weights through the channels that
    were used. ``train=routers`` freezes the model, which retargets theta in a few steps. Loss, label and factors are
    recalled, not quoted.
    """

    name = "dynamoe"
    paper = "arXiv 2502.12325"

    theta: float = option(
        0.8,
        help="how similar an expert's output must be to the full one",
        low=0,
        high=1,
        needs={"router": NONZERO},
    )
    language: float = option(
        0.2, help="weight of the language loss", source="recalled", low=0, needs={"train": "all"}
    )
    router: float = option(1.0, help="weight of the routers' loss", source="recalled", low=0)
    train: str = option("all", help="which weights are trained", choices=("all", "routers"))

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through split-ffn."""
        form = shown_routers(program)
        routers = router_weights(program)

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            outputs = called(module, batch)
            logits, labels = outputs["router_logits"], difficulty(outputs["similarity"], self.theta)
            losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
            total = self.router * masked_mean(losses.reshape(labels.shape), batch)
            if self.train == "all" and self.language:
                total = total + self.language * language_loss(outputs, batch)
            return total

        trainable = (lambda name: name in routers) if self.train == "routers" else (lambda name: True)
        return Recipe(self.name, loss, trainable=trainable, form=form)
