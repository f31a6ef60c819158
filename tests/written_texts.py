"""Decoders whose texts differ from row to row, and what they write."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
import zoo

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.weights import InMemory

ROWS = [[5, 9, 17, 40, 3, 8, 22], [12], [7, 7, 30]]


NEW = 12


def varied(name: str, program: Program) -> tuple[Program, Any]:
    """Return a program and its model with weights whose text is not one token over and over."""
    if name not in _varied:
        _varied[name] = _vary(name, program)
    program, model = _varied[name]
    return program.copy(), model


_varied: dict[str, tuple[Program, Any]] = {}


def _vary(name: str, program: Program) -> tuple[Program, Any]:
    model = zoo.make(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn * 0.3)
            else:
                parameter.add_(drawn * 0.1)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    changed = program.copy()
    for node, weight in program.weights.items():
        tensor = next((held[n] for n in weight.all_names if n in held), None)
        if tensor is None and weight.kind == "parameter":  # experts, which a folder holds one by one
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                changed = graphopt.capture(folder)
                for other, read in changed.weights.items():
                    changed.weights[other] = replace(read, source=InMemory(read.source.load().clone()))
            return changed, model.eval()
        if tensor is not None:
            changed.weights[node] = replace(weight, source=InMemory(tensor.detach().clone()))
    return changed, model.eval()


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def generated(program: Program, rows: list[list[int]], count: int = NEW, **options: Any) -> torch.Tensor:
    ids, mask = padded(rows)
    found = graphopt.generate(
        program, ids, attention_mask=mask, max_new_tokens=count, eos_token_id=None, **options
    )
    assert torch.equal(found[:, : ids.shape[1]], ids)
    return found[:, ids.shape[1] :]
