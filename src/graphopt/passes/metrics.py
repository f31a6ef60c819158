"""How far a program is from what it should be: perplexity, divergence from and distance to the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..ir.errors import PipelineError
from ..ir.program import Program

Batch = Mapping[str, torch.Tensor]
Run = Callable[[Batch], Mapping[str, Any]]

METRICS = ("perplexity", "kl", "cosine")


def default_metric(program: Program) -> str:
    """Return the metric for a program: perplexity where it predicts tokens, else distance to the original."""
    takes, gives = program.signature.inputs, program.signature.output_names
    return (
        "perplexity"
        if "logits" in gives and "input_ids" in takes and program.origin.padding == "causal"
        else "cosine"
    )


def valid(batch: Batch, like: torch.Tensor) -> torch.Tensor | None:
    """Return which positions count: the mask's, where outputs have positions."""
    mask = batch.get("attention_mask")
    if mask is None or like.dim() < 3 or like.shape[:2] != mask.shape:
        return None
    return mask.bool()


def perplexity(run: Run, batches: Iterable[Batch]) -> float:
    """``exp`` of the mean negative log likelihood of each next token, over positions that are not padding."""
    total, count = 0.0, 0
    for batch in batches:
        logits = run(batch).get("logits")
        if logits is None or "input_ids" not in batch:
            raise PipelineError(
                "perplexity needs a program with input_ids and logits", hint="choose kl or cosine"
            )
        ids = batch["input_ids"]
        loss = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
        mask = batch.get("attention_mask")
        counted = torch.ones_like(loss) if mask is None else (mask[:, 1:] * mask[:, :-1]).to(loss.dtype)
        total += float((loss * counted).sum())
        count += int(counted.sum())
    return math.exp(total / count) if count else float("nan")


def divergence(run: Run, reference: Run, batches: Iterable[Batch]) -> float:
    """Mean Kullback-Leibler divergence of the logits from the original's, in nats a position."""
    total, count = 0.0, 0
    for batch in batches:
        found, expected = run(batch).get("logits"), reference(batch).get("logits")
        if found is None or expected is None:
            raise PipelineError("kl needs a program with logits", hint="choose cosine")
        log_found, log_expected = found.double().log_softmax(-1), expected.double().log_softmax(-1)
        each = (log_expected.exp() * (log_expected - log_found)).sum(-1)
        where = valid(batch, expected)
        each = each[where] if where is not None else each.reshape(-1)
        total += float(each.sum())
        count += each.numel()
    return total / count if count else float("nan")


def cosine_distance(run: Run, reference: Run, batches: Iterable[Batch]) -> float:
    """Mean of one minus the cosine between the first output and the original's, over valid positions."""
    total, count = 0.0, 0
    for batch in batches:
        found, expected = _first(run(batch)), _first(reference(batch))
        each = 1 - F.cosine_similarity(found.double(), expected.double(), dim=-1)
        where = valid(batch, expected)
        each = each[where] if where is not None else each.reshape(-1)
        total += float(each.sum())
        count += each.numel()
    return total / count if count else float("nan")


def _first(outputs: Mapping[str, Any]) -> torch.Tensor:
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dim() >= 2:
            return value
    raise PipelineError("the program has no output with channels to compare")


def measure(metric: str, run: Run, reference: Run, batches: Iterable[Batch]) -> float:
    """Return a metric by name; lower is better for all of them."""
    if metric == "perplexity":
        return perplexity(run, batches)
    if metric == "kl":
        return divergence(run, reference, batches)
    if metric == "cosine":
        return cosine_distance(run, reference, batches)
    raise PipelineError(f"there is no metric {metric!r}", hint=f"metrics are {', '.join(METRICS)}")


def relative_loss(metric: str, value: float, original: float) -> float:
    """Return the loss a budget speaks of: the relative increase of a positive metric, or the distance."""
    if metric in ("kl", "cosine"):
        return value
    return value / original - 1.0 if original else value
