"""Norms beside convolutions and linears, and folding them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.frontends.compare import compare_outputs
from graphopt.ir.checking.verify import compare_programs, verify
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes import FoldNorms
from graphopt.passes.framework.manager import run_pipeline

D = torch.float64


NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randomise(model: nn.Module, seed: int = 0, smallest: float = 1e-8) -> nn.Module:
    """Give every norm statistics and weights of both signs, some variances tiny."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            size = module.running_var.shape
            spread = torch.rand(size, generator=generator, dtype=D)
            module.running_var.copy_(torch.where(spread < 0.4, smallest + spread * smallest, 0.1 + spread))
            module.running_mean.copy_(torch.randn(size, generator=generator, dtype=D))
            if module.weight is not None:
                module.weight.data.copy_(torch.randn(size, generator=generator, dtype=D))
                module.bias.data.copy_(torch.randn(size, generator=generator, dtype=D))
    return model


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=D)


def fold(model: nn.Module, x: torch.Tensor, compare: bool = False, **options: Any) -> tuple[Program, Program]:
    """Capture, fold, verify every node, and compare with the model at two sizes."""
    torch.manual_seed(0)
    model = model.to(D).eval()
    program = graphopt.capture(model, x, compare=compare)
    folded = run_pipeline(program, [FoldNorms(**options)], Context())
    verify(folded)
    (name,) = program.signature.inputs
    for other in (x, torch.cat([x, x * 0.5 + 1])):
        assert compare_outputs(folded, model, {name: other}) < 1e-10
        assert max(compare_programs(program, folded, {name: other}).values()) < 1e-10
    return program, folded
