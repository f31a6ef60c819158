"""Large, small or no expert per token: interchangeable experts, routers with one budget (Duo-LLM, arXiv 2410.10846)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...ir.errors import PipelineError
from ...ir.needs import NONZERO
from ...ir.option import option, refuse_set
from ...ir.program import Program
from ...measure.choices import nested_blocks, widths_of_choices, with_choices_as_input
from ..forms import router_weights, soft_choices
from .base import Batch, Method, Recipe, called, language_loss, masked_mean


@dataclass(frozen=True, kw_only=True)
class DuoDistil(Method):
    """Every token takes a random expert in every feed-forward, so that experts become interchangeable (stage 1).

    The loss is ``distil * KL(original || this) + language * CE(next token)``, where the original is the program at its
    widest before training. The paper trains from scratch with only the language loss: ``distil=0 language=1``.
    """

    name = "duo-distil"
    paper = "arXiv 2410.10846"

    distil: float = option(1.0, help="weight of the distance to the original", low=0)
    language: float = option(0.0, help="weight of the language loss", low=0)
    skip: float = option(
        0.0, help="how often a token skips the feed-forward, where that is possible", low=0, high=1
    )
    train: str = option("all", help="which weights are trained", choices=("all", "small"))

    def validate(self) -> None:
        """Require at least one of the two losses."""
        if not self.distil and not self.language:
            raise PipelineError(f"{self.name}: with distil=0 and language=0 there is nothing to learn")

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through split-ffn."""
        blocks = nested_blocks(program)
        widths = widths_of_choices(blocks[0])
        expert_count = sum(w > 0 for w in widths)
        if widths[0] != 0:
            refuse_set(
                self.name, self, ("skip",), "no token can skip the feed-forwards of this program",
                hint="split-ffn{skip=true} makes a program where tokens can",
            )  # fmt: skip
        skip = self.skip if widths[0] == 0 else 0.0
        probabilities = torch.tensor([skip if w == 0 else (1 - skip) / expert_count for w in widths])
        teacher = program.module().requires_grad_(False).eval() if self.distil else None
        routers = router_weights(program)

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            shape = (len(blocks), *batch["input_ids"].shape)
            drawn = torch.multinomial(probabilities, shape[0] * shape[1] * shape[2], replacement=True)
            transformed = {**batch, "routing": drawn.reshape(shape)}
            if teacher is not None:
                teacher_device = next(teacher.parameters()).device
                if teacher_device != batch["input_ids"].device:
                    teacher.to(batch["input_ids"].device)
                with torch.no_grad():
                    transformed["original"] = called(teacher, batch)["logits"]
            return transformed

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            outputs = called(module, batch)
            total = torch.zeros((), device=outputs["logits"].device)
            if "original" in batch:
                original = batch["original"].float().log_softmax(-1)
                divergence = (original.exp() * (original - outputs["logits"].float().log_softmax(-1))).sum(-1)
                total = total + self.distil * masked_mean(divergence, batch)
            if self.language:
                total = total + self.language * language_loss(outputs, batch)
            return total

        small = ".small_"
        return Recipe(
            self.name, loss, transform,
            (lambda name: small in name) if self.train == "small" else (lambda name: name not in routers),
            with_choices_as_input(program),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DuoRouters(Method):
    """Only routers learn, where to spend the budget best; everything else is frozen (stage 3).

    The loss is ``CE(next token) + weight * (mean over layers and tokens of p(largest) - target)^2``: one budget for the
    whole model, with no balance layer by layer. Experts are mixed softly, at a temperature that falls geometrically from
    ``temperature`` to ``final_temperature``, approaching the hard choices that are used later at delta 0.5.
    """

    name = "duo-routers"
    paper = "arXiv 2410.10846"

    target: float = option(
        0.5, help="share of the tokens that take the largest", low=0, high=1, needs={"weight": NONZERO}
    )
    weight: float = option(10.0, help="weight of the budget", low=0)
    temperature: float = option(2.0, help="temperature of the routers' softmax at the beginning", low=1e-3)
    final_temperature: float = option(0.2, help="temperature at the end", low=1e-3)

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through split-ffn."""
        form = soft_choices(program)
        routers = router_weights(program)

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            temperature = self.temperature * (self.final_temperature / self.temperature) ** done
            return {**batch, "temperature": torch.tensor(temperature)}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            outputs = called(module, batch, temperature=float(batch["temperature"]))
            largest = masked_mean(outputs["shares"][..., -1].float(), batch)
            return language_loss(outputs, batch) + self.weight * (largest - self.target).square()

        return Recipe(self.name, loss, transform, lambda name: name in routers, form)
