"""Blocks trained one by one, each on what the original model gives it: block-to-block distillation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.running.execute import interpret
from ..ir.storage.content import whole_hash
from ..ir.weights import InMemory
from ..measure.context import Context
from . import Record, Settings, train
from .learning import require_same_run
from .recipes import imitation
from .shown import TrainingProgress
from .state import FILE as STATE

Pair = tuple[Program, Program, Mapping[str, fx.Node]]
"""A block as it was and as it is to be, and the values of the original that are its inputs, by name."""


def train_blocks(
    program: Program, pairs: Mapping[str, Pair], context: Context, settings: Settings,
    work_dir: str | os.PathLike[str] | None, progress: TrainingProgress | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Record]]:  # fmt: skip
    """Train each block to give what it gave in the original, on the values of the original.

    Args:
        program: the original.
        pairs: a teacher and a student by the name of each block, which have the output ``written``.
        context: its data are the batches.
        settings: of each block's training.
        work_dir: where training states are saved, one folder per block.
        progress: notified after every step.

    Returns:
        Trained weights by name, and the record of each block.

    Raises:
        UsageError: a block shares weights with one that was trained already, there are no data, or the folder holds a run
            of another program, of other blocks or data.
    """
    if not context.data:
        raise UsageError("there are no data to train on")
    if work_dir is not None:
        identity = {
            "program": whole_hash(program),
            "student": [whole_hash(student) for _, student, _ in pairs.values()],
            "data": context.data_hash(),
        }
        require_same_run(Path(work_dir), identity, f"*/{STATE}")
    trained: dict[str, torch.Tensor] = {}
    records: dict[str, Record] = {}
    for name, (teacher, student, inputs) in pairs.items():
        clash = [w.name for w in student.weights.values() if w.name in trained and w.kind == "parameter"]
        if clash:
            raise UsageError(f"{name} shares {clash[0]} with a block that was trained already")
        batches = [_batch(program, context, inputs, teacher, student, b) for b in context.data]
        recipe = imitation(teacher, output="written")
        module = recipe.prepare(student.module())

        def batch(
            number: int, batches: list[dict[str, torch.Tensor]] = batches
        ) -> Mapping[str, torch.Tensor]:
            order = torch.randperm(
                len(batches), generator=torch.Generator().manual_seed(settings.seed + number // len(batches))
            )
            return batches[int(order[number % len(batches)])]

        folder = Path(work_dir) / name if work_dir is not None else None
        records[name] = train(
            module, batch, recipe.loss, replace(settings), work_dir=folder, device="cpu", progress=progress
        )
        trained |= {n: p.detach().clone() for n, p in module.named_parameters()}
    return trained, records


def with_weights(program: Program, trained: Mapping[str, torch.Tensor]) -> None:
    """Give a program trained weights, in the types in which it holds them."""
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        if weight.name in trained:
            program.weights[node.name] = weight.with_source(
                InMemory(trained[weight.name].to(weight.source.dtype))
            )


def _batch(
    program: Program, context: Context, inputs: Mapping[str, fx.Node], teacher: Program, student: Program,
    batch: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return a block's inputs, which are values of the original model and of its inputs, and what is to be imitated."""
    bound: dict[str, Any] = context.bound(program, batch)
    seen = interpret(program, bound, record=list(inputs.values()), stop=True)
    given = bound | {name: seen[node.name] for name, node in inputs.items()}
    with torch.no_grad():
        target = teacher(**{name: given[name] for name in teacher.signature.inputs})["written"]
    return {**{name: given[name] for name in student.signature.inputs}, "imitated": target}
