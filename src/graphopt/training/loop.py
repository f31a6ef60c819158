"""The training loop: batch, loss, update, and a state on disk from which it resumes after any interruption."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..ir.errors import GraphoptError
from ..ir.groups import started_by_torchrun
from .replicas import Replicas
from .settings import Settings, adamw
from .shown import Quiet, TrainingProgress
from .state import Record, load_state, locked, save_state

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


class DivergedError(GraphoptError):
    """The loss is no longer finite."""

    exit_code = 5


def train(
    module: nn.Module,
    batch: Callable[[int], Batch],
    loss: Loss,
    settings: Settings,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    measure_every: int = 0,
    save_every: float = 60.0,
    progress: TrainingProgress | None = None,
) -> Record:
    """Train a module in place and return the record of the run.

    With a ``work_dir`` the run resumes where it stopped, after Ctrl-C, ``kill -9`` or a power cut, and ends
    with the weights that an uninterrupted run would have had, as long as the device and the number of
    threads are the same: batches and random numbers depend only on the step.

    Under torchrun every process trains a copy (DistributedDataParallel): n processes take n times as many batches per
    step, and average their gradients; the first saves the state, and all must see the same folder.

    Args:
        module: the module to train; parameters that do not require gradients are not changed.
        batch: returns batch number n, counted from 0 over the whole run; always the same for the same n.
        loss: returns the mean loss of a batch.
        settings: steps, learning rate and so on.
        work_dir: where the state is saved; None saves none.
        device: where to train; None takes a GPU if there is one.
        optimizer: creates the optimizer; None creates AdamW.
        measure: returns values worth recording, such as a validation loss; called in evaluation mode.
        measure_every: steps between measurements; 0 measures only at the end.
        save_every: seconds between saved states.
        progress: notified after every step.

    Raises:
        UsageError: the folder holds another run, or another process is training there.
        CheckpointError: the state in the folder is damaged.
        DivergedError: the loss became infinite or NaN; the last saved state is from before that.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    target = torch.device(device or default_device())
    replicas = Replicas(target)
    module.to(target)
    update = (optimizer or adamw(settings))(module)
    folder = Path(work_dir) if work_dir is not None else None
    reporter = progress or Quiet()
    if replicas.rank:
        reporter = Quiet()
    with contextlib.ExitStack() as stack:
        record = Record()
        if folder is not None:
            if replicas.rank == 0:
                stack.enter_context(locked(folder))
            replicas.wait()
            record = load_state(folder, module, update, settings)
            replicas.wait()
        wrapped = replicas.wrap(module)
        # the seeds set below must not affect the caller's random numbers
        stack.enter_context(torch.random.fork_rng(devices=[target] if target.type == "cuda" else []))
        stopped = stack.enter_context(_stop_between_steps())
        stack.callback(reporter.end)
        reporter.begin(settings.steps, record.step)
        saved = began = time.monotonic()

        def save() -> None:
            nonlocal saved, began
            now = time.monotonic()
            record.seconds += now - began
            saved = began = now
            if folder is not None and replicas.rank == 0:
                save_state(folder, module, update, record, settings)

        was_training = module.training
        stack.callback(module.train, was_training)
        while record.step < settings.steps:
            value, stopping = _step(
                wrapped, batch, loss, update, settings, record.step, replicas, stopped.is_set()
            )
            record.losses.append(value)
            note = ""
            last = record.step == settings.steps
            if measure is not None and (last or (measure_every and record.step % measure_every == 0)):
                values = _measure(module, measure)
                record.measured.append((record.step, values))
                note = ", ".join(f"{name} {v:.4g}" for name, v in values.items())
            reporter.step(record.step, value, note)
            if last or stopping or time.monotonic() - saved > save_every:
                save()
            if stopping and not last:
                raise KeyboardInterrupt(f"stopped after step {record.step}")
    return record


def default_device() -> str:
    """Return this process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if started_by_torchrun() else "cuda"


def _step(
    module: nn.Module,
    batch: Callable[[int], Batch],
    loss: Loss,
    update: Optimizer,
    settings: Settings,
    step: int,
    replicas: Replicas,
    stop: bool,
) -> tuple[float, bool]:
    module.train()
    for group in update.param_groups:
        group["lr"] = settings.rate(step)
    total = 0.0
    for part in range(settings.accumulate):
        number = (step * settings.accumulate + part) * replicas.size + replicas.rank
        # dropout and other random operators must draw the same numbers after a resumption
        torch.manual_seed(settings.seed * 1_000_003 + number)
        with replicas.apart(module, part + 1 < settings.accumulate):
            inputs = {name: t.to(replicas.device) for name, t in batch(number).items()}
            value = loss(module, inputs) / settings.accumulate
            value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    total, stop = replicas.agree(total, stop)
    if not math.isfinite(total):
        raise DivergedError(
            f"the loss is {total} at step {step + 1}",
            hint="lower the learning rate, or warm up longer; the state on disk is from an earlier step",
        )
    if settings.clip:
        nn.utils.clip_grad_norm_([p for g in update.param_groups for p in g["params"]], settings.clip)
    update.step()
    update.zero_grad(set_to_none=True)
    return total, stop


def _measure(module: nn.Module, measure: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
    module.eval()
    with torch.no_grad():
        return {name: float(value) for name, value in measure(module).items()}


@contextlib.contextmanager
def _stop_between_steps() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that no step is cut short; the second Ctrl-C interrupts."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous: Any = signal.signal(signal.SIGINT, on_signal)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
