"""The state of a training run on disk: one safetensors file that is always complete, whenever the process dies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from ..ir.errors import CheckpointError, UsageError
from ..ir.storage.atomic import atomic_file
from .settings import Settings

FILE = "training.safetensors"
_LOCK = "training.lock"


@dataclass
class Record:
    """Record of a training run: one loss per step, and the values measured during the run.

    Args:
        losses: mean loss of each step.
        seconds: wall time spent in training, over all sessions.
        measured: (step, values by name) of each measurement.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.losses)


def save_state(
    folder: Path, module: nn.Module, optimizer: Optimizer, record: Record, settings: Settings
) -> None:
    """Write weights, optimizer state and record; the old state is kept until the new one is on disk."""
    tensors, numbers = _optimizer_state(module, optimizer)
    for name, tensor in _distinct(module).items():
        tensors[f"module.{name}"] = tensor
    plain = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    header = {"settings": settings.plain(), "record": asdict(record), "optimizer": numbers}
    with atomic_file(folder / FILE) as path:
        save_file(plain, str(path), metadata={"graphopt.training": json.dumps(header)})


def load_state(folder: Path, module: nn.Module, optimizer: Optimizer, settings: Settings) -> Record:
    """Restore a run and return its record, or an empty record if the folder holds no run.

    Raises:
        UsageError: the folder holds a run with other settings, or of another module.
        CheckpointError: the state file is damaged.
    """
    for partial in folder.glob(f".{FILE}.*.partial"):
        partial.unlink(missing_ok=True)
    path = folder / FILE
    if not path.is_file():
        return Record()
    hint = f"start a new run in another folder, or remove {path}"
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["graphopt.training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = Record(**header["record"])
        record.measured = [(int(step), values) for step, values in record.measured]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not the state of a training run: {error}", hint=hint) from error
    changed = settings.differences(header["settings"])
    if changed:
        raise UsageError(f"{folder} holds a run with other settings: {'; '.join(changed)}", hint=hint)
    _restore(module, tensors, path, hint)
    _restore_optimizer(module, optimizer, tensors, header["optimizer"])
    return record


def _distinct(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, tied ones once."""
    seen: set[int] = set()
    distinct = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            distinct[name] = tensor
    return distinct


def _restore(module: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path, hint: str) -> None:
    for name, tensor in _distinct(module).items():
        saved = tensors.get(f"module.{name}")
        if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            in_file = "nothing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
            raise UsageError(
                f"{path} was written for another module: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"the file has {in_file}",
                hint=hint,
            )
        with torch.no_grad():
            tensor.copy_(saved)


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _optimizer_state(
    module: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Split an optimizer's state into tensors and plain numbers, both by parameter name."""
    names = _names(module)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}:{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _restore_optimizer(
    module: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Mapping[str, Any]],
) -> None:
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").rsplit(":", 1)
            target = parameters[parameter]
            # a step count stays on the device where the optimizer reads it
            device = target.device if value.dim() or target.device.type != "cpu" else value.device
            optimizer.state[target][key] = value.to(device)
    for parameter, state in numbers.items():
        optimizer.state[parameters[parameter]].update(state)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the system releases the lock however the process ends.

    Raises:
        UsageError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another process is training in {folder}", hint="wait for it, or choose another folder"
            ) from None
        yield
