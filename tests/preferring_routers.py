"""Feed-forwards of several widths whose routers have preferences."""

from __future__ import annotations

import torch

from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory


def with_preferences(program: Program, seed: int = 0) -> Program:
    """Give routers opinions, so that tokens of one row take different ways."""
    done = program.copy()
    generator = torch.Generator().manual_seed(seed)
    for node in done.weight_nodes:
        weight = done.weights[node.name]
        if "router" in weight.name:
            shape = tuple(weight.source.shape)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
            done.weights[node.name] = weight.with_source(InMemory(drawn.to(weight.source.dtype)))
    done.changed()
    return done
