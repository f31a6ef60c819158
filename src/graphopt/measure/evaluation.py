"""Measuring the quality of a program on the user's data."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..data.reading import read_data
from ..ir.errors import GraphoptError, UsageError
from ..ir.facts import SkippedWhileDecoding
from ..ir.inputs import standing_at
from ..ir.program import Model, Program, as_program
from ..ir.running.execute import run
from ..ir.running.retype import retyped
from ..ir.vocabulary import kept_tokens, over_all_tokens
from .context import Context, Progress
from .metrics import BY_NAME, Batch, default_metric, measure_all

Judge = Callable[..., float | Mapping[str, float]]
DECODING = "decoding"
DTYPES = {"stored": None, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Args:
        values: results by metric.
        rows: number of rows of data.
        tokens: number of tokens that are not padding; 0 if the data is no text.
        seconds: duration of the evaluation.
        sample: one row as text.
    """

    values: dict[str, float]
    rows: int
    tokens: int
    seconds: float
    sample: str = field(default="", repr=False)


def evaluate(
    model: Model | Program,
    data: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    metrics: str | Judge | Sequence[str | Judge] = (),
    *,
    against: Model | Program | None = None,
    sequences: int | None = None,
    length: int = 2048,
    batch: int = 8,
    dtype: str = "stored",
    progress: Progress | None = None,
) -> Evaluation:
    """Return metrics of a model on data.

    Text for a model that predicts tokens is joined and divided into rows of ``length`` tokens (no more than the
    model supports); each row is read from its beginning, and its first token is not predicted.
    Perplexity is ``exp`` of the mean negative log likelihood of all other tokens; ``accuracy`` the share of
    them that had the highest logit; ``bits_per_byte`` the same likelihood per byte of text, which does not
    depend on the tokenizer. Against another model: ``kl``, ``agreement``, ``cosine``.

    A program that skips layers for the tokens after a prompt (``skip-layers{phase=decode}``) is measured twice: as it reads
    prompts, and, under names that end in ``_decoding``, as it decodes. One whose vocabulary was trimmed
    (``trim-vocabulary``) gives all other tokens probability 0: ``outside_vocabulary`` is their share, and its perplexity
    is infinite if there are any.

    Args:
        model: anything that :func:`graphopt.capture` accepts.
        data: a .jsonl, .txt or .npz file, or batches of inputs by name.
        metrics: names, and functions of ``(program)`` or ``(program, batches)`` that return a number or
            numbers by name. None means perplexity and accuracy for models that predict tokens, else the
            distance to ``against``.
        against: the original, for metrics that compare.
        sequences: maximum number of rows, from the file's beginning; None takes all.
        length: maximum number of tokens per row.
        batch: rows per batch.
        dtype: "stored", or "float32" or "float64" to compute in a wider type.
        progress: notified of every batch.

    Raises:
        UsageError: an option, the data or a user's function is wrong.
        PipelineError: the model lacks outputs that a metric needs.
    """
    program = _retyped(as_program(model), dtype)
    reference = _retyped(as_program(against), dtype) if against is not None else None
    if not isinstance(data, (str, os.PathLike)):
        data = list(data)
    batches, sample = read_data(program, data, sequences=sequences, length=length, batch=batch, shuffle=False)
    if not batches:
        raise UsageError("there is no data to evaluate on")
    chosen_metrics = [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)
    chosen_metrics = chosen_metrics or list(_defaults(program, reference))
    began = time.perf_counter()
    values: dict[str, float] = {}
    for phase, phase_program in _phases(program).items():
        results = _named_metrics(
            phase_program, reference, batches, [m for m in chosen_metrics if isinstance(m, str)], progress
        )
        for judge in chosen_metrics:
            if not isinstance(judge, str):
                results |= _user_metric(judge, phase_program, batches)
        values |= {name + phase: value for name, value in results.items()}
    values |= _share_outside_vocabulary(program, batches)
    rows, tokens = _count_rows_and_tokens(batches)
    return Evaluation(values, rows, tokens, time.perf_counter() - began, sample)


def _phases(program: Program) -> dict[str, Program]:
    """Return the programs to measure, by the suffix of their metrics' names: two if layers are skipped while decoding."""
    if SkippedWhileDecoding not in program.facts or DECODING not in program.dials:
        return {"": program}
    return {"": program, f"_{DECODING}": standing_at(program, DECODING, 1.0)}


def _share_outside_vocabulary(program: Program, batches: Sequence[Batch]) -> dict[str, float]:
    """Return the share of the tokens outside a trimmed vocabulary, which the program gives probability 0."""
    ids = kept_tokens(program, "logits")
    if ids is None:
        return {}
    total = outside = 0
    for batch in batches:
        if "input_ids" in batch:
            following = batch["input_ids"][:, 1:]
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            counted = (mask[:, 1:] * mask[:, :-1]).bool()
            total += int(counted.sum())
            outside += int((~torch.isin(following, ids) & counted).sum())
    return {"outside_vocabulary": outside / total} if total else {}


def _defaults(program: Program, reference: Program | None) -> Sequence[str | Judge]:
    if default_metric(program) == "perplexity":
        return ["perplexity", "accuracy"] + (["kl", "agreement"] if reference is not None else [])
    if reference is None:
        raise UsageError(
            "this model predicts no next token, so there is nothing to measure it by alone",
            hint="give --against ORIGINAL (against=) for the distance to it, or a function of your own: "
            "--metric FILE.py:FUNCTION (metrics=)",
        )
    return ["cosine"]


def _retyped(program: Program, dtype: str) -> Program:
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {', '.join(DTYPES)}, not {dtype!r}")
    target = DTYPES[dtype]
    return program if target is None else retyped(program, target)


def _named_metrics(
    program: Program,
    reference: Program | None,
    batches: Sequence[Batch],
    names: Sequence[str],
    progress: Progress | None,
) -> dict[str, float]:
    if not names:
        return {}
    bits = "bits_per_byte" in names
    plain = list(dict.fromkeys("perplexity" if n == "bits_per_byte" else n for n in names))
    unknown = [n for n in plain if n not in BY_NAME]
    if unknown:
        raise UsageError(
            f"there is no metric {unknown[0]!r}",
            hint=f"metrics are {', '.join([*BY_NAME, 'bits_per_byte'])}, or FILE.py:FUNCTION",
        )
    context = Context()

    def runner(model: Program) -> Callable[[Batch], Mapping[str, Any]]:
        return lambda inputs: over_all_tokens(model, run(model, context.bound(model, inputs)))

    results = measure_all(
        plain, runner(program), runner(reference) if reference else None, _counted(batches, progress)
    )
    if bits:
        results["bits_per_byte"] = math.log2(results["perplexity"]) / _bytes_per_token(program, batches)
    return {name: results[name] for name in names}


def _counted(batches: Sequence[Batch], progress: Progress | None) -> Iterator[Batch]:
    if progress is None:
        yield from batches
        return
    progress.start("evaluating", len(batches))
    try:
        for batch in batches:
            yield batch
            progress.step()
    finally:
        progress.done()


def _bytes_per_token(program: Program, batches: Sequence[Batch]) -> float:
    from ..data.tokenizer import Tokenizer

    if "tokenizer.json" not in program.origin.assets:
        raise UsageError(
            "bits_per_byte counts the bytes of text, and this program has no tokenizer that writes any",
            hint="perplexity needs none",
        )
    tokenizer = Tokenizer(program)
    size = count = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        for index, row in enumerate(batch["input_ids"]):
            # the first token is not predicted
            ids = (row[mask[index].bool()] if mask is not None else row)[1:].tolist()
            size += len(tokenizer.decode(ids).encode())
            count += len(ids)
    return size / max(1, count)


def _count_rows_and_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    rows = sum(next(iter(b.values())).shape[0] for b in batches if b)
    tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        ids = batch.get("input_ids")
        tokens += int(mask.sum()) if mask is not None else ids.numel() if ids is not None else 0
    return rows, tokens


def _user_metric(judge: Judge, program: Program, batches: Sequence[Batch]) -> dict[str, float]:
    name = getattr(judge, "__name__", type(judge).__name__)
    argument_count = len(
        [
            p
            for p in inspect.signature(judge).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    )
    if argument_count not in (1, 2):
        raise UsageError(
            f"{name} takes {argument_count} arguments; it must take (program) or (program, batches)"
        )
    try:
        result = judge(program) if argument_count == 1 else judge(program, list(batches))
    except GraphoptError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"the metric {name} ended with {type(error).__name__}: {error}",
            source=f"{where.filename}:{where.lineno}: {where.line}",
        ) from error
    try:
        if isinstance(result, Mapping):
            return {str(k): float(v) for k, v in result.items()}
        return {name: float(result)}
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name} returned {result!r}; it must return a number, or numbers by name"
        ) from error


def find_judge(text: str) -> Judge:
    """Return the function that ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` names; its file is run.

    Raises:
        UsageError: there is no such file or function.
    """
    location, _, name = text.rpartition(":")
    if not location or not name.isidentifier():
        raise UsageError(
            f"there is no metric {text!r}",
            hint=f"metrics are {', '.join([*BY_NAME, 'bits_per_byte'])}, or FILE.py:FUNCTION",
        )
    module = _module(location)
    judge = getattr(module, name, None)
    if not callable(judge):
        raise UsageError(f"{location} has no function {name}")
    return judge  # type: ignore[no-any-return]


def _module(location: str) -> ModuleType:
    try:
        if not location.endswith(".py"):
            return importlib.import_module(location)
        path = Path(location)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UsageError(f"there is no file {location}")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{location} cannot be imported: {type(error).__name__}: {error}") from error


__all__ = ["Evaluation", "evaluate", "find_judge"]
