"""Decoders for hypothesis to draw: any weights on structures of every kind, each of which is captured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from builders import Shape, Transformer, tokens
from hypothesis import strategies as st

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory

SHAPES = (
    Shape(layers=3, width=8),
    Shape(norm="written_rms", placement="sandwich", kv_heads=1, gate_up="interleaved", tied=True),
    Shape(norm="layer", placement="post", qkv="plain", gated=False, bias=True, spelling="conv1d"),
    Shape(norm="written_layer", placement="parallel", kv_heads=4, qkv="interleaved", bias=True, rotary=False),
)
SIZES = ((2, 6), (3, 11))
"""(batch, sequence): the one that was captured, and another."""


@lru_cache(maxsize=16)
def _captured(shape: Shape, masked: bool) -> Program:
    return graphopt.capture(
        Transformer(shape), {n: v for n, v in tokens(*SIZES[0]).items() if masked or "ids" in n}
    )


@dataclass(frozen=True)
class Decoder:
    """A decoder in float64: its structure, the seed of its weights, and how much larger its matrices are than usual."""

    shape: Shape
    seed: int
    scale: float

    @property
    def model(self) -> Transformer:
        """The module, to be changed at will."""
        made = Transformer(self.shape, self.seed)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(self.scale)
        return made

    @property
    def program(self) -> Program:
        """The captured module."""
        return self._captured(True)

    @property
    def unmasked(self) -> Program:
        """The module captured without a padding mask."""
        return self._captured(False)

    def _captured(self, masked: bool) -> Program:
        values = dict(self.model.named_parameters(remove_duplicate=False))
        made = _captured(self.shape, masked).copy()
        for node, weight in list(made.weights.items()):
            if weight.name in values:
                made.weights[node] = weight.with_source(InMemory(values[weight.name].detach()))
        made.changed()
        return made


def decoders(shapes: tuple[Shape, ...] = SHAPES) -> st.SearchStrategy[Decoder]:
    """Draw a decoder."""
    return st.builds(
        Decoder, st.sampled_from(shapes), st.integers(0, 1 << 20), st.sampled_from([0.3, 1.0, 2.5])
    )


def shaken(program: Program, prefix: str, seed: int) -> Program:
    """Return the program with other values for the weights whose names begin so, as training would leave them."""
    made, generator = program.copy(), torch.Generator().manual_seed(seed)
    for node, weight in list(made.weights.items()):
        if weight.name.startswith(prefix):
            value = weight.source.load()
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            made.weights[node] = weight.with_source(InMemory(value + 0.3 * drawn))
    made.changed()
    return made


def weight_values(program: Program, prefix: str) -> dict[str, torch.Tensor]:
    """Return the values of the weights whose names begin so, by the rest of their names."""
    return {
        w.name.removeprefix(prefix): w.source.load()
        for w in program.weights.values()
        if w.name.startswith(prefix)
    }


def recorded(
    modules: dict[str, torch.nn.Module], run: Callable[[], Any]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what a function gives, and what some modules gave while it ran."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, value, name=name: seen.update({name: value}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        found = run()
    for hook in hooks:
        hook.remove()
    return found, seen


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two results in float64 are one up to the order of sums."""
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1.0)
    )
