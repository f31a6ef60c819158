"""Trains weights to lie in narrow ranges, so that few bits represent them well (R², arXiv 2303.08253)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.errors import UsageError
from ...ir.needs import NONZERO
from ...ir.operators.traits import Trait, named
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.readers import readers
from ...ir.schema import arguments, is_operator
from .base import Batch, Method, Recipe, called, language_loss

HELD = "range_regularization"
PENALTY = "range_penalty"
SETTINGS = "range_settings"
_MATRIX_OPERATORS = named(Trait.CONVOLUTION) | {"aten.linear"}


def largest(weight: Tensor) -> Tensor:
    """Return ``max |w|``; only one weight gets a gradient."""
    return weight.abs().max()


def outside(weight: Tensor, margin: Tensor) -> Tensor:
    """Return ``|M| + sum of max(|w| - |M|, 0)``: weights outside a margin are pulled in, while the margin shrinks.

    Args:
        weight: of any shape.
        margin: a learned number, one for each weight tensor.
    """
    return margin.abs() + (weight.abs() - margin.abs()).clamp(min=0).sum()


def soft_range(weight: Tensor, temperature: Tensor) -> Tensor:
    """Return ``s_max - s_min + exp(-a)``: soft extremes, as means weighted by ``exp(a w)`` and ``exp(-a w)``.

    It requires no symmetry, which suits compression by clustering. The last term pushes the temperature up, towards the
    true range.

    Args:
        weight: of any shape.
        temperature: a learned number, one for each weight tensor.
    """
    flat = weight.flatten()
    high = (flat * (temperature * (flat - flat.max())).softmax(0)).sum()
    low = (flat * (-temperature * (flat - flat.min())).softmax(0)).sum()
    return high - low + (-temperature).exp()


@dataclass(frozen=True, kw_only=True)
class RangeRegularization(Method):
    """Next-token loss and a penalty on the range of every matrix, for networks that will be stored in few bits.

    Penalties are the paper's: ``infinity`` is the largest weight, ``margin`` is what lies outside a learned margin, both
    for symmetric quantisation; ``soft`` is a soft range with a learned temperature. Biases, norms and embeddings are not
    penalised. The strength is quoted from memory; margins start at twice the standard deviation, temperatures at 10
    divided by the largest weight.
    """

    name = "r2"
    paper = "arXiv 2303.08253"

    form: str = option(
        "margin",
        help="form of the penalty",
        choices=("infinity", "margin", "soft"),
        needs={"strength": NONZERO},
    )
    strength: float = option(
        0.01, help="weight of the penalty relative to the loss", source="recalled", low=0
    )

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe; a loop with its own loss adds ``penalty(module)`` to it.

        Raises:
            UsageError: the program has no weight matrix.
        """
        names = list(matrices(program))
        if not names:
            raise UsageError("this program has no matrices whose range could be penalised")

        def prepared(module: nn.Module) -> nn.Module:
            if not hasattr(module, HELD):
                regularize(module, names, self.form, self.strength)
            return module

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            outputs = called(module, batch)
            penalized: Tensor = language_loss(outputs, batch) + outputs[PENALTY]
            return penalized

        return Recipe(self.name, loss, form=program, prepared=prepared)


def matrices(program: Program) -> Iterable[str]:
    """Yield the names of weights that are read only as matrices of linear operators and convolutions."""
    for node in program.weight_nodes:
        read = readers(program, node)
        if read and all(is_operator(u, *_MATRIX_OPERATORS) and arguments(u)["weight"] is node for u in read):
            yield program.weights[node.name].name


def regularize(module: nn.Module, names: Iterable[str], form: str, strength: float) -> None:
    """Add learned margins or temperatures to a module, and an output ``range_penalty`` if its outputs have names.

    Args:
        module: has these weights among its parameters.
        names: names of weights.
        form: "infinity", "margin" or "soft".
        strength: weight of the penalty.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    learned = nn.ParameterList()
    names = list(names)
    for name in names if form != "infinity" else ():
        weight = parameters[name].detach().float()
        # as torch.std, but a single number has no spread
        spread = (weight - weight.mean()).norm() / max(1, weight.numel() - 1) ** 0.5
        initial = 2 * spread if form == "margin" else 10.0 / weight.abs().max().clamp(min=1e-6)
        learned.append(nn.Parameter(initial.clone()))
    module.add_module(HELD, learned)
    module.__dict__[SETTINGS] = (tuple(names), form, strength)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        # inside forward, so that DistributedDataParallel sees which parameters it depends on
        return {**output, PENALTY: penalty(module)} if isinstance(output, dict) else output

    module.register_forward_hook(hook)


def penalty(module: nn.Module) -> Tensor:
    """Return the penalty of a module that went through a recipe's ``prepare``, for a loop with its own loss.

    Raises:
        UsageError: the module did not go through ``prepare``.
    """
    owner = module if SETTINGS in module.__dict__ else getattr(module, "module", module)
    if SETTINGS not in owner.__dict__:
        raise UsageError(
            "this module has no penalty on ranges", hint="RangeRegularization().recipe(program).module()"
        )
    names, form, strength = owner.__dict__[SETTINGS]
    parameters = dict(owner.named_parameters(remove_duplicate=False))
    if form == "infinity":
        penalties = [largest(parameters[name].float()) for name in names]
    else:
        range_of, learned = (
            outside if form == "margin" else soft_range,
            owner.get_submodule(HELD).parameters(),
        )
        penalties = [
            range_of(parameters[name].float(), number) for name, number in zip(names, learned, strict=True)
        ]
    total: Tensor = strength * torch.stack(penalties).sum()
    return total
