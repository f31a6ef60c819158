"""What a loop needs to know to train something."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.errors import UsageError
from ...ir.option import checked, default_of, help_of, options_of
from ...ir.program import Program
from ..forms import with_weights

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """A loss, what is trained, and what a batch becomes, for any loop.

    Args:
        name: for messages.
        loss: mean loss of a module on a transformed batch.
        transform: what a batch becomes before the loss sees it, by the share of training that is done, from 0 to 1;
            targets are computed here, random choices drawn from torch's own generator.
        trainable: tells by a parameter's name whether it is trained.
        form: the program as it is trained; None where the loop brings a module of its own.
        prepared: gives a module what is learned beside its weights and is no part of the program.
        after: writes down in the trained program what is measured of it on some batches.
    """

    name: str
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    transform: Callable[..., Batch] = lambda batch, done=0.0: batch
    trainable: Callable[[str], bool] = lambda name: True
    form: Program | None = None
    prepared: Callable[[nn.Module], nn.Module] = lambda module: module
    after: Callable[[Program, Sequence[Batch]], Program] = lambda program, batches: program

    def prepare(self, module: nn.Module) -> nn.Module:
        """Let gradients reach what is trained, and nothing else.

        Raises:
            UsageError: nothing of the module is.
        """
        module = self.prepared(module)
        chosen = [parameter for name, parameter in module.named_parameters() if self.trainable(name)]
        if not chosen:
            raise UsageError(f"{self.name}: nothing of this program would be trained")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        return module

    def module(self) -> nn.Module:
        """Return the program as a module that this recipe's loss takes, with gradients where it trains."""
        if self.form is None:
            raise UsageError(f"{self.name} has no program of its own", hint="call prepare(module)")
        return self.prepare(self.form.module())

    def finish(self, program: Program, module: nn.Module) -> Program:
        """Return a program with what a module learned, by the names of weights."""
        return with_weights(program, module)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train a program, with options; :meth:`recipe` makes what a loop needs for one program.

    Subclasses are frozen dataclasses; their fields, declared with :func:`graphopt.ir.option.option`, are the
    constructor, the text ``name{option=value}`` and the help.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        checked(self.name, self)
        self.validate()

    def validate(self) -> None:  # noqa: B027  most have nothing to check
        """Check options against one another; raise PipelineError with the reason."""

    @abstractmethod
    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program.

        Raises:
            UsageError: the program has not what the method trains.
        """

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str, str]]:
        """Return name, default, source and help of each option."""
        return [(n, default_of(f), str(f.metadata["source"]), help_of(f)) for n, f in options_of(cls).items()]


def language_loss(outputs: Mapping[str, Any], batch: Batch) -> torch.Tensor:
    """Mean negative log likelihood of each next token, over positions that are not padding.

    Raises:
        UsageError: the program predicts no next token.
    """
    logits = outputs.get("logits")
    ids = batch.get("input_ids")
    if not isinstance(logits, torch.Tensor) or ids is None or logits.shape[:2] != ids.shape:
        raise UsageError("this recipe needs a program from input_ids to logits, one a token")
    return masked_mean(
        F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"),
        batch,
        ahead=1,
    )


def masked_mean(each: torch.Tensor, batch: Batch, *, ahead: int = 0) -> torch.Tensor:
    """Return the mean over positions that count: no padding, and tokens of the batch's ``loss_mask`` if it has one.

    Args:
        each: a number a position, (..., batch, sequence - ahead).
        batch: with an ``attention_mask`` and a ``loss_mask`` (batch, sequence), or without.
        ahead: each number is about the token so many places on; both must be there, and the loss counts that token.
    """
    counted = None
    mask, full_loss_mask = batch.get("attention_mask"), batch.get("loss_mask")
    last = each.shape[-1]
    if mask is not None:
        counted = mask[:, ahead : ahead + last] * mask[:, :last]
    if full_loss_mask is not None:
        loss_mask = full_loss_mask[:, ahead : ahead + last]
        counted = loss_mask if counted is None else counted * loss_mask
    if counted is None:
        return each.mean()
    counted = counted.to(each.dtype)
    return (each * counted).sum() / (counted.sum() * (each.numel() / counted.numel())).clamp(min=1)


def called(module: nn.Module, batch: Batch, **settings: Any) -> Mapping[str, Any]:
    """Call a module with the inputs of the program among a batch's tensors."""
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "routing")
    outputs = module(**{n: batch[n] for n in names if n in batch}, **settings)
    if not isinstance(outputs, Mapping):
        raise UsageError(
            f"the module returns {type(outputs).__name__}, and outputs of a recipe have names",
            hint="capture a model that returns a dictionary or an output class, such as {'logits': ...}",
        )
    return outputs


def imitation(teacher: Callable[..., Any], *, output: str) -> Recipe:
    """A module learns to return what another returns: ``mean((student - teacher)^2)`` of one output.

    Block-to-block distillation of SPD (arXiv 2502.20727) is this, of a block without its sync point, with the block
    that has it for a teacher.

    Args:
        teacher: called like the module.
        output: the name of the output compared.
    """

    def transform(batch: Batch, done: float = 0.0) -> Batch:
        with torch.no_grad():
            targets = teacher(**batch)
        return {**batch, "imitated": targets[output]}

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "imitated"}
        outputs: torch.Tensor = module(**inputs)[output]
        return (outputs - batch["imitated"]).square().mean()

    return Recipe("imitation", loss, transform)


__all__ = ["Batch", "Method", "Recipe", "called", "imitation", "language_loss", "masked_mean"]
