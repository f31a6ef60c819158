"""Block-to-block distillation: blocks are trained to work without their sync point."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..data.reading import read_data
from ..ir.errors import UsageError
from ..ir.export_blockers import block_export
from ..ir.program import Program
from ..ir.running.extract import extract
from ..measure.context import Context
from ..passes.tensor_parallel.sync_points import drop, find_sync_points
from . import Record, Settings
from .block_by_block import Pair, train_blocks, with_weights
from .shown import TrainingProgress


def distil_sync_points(
    program: Program,
    blocks: Sequence[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    settings: Settings,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    sequences: int = 128,
    length: int = 2048,
    progress: TrainingProgress | None = None,
) -> tuple[Program, dict[str, Record]]:
    """Drop sync points and train each block to work without its own (section 4 of arXiv 2502.20727).

    Each block, from the input of its attention to the output of its feed-forward, is trained separately: on the
    hidden states of the original model, it learns to produce without its sync point what it produced with it. The paper
    uses 10 epochs over 128 sequences at a learning rate of 5e-5 (LLaMA-2) or 1e-6 (OPT); it does not name the
    optimizer, AdamW is used here.

    Args:
        program: sharded, with its sync points.
        blocks: names of attention blocks, such as ``"attention.3"``.
        data: a file or batches, as for passes; all of it is used for training.
        settings: of each block's training.
        work_dir: where training states are saved, one folder per block, so that an interrupted run can resume.
        sequences: number of rows read from a file.
        length: maximum number of tokens per row.
        progress: notified after every step.

    Returns:
        The program without these sync points, with trained weights, and the record of each block.

    Raises:
        UsageError: a block has no sync point to drop, or shares weights with another.
    """
    points, refused = find_sync_points(program)
    for name in blocks:
        if name not in points:
            raise UsageError(f"{name}: {refused.get(name, 'there is no such attention')}")
    batches_read, _ = read_data(
        program, data, sequences=sequences, length=length, batch=1, seed=settings.seed
    )
    context = Context(list(batches_read))
    pairs: dict[str, Pair] = {
        name: (*block_pair(program, name), {"stream": points[name].attention.reads}) for name in blocks
    }
    trained, records = train_blocks(program, pairs, context, settings, work_dir, progress)
    result = program.copy()
    drop(result, list(blocks))
    with_weights(result, trained)
    block_export(result, "blocks were trained without their sync points", by="block-to-block distillation")
    result.changed()
    return result, records


def block_pair(program: Program, name: str) -> tuple[Program, Program]:
    """Return a block with and without its sync point, each as a program from ``stream`` to ``written``.

    Raises:
        UsageError: the block has no sync point to drop.
    """
    points, refused = find_sync_points(program)
    if name not in points:
        raise UsageError(f"{name}: {refused.get(name, 'there is no such attention')}")
    point = points[name]
    reads, writes = point.attention.reads, point.ffn.writes
    teacher = extract(program, {"stream": reads}, {"written": writes})
    dropped = program.copy()
    written = drop(dropped, [name])[name]
    dropped_reads = next(n for n in dropped.graph.nodes if n.name == reads.name)
    return teacher, extract(dropped, {"stream": dropped_reads}, {"written": written})
