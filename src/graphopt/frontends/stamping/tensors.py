"""The tensors of a whole model by layer: what they are called in an equal layer, and where their values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ...ir.weights import InMemory, TensorSource
from .kinds import Choice
from .record import CannotStamp
from .weight_mapping import Mapped, Recipe


@dataclass
class Tensors:
    """The tensors of a whole model, in the order in which a full export would list them.

    Args:
        sources: of values by name, in the order of an export: parameters, then buffers.
        mapped: where they come from in a checkpoint.
        stored: the checkpoint's tensors, by key.
    """

    sources: Mapping[str, TensorSource]
    mapped: Mapped = field(default_factory=Mapped)
    stored: Mapping[str, TensorSource] = field(default_factory=dict)

    @cached_property
    def order(self) -> dict[str, tuple[int, int]]:
        """Places of tensors: those of the model in its order, then those of the checkpoint that make others."""
        keys = [key for recipe in self.mapped.recipes for key in recipe.sources]
        return {
            **{key: (1, place) for place, key in enumerate(keys)},
            **{name: (0, place) for place, name in enumerate(self.sources)},
        }

    @cached_property
    def _by_prefix(self) -> dict[str, list[str]]:
        """Names of the model's tensors by every prefix that ends in a number, such as layers.3."""
        names: dict[str, list[str]] = {}
        for name in self.sources:
            parts = name.split(".")
            for end in range(1, len(parts)):
                if parts[end - 1].isdigit():
                    names.setdefault(".".join(parts[:end]) + ".", []).append(name)
        return names

    @cached_property
    def _recipes(self) -> dict[str, list[Recipe]]:
        recipes: dict[str, list[Recipe]] = {}
        for recipe in self.mapped.recipes:
            parts = recipe.targets[0].split(".")
            for end in range(1, len(parts)):
                if parts[end - 1].isdigit():
                    recipes.setdefault(".".join(parts[:end]) + ".", []).append(recipe)
        return recipes

    def source(self, name: str) -> TensorSource:
        """Return the source of a tensor of the model or of the checkpoint."""
        if name in self.sources:
            return self.sources[name]
        if name in self.stored:
            return self.stored[name]
        raise CannotStamp(f"the model has no tensor {name}")

    def of_layer(self, choice: Choice) -> dict[str, int]:
        """Return which layer each tensor belongs to; those of a checkpoint belong where what is made of them does."""
        numbers: dict[str, int] = {}
        for layer in choice.layers:
            prefix = f"{layer.name}."
            numbers.update(dict.fromkeys(self._names(prefix), layer.number))
            for recipe in self._recipes.get(prefix, []):
                if all(target.startswith(prefix) for target in recipe.targets):
                    numbers.update(dict.fromkeys(recipe.sources, layer.number))
        return numbers

    def _names(self, prefix: str) -> list[str]:
        known = self._by_prefix.get(prefix)
        return known if known is not None else [n for n in self.sources if n.startswith(prefix)]

    def without(self, choice: Choice | CannotStamp) -> Mapped:
        """Return the weight mapping without the layers that are left out."""
        if isinstance(choice, CannotStamp):
            return self.mapped
        layer_of = self.of_layer(choice)
        made = [r for r in self.mapped.recipes if layer_of.get(r.sources[0]) not in choice.templates]
        return Mapped(self.mapped.plain, made, self.mapped.unused)

    def renamed(self, choice: Choice, first: int, other: int) -> dict[str, str]:
        """Return what the tensors of one layer are called in an equal one."""
        one, two = f"{choice.layers[first].name}.", f"{choice.layers[other].name}."
        names = {n: two + n.removeprefix(one) for n in self._names(one)}
        partners = {recipe.targets: recipe for recipe in self._recipes.get(two, [])}
        for recipe in self._recipes.get(one, []):
            partner = partners.get(tuple(two + t.removeprefix(one) for t in recipe.targets))
            if partner is None or len(partner.sources) != len(recipe.sources):
                raise CannotStamp(f"{two[:-1]} is stored in another way than {one[:-1]}")
            names.update(zip(recipe.sources, partner.sources, strict=True))
        return names


def tensors_of(model: nn.Module) -> Tensors:
    """Return the tensors of a model in memory, which are shared, not copied."""
    sources: dict[str, TensorSource] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        sources[name] = InMemory(tensor.detach())
    return Tensors(sources)
