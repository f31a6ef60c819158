"""Recipes: a loss, what is trained, and what a batch becomes, for any loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a loop needs to know.

    Args:
        name: for messages.
        loss: mean loss of a module on a transformed batch.
        transform: what a batch becomes before the loss sees it; targets are computed here.
        trainable: tells by a parameter's name whether it is trained.
    """

    name: str
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    transform: Callable[[Batch], Batch]
    trainable: Callable[[str], bool] = lambda name: True

    def prepare(self, module: nn.Module) -> nn.Module:
        """Let gradients reach what is trained, and nothing else."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        return module


def imitation(teacher: Callable[..., Any], *, output: str) -> Recipe:
    """A module learns to return what another returns: ``mean((student - teacher)^2)`` of one output.

    Block-to-block distillation of SPD (arXiv 2502.20727) is this, of a block without its sync point, with the block
    that has it for a teacher.

    Args:
        teacher: called like the module.
        output: the name of the output compared.
    """

    def transform(batch: Batch) -> Batch:
        with torch.no_grad():
            found = teacher(**batch)
        return {**batch, "imitated": found[output]}

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "imitated"}
        made: torch.Tensor = module(**inputs)[output]
        return (made - batch["imitated"]).square().mean()

    return Recipe("imitation", loss, transform)


__all__ = ["Recipe", "imitation"]
