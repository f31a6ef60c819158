"""Metrics of a program's quality: perplexity, accuracy, divergence from the original."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from ..ir.errors import PipelineError
from ..ir.program import Program

Batch = Mapping[str, torch.Tensor]
Outputs = Mapping[str, Any]
Run = Callable[[Batch], Outputs]

_VALUES_AT_ONCE = 1 << 21
"""Number of values that are widened to float64 at a time."""

METRICS = ("perplexity", "kl", "cosine")
"""Metrics for budgets and scores; lower is better."""


class Metric(ABC):
    """A mean over positions, accumulated batch by batch."""

    compares: ClassVar[bool] = False  # needs the outputs of another program beside these
    needs: ClassVar[str] = "a program with input_ids and logits"

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    @abstractmethod
    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric.

        Raises:
            PipelineError: the program lacks outputs that the metric needs.
        """

    def value(self) -> float:
        """Return the metric over all counted positions; NaN if there are none."""
        return self.total / self.count if self.count else float("nan")

    def _logits(self, outputs: Outputs | None) -> torch.Tensor:
        logits = (outputs or {}).get("logits")
        if not isinstance(logits, torch.Tensor) or logits.dim() < 2:
            raise PipelineError(
                f"{type(self).__name__.lower()} needs {self.needs}", hint="choose kl or cosine"
            )
        return logits


def valid(batch: Batch, like: torch.Tensor) -> torch.Tensor | None:
    """Return the mask of positions that count; None if there is no mask or the outputs have no positions."""
    mask = batch.get("attention_mask")
    if mask is None or like.dim() < 3 or like.shape[:2] != mask.shape:
        return None
    return mask.bool()


def _next_tokens(
    metric: Metric, batch: Batch, outputs: Outputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, the tokens they should predict, and which of them count."""
    logits = metric._logits(outputs)
    if "input_ids" not in batch or logits.shape[:2] != batch["input_ids"].shape:
        raise PipelineError(
            f"{type(metric).__name__.lower()} needs {metric.needs}", hint="choose kl or cosine"
        )
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    counted = torch.ones_like(ids[:, 1:]) if mask is None else mask[:, 1:] * mask[:, :-1]
    return logits[:, :-1], ids[:, 1:], counted.bool()


class Perplexity(Metric):
    """``exp`` of the mean negative log likelihood of each next token, over positions that are not padding."""

    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric."""
        logits, ids, counted = _next_tokens(self, batch, outputs)
        rows, following, counted_rows = logits.flatten(0, -2), ids.flatten(), counted.flatten()
        for rows_slice in _row_slices(rows):
            losses = F.cross_entropy(rows[rows_slice].double(), following[rows_slice], reduction="none")
            self.total += float(losses[counted_rows[rows_slice]].sum())
        self.count += int(counted.sum())

    def value(self) -> float:
        """Return the perplexity; infinite if a token had probability 0."""
        mean = super().value()
        return math.exp(mean) if not mean > 700 else float("inf")


class Accuracy(Metric):
    """Share of next tokens that had the highest logit, over positions that are not padding."""

    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric."""
        logits, ids, counted = _next_tokens(self, batch, outputs)
        self.total += int((logits.argmax(-1) == ids)[counted].sum())
        self.count += int(counted.sum())


class Divergence(Metric):
    """Mean Kullback-Leibler divergence of the logits from the original's, in nats per position."""

    compares = True
    needs = "a program with logits"

    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric."""
        logits, expected = self._logits(outputs), self._logits(reference)
        rows, expected_rows = logits.flatten(0, -2), expected.flatten(0, -2)
        divergences = [
            _divergence_terms(
                expected_rows[rows_slice].double().log_softmax(-1), rows[rows_slice].double().log_softmax(-1)
            ).sum(-1)
            for rows_slice in _row_slices(expected_rows)
        ]
        _count(self, batch, expected, torch.cat(divergences).reshape(expected.shape[:-1]))


def _row_slices(rows: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows of logits; all at once in float64, with a large vocabulary, would need more than a model."""
    step = max(1, _VALUES_AT_ONCE // max(1, rows.shape[-1]))
    for start in range(0, max(1, rows.shape[0]), step):
        yield slice(start, start + step)


def _divergence_terms(log_expected: torch.Tensor, log_found: torch.Tensor) -> torch.Tensor:
    """Return the terms of a divergence; a token that the original gives probability 0 contributes nothing."""
    terms = log_expected.exp() * (log_expected - log_found)
    return torch.where(log_expected == float("-inf"), torch.zeros_like(terms), terms)


class Agreement(Metric):
    """Share of positions where the highest logit is the original's."""

    compares = True
    needs = "a program with logits"

    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric."""
        logits, expected = self._logits(outputs), self._logits(reference)
        _count(self, batch, expected, (logits.argmax(-1) == expected.argmax(-1)).double())


class Cosine(Metric):
    """Mean of one minus the cosine between the first output and the original's, over valid positions."""

    compares = True

    def add(self, batch: Batch, outputs: Outputs, reference: Outputs | None = None) -> None:
        """Add a batch to the metric."""
        value, expected = _first(outputs), _first(reference or {})
        distances = 1 - F.cosine_similarity(value.double(), expected.double(), dim=-1)
        _count(self, batch, expected, distances)


def _count(metric: Metric, batch: Batch, like: torch.Tensor, values: torch.Tensor) -> None:
    mask = valid(batch, like)
    values = values[mask] if mask is not None else values.reshape(-1)
    metric.total += float(values.sum())
    metric.count += values.numel()


def _first(outputs: Outputs) -> torch.Tensor:
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dim() >= 2:
            return value
    raise PipelineError("the program has no output with channels to compare")


BY_NAME: dict[str, type[Metric]] = {
    "perplexity": Perplexity,
    "accuracy": Accuracy,
    "kl": Divergence,
    "agreement": Agreement,
    "cosine": Cosine,
}


def default_metric(program: Program) -> str:
    """Return the default metric of a program: perplexity if it predicts tokens, else distance to the original."""
    inputs, outputs = program.signature.inputs, program.signature.output_names
    return (
        "perplexity"
        if "logits" in outputs and "input_ids" in inputs and program.origin.padding == "causal"
        else "cosine"
    )


def measure_all(
    names: Iterable[str], run: Run, reference: Run | None, batches: Iterable[Batch]
) -> dict[str, float]:
    """Return several metrics by name from one run over the data.

    Args:
        names: names of metrics in ``BY_NAME``.
        run: computes a program's outputs for a batch.
        reference: the same for the original; run only if a metric compares.
        batches: the data.

    Raises:
        PipelineError: there is no such metric, or the program lacks outputs that it needs.
    """
    metrics: dict[str, Metric] = {}
    for name in names:
        if name not in BY_NAME:
            raise PipelineError(f"there is no metric {name!r}", hint=f"metrics are {', '.join(BY_NAME)}")
        metrics[name] = BY_NAME[name]()
    compares = [name for name, metric in metrics.items() if metric.compares]
    if compares and reference is None:
        raise PipelineError(
            f"{', '.join(compares)} compares with another program", hint="say which: against="
        )
    for batch in batches:
        outputs = run(batch)
        other = reference(batch) if compares and reference is not None else None
        for metric in metrics.values():
            metric.add(batch, outputs, other)
    return {name: metric.value() for name, metric in metrics.items()}


def measure(metric: str, run: Run, reference: Run, batches: Iterable[Batch]) -> float:
    """Return one metric by name."""
    return measure_all([metric], run, reference, batches)[metric]


def relative_loss(metric: str, value: float, original: float) -> float:
    """Return the loss that a budget limits: the relative increase of a positive metric, or the distance."""
    if metric in ("kl", "cosine"):
        return value
    return value / original - 1.0 if original else value
