"""Block-to-block distillation of shared caches: attentions are trained to work with another layer's keys and values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ..data.reading import read_data
from ..ir.program import Program
from ..ir.running.extract import extract
from ..ir.schema import arguments
from ..measure.context import Context
from ..passes.caching.share_caches import ShareCaches
from ..passes.framework.manager import run_pipeline
from . import Record, Settings
from .block_by_block import Pair, train_blocks, with_weights
from .shown import TrainingProgress


def distil_shared_caches(
    program: Program,
    step: ShareCaches,
    data: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    settings: Settings,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    sequences: int = 128,
    length: int = 2048,
    progress: TrainingProgress | None = None,
) -> tuple[Program, dict[str, Record]]:
    """Share keys and values between layers, and train each attention that reads those of another layer.

    The pass begins with its fits. Then each of these attentions, with its norm and projections, learns to write into the
    residual stream what it wrote with keys and values of its own: on the stream of the original model, and on the keys and
    values that its leader has there. Blocks are trained one by one, so that no more than one is in memory with gradients.

    Args:
        program: without caches; not changed.
        step: the pass with its options, such as ``ShareCaches(start=20)``.
        data: a file or batches, as for passes; the fits take what a pass calibrates on, training takes all.
        settings: of each attention's training.
        work_dir: where training states are saved, one folder per attention, so that an interrupted run can resume.
        sequences: number of rows read from a file.
        length: maximum number of tokens per row.
        progress: notified after every step.

    Returns:
        The program with shared keys and values and trained weights, and the record of each attention.

    Raises:
        UsageError: two attentions share weights.
        PassRefusedError: no layer can read another's keys and values, or the program has caches, or is sharded.
    """
    batches, _ = read_data(program, data, sequences=sequences, length=length, batch=1, seed=settings.seed)
    context = Context(list(batches))
    shared = run_pipeline(program, [step], context)
    before = {block.name: block for block in program.anatomy.attention}
    after = {block.name: block for block in shared.anatomy.attention}
    leaders: dict[fx.Node, str] = {}
    followers: dict[str, str] = {}
    for name, block in after.items():
        keys = arguments(block.parts["core"])["k"] if "core" in block.parts else None
        # what was shared before stays as it is
        if keys in leaders and arguments(before[name].parts["core"])["k"].name != keys.name:
            followers[name] = leaders[keys]
        if keys is not None:
            leaders.setdefault(keys, name)

    def pair(name: str) -> Pair:
        block, student = before[name], after[name]
        leader, held = (arguments(b.parts["core"]) for b in (before[followers[name]], student))
        return (
            extract(program, {"stream": block.reads}, {"written": block.writes}),
            extract(
                shared, {"stream": student.reads, "keys": held["k"], "values": held["v"]},
                {"written": student.writes},
            ),
            {"stream": block.reads, "keys": leader["k"], "values": leader["v"]},
        )  # fmt: skip

    pairs = {name: pair(name) for name in followers}
    trained, records = train_blocks(program, pairs, context, settings, work_dir, progress)
    with_weights(shared, trained)
    shared.changed()
    return shared, records
