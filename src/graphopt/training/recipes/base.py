"""Base classes of recipes, and losses that several of them share."""

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
    """A loss, the trained parameters and a batch transform, for any loop.

    Args:
        name: for messages.
        loss: returns the mean loss of a module on a transformed batch.
        transform: transforms a batch before the loss is computed, given the fraction of training done, from 0 to 1;
            targets are computed here, and random choices are drawn from torch's global generator.
        trainable: tells by its name whether a parameter is trained.
        form: the variant of the program that is trained; None if the loop supplies a module.
        prepared: adds to a module parameters that are learned but are not part of the program.
        after: records in the trained program what is measured on some batches.
    """

    name: str
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    transform: Callable[..., Batch] = lambda batch, done=0.0: batch
    trainable: Callable[[str], bool] = lambda name: True
    form: Program | None = None
    prepared: Callable[[nn.Module], nn.Module] = lambda module: module
    after: Callable[[Program, Sequence[Batch]], Program] = lambda program, batches: program

    def prepare(self, module: nn.Module) -> nn.Module:
        """Return the module with gradients enabled for the trained parameters, and for nothing else.

        Raises:
            UsageError: no parameter of the module is trained.
        """
        module = self.prepared(module)
        chosen = [parameter for name, parameter in module.named_parameters() if self.trainable(name)]
        if not chosen:
            raise UsageError(f"{self.name}: nothing of this program would be trained")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        return module

    def module(self) -> nn.Module:
        """Return the program as a module for this recipe's loss, with gradients for the trained parameters."""
        if self.form is None:
            raise UsageError(f"{self.name} has no program of its own", hint="call prepare(module)")
        return self.prepare(self.form.module())

    def finish(self, program: Program, module: nn.Module) -> Program:
        """Return the program with the trained weights of a module, matched by name."""
        return with_weights(program, module)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A training method with options; :meth:`recipe` creates what a loop needs for one program.

    Subclasses are frozen dataclasses; their fields, declared with :func:`graphopt.ir.option.option`, define the
    constructor, the text form ``name{option=value}`` and the help.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        checked(self.name, self)
        self.validate()

    def validate(self) -> None:  # noqa: B027  most have nothing to check
        """Check options against one another; raise PipelineError with the reason if they conflict."""

    @abstractmethod
    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program.

        Raises:
            UsageError: the program lacks what the method trains.
        """

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str, str]]:
        """Return name, default, source and help of each option."""
        return [(n, default_of(f), str(f.metadata["source"]), help_of(f)) for n, f in options_of(cls).items()]


def language_loss(outputs: Mapping[str, Any], batch: Batch) -> torch.Tensor:
    """Return the mean negative log likelihood of each next token, over positions that are not padding.

    Raises:
        UsageError: the program does not predict the next token.
    """
    logits = outputs.get("logits")
    ids = batch.get("input_ids")
    if not isinstance(logits, torch.Tensor) or ids is None or logits.shape[:2] != ids.shape:
        raise UsageError("this recipe needs a program from input_ids to logits, one row of logits per token")
    return masked_mean(
        F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"),
        batch,
        ahead=1,
    )


def masked_mean(each: torch.Tensor, batch: Batch, *, ahead: int = 0) -> torch.Tensor:
    """Return the mean over the positions that count: no padding, and only the batch's ``loss_mask`` if it has one.

    Args:
        each: one number per position, (..., batch, sequence - ahead).
        batch: with or without an ``attention_mask`` and a ``loss_mask`` (batch, sequence).
        ahead: each number is about the token this many positions later; neither token may be padding, and
            ``loss_mask`` applies to the later one.
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
    """Return the outputs of a module for those tensors of a batch that are inputs of the program."""
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "routing")
    outputs = module(**{n: batch[n] for n in names if n in batch}, **settings)
    if not isinstance(outputs, Mapping):
        raise UsageError(
            f"the module returns {type(outputs).__name__}, but a recipe needs outputs with names",
            hint="capture a model that returns a dictionary or an output class, such as {'logits': ...}",
        )
    return outputs


def imitation(teacher: Callable[..., Any], *, output: str) -> Recipe:
    """Return a recipe that trains a module to imitate another: ``mean((student - teacher)^2)`` of one output.

    Block-to-block distillation of SPD (arXiv 2502.20727) applies it to a block without its sync point, with the
    original block as the teacher.

    Args:
        teacher: called like the module.
        output: name of the output that is compared.
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
