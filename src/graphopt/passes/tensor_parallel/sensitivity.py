"""Sensitivity of each sync point: the metric as they are dropped from the last block backwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.running.execute import interpret
from ...measure.metrics import BY_NAME, default_metric
from .sync_points import drop, find_sync_points

if TYPE_CHECKING:
    from ...measure.context import Context

RECORDED = 1 << 26
"""Bytes of recorded values of the original at which a group of batches ends."""


def backward_sweep(
    program: Program, context: Context, metric: str, log: Callable[[str], None]
) -> dict[str, float]:
    """Return S_i = metric(dropped from i on) - metric(dropped from i + 1 on) by block, and the original's metric as "base".

    After section 4 of arXiv 2502.20727: L + 1 evaluations, from the last block backwards. A batch runs once through
    the original; each variant starts at its first changed block, from the original's stream. Batches go through a variant
    in groups whose streams are small; sums are saved in the work directory after each group, so that an interrupted
    sweep continues.
    """
    points, _ = find_sync_points(program)
    names = list(points)
    name = default_metric(program) if metric == "auto" else metric
    batches = context.batches()
    store = f"drop-sync-points:{name}:{len(batches)}"
    sums = context.stored(program, store)
    reads = [points[n].attention.reads for n in names]
    finished, estimated = int(sums.get("batches", 0)), False
    runs = len(names) + 1
    context.progress.start(f"dropping {len(names)} sync points one after the other", len(batches) * runs)
    began = time.perf_counter()
    try:
        for _ in range(finished * runs):
            context.progress.step("kept from before")
        while finished < len(batches):
            group = _group(program, context, batches[finished:], reads)
            note = ""
            if not estimated:
                estimated = True
                # each variant runs the model from its first changed block on
                seconds = (time.perf_counter() - began) / len(group) * (1 + runs / 2)
                remaining = len(batches) - finished
                note = f"the sweep takes about {seconds * remaining:.3g} s: {remaining} batches, {runs} runs each"
                log(note)
            for batch, _, outputs in group:
                _count(sums, "base", name, batch, outputs, outputs)
                context.progress.step(note)
            for index, first in enumerate(names):
                # one variant at a time: the graphs of all, unrolled over ranks, take more memory than many a weight
                variant = program.copy(analysed=True)
                drop(variant, names[index:])
                start = points[first].attention.reads
                copied_start = next(n for n in variant.graph.nodes if n.name == start.name)
                for batch, inputs, outputs in group:
                    recorded = interpret(variant, inputs, known={copied_start: outputs[start.name]})
                    _count(sums, first, name, batch, recorded, outputs)
                    context.progress.step()
            finished += len(group)
            sums["batches"] = float(finished)
            context.store(program, store, sums)
    finally:
        context.progress.done()
    values = {n: _value(sums, n, name) for n in ("base", *names)}
    found_scores = {"base": values["base"]}
    for index, first in enumerate(names):
        later = values[names[index + 1]] if index + 1 < len(names) else values["base"]
        found_scores[first] = values[first] - later
    return found_scores


def _group(
    program: Program, context: Context, batches: list[Any], reads: list[fx.Node]
) -> list[tuple[Any, dict[str, torch.Tensor], dict[str, Any]]]:
    """Run the first batches through the original, as many as have small recorded values; at least one."""
    group: list[tuple[Any, dict[str, torch.Tensor], dict[str, Any]]] = []
    size = 0
    for batch in batches:
        inputs = context.bound(program, batch)
        outputs = interpret(program, inputs, record=dict.fromkeys(reads))
        group.append((batch, inputs, outputs))
        size += sum(part.nbytes for value in outputs.values() for part in _tensors(value))
        if size >= RECORDED:
            break
    return group


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a recorded value: one per rank where ranks differ."""
    return [
        part for part in (value if isinstance(value, list) else [value]) if isinstance(part, torch.Tensor)
    ]


def _count(sums: dict[str, float], key: str, metric: str, batch: Any, outputs: Any, reference: Any) -> None:
    instance = BY_NAME[metric]()
    instance.add(batch, outputs, reference)
    sums[f"{key}.total"] = sums.get(f"{key}.total", 0.0) + instance.total
    sums[f"{key}.count"] = sums.get(f"{key}.count", 0.0) + instance.count


def _value(sums: dict[str, float], key: str, metric: str) -> float:
    instance = BY_NAME[metric]()
    instance.total, instance.count = sums[f"{key}.total"], int(sums[f"{key}.count"])
    return instance.value()


def classify(scores: dict[str, float], insensitive: float, sensitive: float) -> dict[str, str]:
    """Return the class of each block: insensitive, sensitive or extremely sensitive, by thresholds relative to the base."""
    base = abs(scores["base"]) or 1.0
    classes = {}
    for name, score in scores.items():
        if name != "base":
            relative = score / base
            classes[name] = "insensitive" if relative <= insensitive else (
                "sensitive" if relative <= sensitive else "extremely sensitive"
            )  # fmt: skip
    return classes
