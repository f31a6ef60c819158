"""Training programs by recipes: data, training variant, loop, and the trained program."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.reading import read_data
from ..ir.errors import CheckpointError, PipelineError, UsageError
from ..ir.groups import rank, world_size
from ..ir.program import Model, Program, as_program
from ..ir.ranks.rank_programs import ranks_of
from ..ir.running.retype import retyped
from ..ir.storage.atomic import atomic_file
from ..ir.storage.content import whole_hash
from ..ir.vocabulary import kept_tokens
from ..measure.context import Context
from ..passes.framework.pipeline import parse_calls
from . import Record, Settings
from . import train as train_module
from .loop import default_device
from .recipes import Method, Recipe, find_method
from .shown import TrainingProgress
from .state import FILE as STATE

HALVES = {torch.float16, torch.bfloat16}
Batch = Mapping[str, torch.Tensor]
Source = str | os.PathLike[str] | Iterable[Batch]


def as_method(recipe: str | Method) -> Method:
    """Return a training method given as an object or as text such as ``"dynamoe{theta=0.9}"``.

    Raises:
        PipelineError: the text names no recipe, or an option is wrong.
    """
    if isinstance(recipe, Method):
        return recipe
    calls = parse_calls(recipe, "a recipe")
    if len(calls) != 1:
        raise PipelineError(f"one recipe trains a program at a time, not {len(calls)}")
    return find_method(*calls[0])


def train(
    model: Model | Program,
    recipe: str | Method,
    data: Source,
    settings: Settings,
    *,
    batch: int = 8,
    length: int = 256,
    sequences: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    validation: Source | None = None,
    measure_every: int = 0,
    save_every: float = 60.0,
    loss_on: str = "all",
    progress: TrainingProgress | None = None,
) -> tuple[Program, Record]:
    """Train a program by a recipe and return the trained program and the record of the run.

    With a ``work_dir`` an interrupted run resumes, and ends with the same weights. Under torchrun each process takes
    its own batches and gradients are averaged.

    Args:
        model: what :func:`graphopt.capture` takes; it is not modified.
        recipe: a method, or its text: ``"dynamoe{theta=0.9}"``, ``"phds{anchor=1}"``, ``"language"``.
        data: a .jsonl, .txt or .npz file, or batches of inputs by name; repeated, reshuffled, as often as needed.
        settings: steps, learning rate and so on.
        batch: rows per batch, for data read from a file.
        length: maximum number of tokens per row.
        sequences: maximum number of rows; None takes all.
        work_dir: where the state is saved.
        device: where to train; None takes a GPU if there is one.
        dtype: type of weights and arithmetic during training: "float32", because small updates vanish in sixteen bits, or
            "stored". The result has the stored types.
        validation: data on which the recipe's loss is also recorded.
        measure_every: steps between such measurements; 0 measures at the end.
        save_every: seconds between saved states.
        loss_on: "all" tokens, or only those of the "assistant" if the data are conversations.
        progress: notified after every step.

    Raises:
        PipelineError: the recipe's text is wrong.
        UsageError: the program lacks what the recipe trains, or there is no data.
    """
    method = as_method(recipe)
    program = as_program(model)
    if ranks_of(program) and world_size() > 1:
        raise UsageError(
            "a sharded program cannot be trained over several processes",
            hint="train the program first, then shard it",
        )
    if kept_tokens(program, "logits") is not None:
        raise UsageError(
            "a program with a trimmed vocabulary cannot be trained on text that has other tokens",
            hint="train it first, then run trim-vocabulary",
        )
    rows = _batches(program, data, batch, length, sequences, settings.seed, loss_on)
    prepared = method.recipe(_typed(program, dtype))
    module = prepared.module()
    if work_dir is not None:
        _require_same_run(Path(work_dir), program, method, rows)
    target_device = torch.device(device or default_device())
    total = settings.steps * settings.accumulate * world_size()

    def numbered(number: int) -> Batch:
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(settings.seed * 7919 + number // len(rows))
        )
        row = {
            name: tensor.to(target_device) for name, tensor in rows[int(order[number % len(rows)])].items()
        }
        return prepared.transform(row, number / total)

    measure = None
    if validation is not None:
        validation_rows = _batches(program, validation, batch, length, sequences, settings.seed, loss_on)

        def measure(trained: nn.Module) -> dict[str, float]:
            return {"validation loss": _mean_loss(prepared, trained, validation_rows, settings.seed)}

    record = train_module(
        module, numbered, prepared.loss, settings, work_dir=work_dir, device=target_device, measure=measure,
        measure_every=measure_every, save_every=save_every, progress=progress,
    )  # fmt: skip
    judging_rows = (
        rows
        if validation is None
        else _batches(program, validation, batch, length, sequences, settings.seed, loss_on)
    )
    trained_program = prepared.after(prepared.finish(program, module), judging_rows[:4])
    trained_program.history.append(
        {
            "recipe": _method_text(method),
            "contract": "trained",
            "steps": settings.steps,
            "settings": settings.plain(),
            "loss": record.losses[-1],
        }
    )
    return trained_program, record


def _typed(program: Program, dtype: str) -> Program:
    if dtype not in ("float32", "stored"):
        raise UsageError(f"dtype is float32 or stored, not {dtype!r}")
    dtypes = {w.source.dtype for w in program.weights.values() if w.source.dtype.is_floating_point}
    return retyped(program, torch.float32) if dtype == "float32" and dtypes & HALVES else program


def _require_same_run(folder: Path, program: Program, method: Method, rows: list[Batch]) -> None:
    identity = {
        "recipe": _method_text(method), "program": whole_hash(program), "data": Context(rows).data_hash(),
        "number of processes": world_size(),
    }  # fmt: skip
    require_same_run(folder, identity)


def require_same_run(folder: Path, identity: Mapping[str, object], state: str = STATE) -> None:
    """Record what identifies a run in a folder, or refuse the folder of another run.

    Args:
        folder: is made.
        identity: what must be the same, by what it is called in the message.
        state: the file that is there once something was trained, as a pattern.

    Raises:
        UsageError: the folder holds a run of another identity.
        CheckpointError: what it holds cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file() or not any(folder.glob(state)):  # nothing was trained there yet
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(identity, indent=1))
        return
    try:
        saved = json.loads(path.read_text())
        differing = [name for name, value in identity.items() if saved.get(name) != value]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not say what was trained: {error}", hint="remove the folder"
        ) from None
    if differing:
        raise UsageError(
            f"{folder} holds a run with another {' and another '.join(differing)}",
            hint="start a new run in another folder, or remove this one",
        )


def _method_text(method: Method) -> str:
    from ..ir.option import default_of, options_of
    from ..passes.framework.values import format_value

    options = {
        n: getattr(method, n)
        for n, f in options_of(type(method)).items()
        if getattr(method, n) != default_of(f)
    }
    return method.name + (
        "{" + " ".join(f"{n}={format_value(v)}" for n, v in options.items()) + "}" if options else ""
    )


def _batches(
    program: Program,
    data: Source,
    batch: int,
    length: int,
    sequences: int | None,
    seed: int,
    loss_on: str,
) -> list[Batch]:
    if not isinstance(data, (str, os.PathLike)):
        data = list(data)
    rows: list[Any] = list(
        read_data(program, data, sequences=sequences, length=length, batch=batch, seed=seed, loss_on=loss_on)[
            0
        ]
    )
    if not rows:
        raise UsageError("there is no data to train on")
    return rows


def _mean_loss(recipe: Recipe, module: nn.Module, rows: list[Batch], seed: int) -> float:
    device = next(module.parameters()).device
    total = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, row in enumerate(rows):
            torch.manual_seed(seed * 1_000_003 + number)
            inputs = recipe.transform({n: t.to(device) for n, t in row.items()}, 1.0)
            inputs = {n: t.to(device) for n, t in inputs.items()}
            total += float(recipe.loss(module, inputs))
    return total / len(rows)


__all__ = ["as_method", "train"]
