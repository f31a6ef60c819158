"""Finding the layers that matter least: scores, searches and the rule without data."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ...ir.errors import PassRefusedError, PipelineError
from ...ir.program import Program
from ...ir.running.execute import release
from ...measure.metrics import valid
from ..framework.plan import Plan

if TYPE_CHECKING:
    from ...measure.context import Context
    from .skip_layers import SkipLayers


def unified_rule(count: int, speedup: float) -> set[int]:
    """Return the indices of the layers that Unified Layer Skipping keeps, exactly as in its published code.

    Args:
        count: number of layers N.
        speedup: target S; K = int(N / S) layers are kept.

    Raises:
        PipelineError: fewer than two layers would be kept.
    """
    keep = int(count / speedup)
    if keep < 2:
        raise PipelineError(
            f"skip-layers: a speed-up of {speedup:g} would keep {keep} of {count} layers",
            hint=f"the largest speed-up here is {count / 2:g}",
        )
    kept = {0, count - 1}
    step = int(count / (keep - 1))
    for index in range(1, count - 1):
        if index % step == 0 and len(kept) < keep:
            kept.add(index)
    return kept


def choose(
    program: Program, context: Context, options: SkipLayers, units: list[Any], plan: Plan
) -> list[str]:
    """Return the names of the units to remove, of those that can be, by score and search."""
    findings = options.findings(program)
    total = len(findings.sites) + len(findings.refused)
    most = min(len(units), total - 1)
    if options.score in ("perplexity", "kl", "cosine") or (
        options.budget is not None and options.remove is None
    ):
        _estimate(program, context, options, len(units), plan)
    if options.remove is not None:
        if options.remove > most:
            why = "one must be left" if most == total - 1 else f"{most} can be skipped"
            raise PassRefusedError(
                f"skip-layers: {options.remove} of {total} {options.unit}s cannot be removed; {why}"
            )
        return _by_removal_order(program, context, options, units, plan, options.remove)
    assert options.budget is not None
    chosen: list[str] = []
    order: list[str] = []
    for number in range(1, most + 1):
        # each length has another best run of neighbours; other orders are only extended
        if options.search == "contiguous" or not order:
            order = _by_removal_order(
                program,
                context,
                options,
                units,
                plan,
                number if options.search == "contiguous" else most,
            )
        candidate = order[:number]
        if len(candidate) < number:
            break
        attempt = Plan([site for site in findings.sites if site.block in candidate])
        if options.phase == "decode":
            # judged without the skipped units; the program with the setting at its default runs them all
            candidate_program = _copy_without(program, options, candidate)
        else:
            candidate_program = options.tried(program, attempt)
        loss = context.loss(candidate_program, program, metric=options.metric)
        release(candidate_program)
        plan.notes.append(f"without {number}: loss {loss:.4g}")
        if not loss <= options.budget:
            break
        chosen, plan.trial = candidate, attempt.trial
    if not chosen:
        raise PassRefusedError(
            f"skip-layers: even one {options.unit} fewer costs more than the budget of {options.budget:g}",
            hint=plan.notes[-1] if plan.notes else "",
        )
    return chosen


def _estimate(program: Program, context: Context, options: SkipLayers, count: int, plan: Plan) -> None:
    """Report in advance how long scoring takes, estimated from one evaluation."""
    began = time.perf_counter()
    # a budget compares with the original's metric on judging data, which is computed and stored here
    context.evaluate(program, program, metric=options.metric, judge=options.budget is not None)
    seconds = time.perf_counter() - began
    runs = count if options.score in ("perplexity", "kl", "cosine") else 1
    if options.search == "greedy":
        runs *= options.remove or count // 2
    if options.remove is None:
        runs += count // 2
    note = f"estimated time for scores: {runs} evaluations of {seconds:.2g} s, about {runs * seconds:.3g} s"
    plan.notes.append(note)
    context.progress.start(note, 0)
    context.progress.done()


def units_of(program: Program, unit: str) -> list[Any]:
    """Return the layers, attentions or feed-forwards of a program, in execution order."""
    anatomy = program.anatomy
    if unit == "layer":
        return list(anatomy.layers)
    if unit == "attention":
        return anatomy.attention
    return [block for block in anatomy.blocks if block.kind in ("ffn", "experts")]


def _by_removal_order(
    program: Program, context: Context, options: SkipLayers, units: list[Any], plan: Plan, number: int
) -> list[str]:
    if options.search == "contiguous":
        return _contiguous(program, context, options, units, plan, number)
    if options.search == "greedy":
        return _greedy(program, context, options, units, plan, number)
    scores = _scores(program, context, options, [unit.name for unit in units])
    plan.scores.update(scores)
    return sorted(scores, key=lambda name: scores[name])[:number]


def _copy_without(program: Program, options: SkipLayers, names: list[str]) -> Program:
    """Return a copy without the named units."""
    copy = options.copied(program)
    _remove_in_place(copy, options, names)
    return copy


def _scores(
    program: Program,
    context: Context,
    options: SkipLayers,
    names: list[str],
    removed: list[str] | None = None,
) -> dict[str, float]:
    """Return the score of each unit in the program without those already removed."""
    removed = removed or []
    if options.score in ("perplexity", "kl", "cosine"):
        return context.score(
            program,
            names,
            lambda copy, name: _remove_in_place(copy, options, [*removed, name]),
            metric=options.score,
            key=f"skip-layers:{options.unit}:{','.join(removed)}",
        )
    key = f"skip-layers:{options.score}:{options.unit}:{','.join(removed)}"
    return context.remember(program, key, lambda: _distances(program, context, options, names, removed))


def _remove_in_place(copy: Program, options: SkipLayers, names: list[str]) -> None:
    by_name = {unit.name: unit for unit in units_of(copy, options.unit)}
    remove_units(copy, [by_name[name] for name in names])


def remove_units(program: Program, units: list[Any]) -> None:
    """Remove units from a program in place, last first, so that the value an earlier one reads still exists."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for unit in sorted(units, key=lambda u: order[u.writes], reverse=True):
        program.remove(unit)


def _distances(
    program: Program, context: Context, options: SkipLayers, names: list[str], removed: list[str]
) -> dict[str, float]:
    """Return the mean distance between the input and output of each unit."""
    units = {unit.name: unit for unit in units_of(program, options.unit)}
    working = program
    if removed:
        working = options.copied(program)
        by_name = {node.name: node for node in working.graph.nodes}
        ends = {n: (units[n].reads.name, units[n].writes.name) for n in names}
        _remove_in_place(working, options, removed)
        # values that replaced the output of a removed neighbour
        pairs = {n: tuple(working.edit.now(by_name[e]) for e in ends[n]) for n in names}
    else:
        pairs = {n: (units[n].reads, units[n].writes) for n in names}
    totals = dict.fromkeys(names, 0.0)
    count = 0
    values = [node for pair in pairs.values() for node in pair]
    context.progress.start(f"measuring {len(names)} {options.unit}s", len(context.batches()))
    for batch, recorded in context.record(working, dict.fromkeys(values)):
        for name, (reads, writes) in pairs.items():
            totals[name] += _distance(recorded[reads.name], recorded[writes.name], batch, options.score)
        count += 1
        context.progress.step()
    context.progress.done()
    return {name: total / max(count, 1) for name, total in totals.items()}


def _distance(first: torch.Tensor, second: torch.Tensor, batch: Any, score: str) -> float:
    # between some layers a stream may be flattened to (batch * sequence, size)
    if first.dim() != second.dim():
        shape = max(first.shape, second.shape, key=len)
        first, second = first.reshape(shape), second.reshape(shape)
    cosine = F.cosine_similarity(first.double(), second.double(), dim=-1)
    where = valid(batch, first)
    cosine = cosine[where] if where is not None else cosine.reshape(-1)
    if score == "angular":
        return float((torch.arccos(cosine.clamp(-1, 1)) / math.pi).mean())
    return float((1 - cosine).mean())


def _greedy(
    program: Program, context: Context, options: SkipLayers, units: list[Any], plan: Plan, number: int
) -> list[str]:
    removed: list[str] = []
    while len(removed) < number:
        remaining = [unit.name for unit in units if unit.name not in removed]
        scores = _scores(program, context, options, remaining, removed)
        lowest = min(scores, key=lambda name: scores[name])
        plan.scores[lowest] = scores[lowest]
        removed.append(lowest)
    return removed


def _contiguous(
    program: Program, context: Context, options: SkipLayers, units: list[Any], plan: Plan, number: int
) -> list[str]:
    """Return the run of neighbours whose removal changes the stream, or the metric, least; none if there is no run."""
    numbers = {site.block: site["number"] for site in options.findings(program).sites}
    runs = [units[i : i + number] for i in range(len(units) - number + 1)]
    runs = [run for run in runs if numbers[run[-1].name] - numbers[run[0].name] == number - 1]
    if not runs:
        return []
    names = [f"{run[0].name}..{run[-1].name}" if number > 1 else run[0].name for run in runs]
    by_name = dict(zip(names, runs, strict=True))
    if options.score in ("perplexity", "kl", "cosine"):
        scores = context.score(
            program,
            names,
            lambda copy, name: _remove_in_place(copy, options, [u.name for u in by_name[name]]),
            metric=options.score,
            key=f"skip-layers:contiguous:{options.unit}",
        )
    else:
        scores = context.remember(
            program,
            f"skip-layers:contiguous:{options.score}:{options.unit}:{number}",
            lambda: _run_distances(program, context, options, by_name),
        )
    plan.scores.update(scores)
    best = min(scores, key=lambda name: scores[name])
    return [unit.name for unit in by_name[best]]


def _run_distances(
    program: Program, context: Context, options: SkipLayers, runs: dict[str, list[Any]]
) -> dict[str, float]:
    totals = dict.fromkeys(runs, 0.0)
    nodes = {node: None for run in runs.values() for node in (run[0].reads, run[-1].writes)}
    count = 0
    for batch, recorded in context.record(program, nodes):
        for name, run in runs.items():
            totals[name] += _distance(
                recorded[run[0].reads.name], recorded[run[-1].writes.name], batch, options.score
            )
        count += 1
    return {name: total / max(count, 1) for name, total in totals.items()}
