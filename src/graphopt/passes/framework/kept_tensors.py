"""Tensors that a plan refers to: too large for its text, stored in memory and in the work directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ...ir.errors import PipelineError
from ...ir.weights import InMemory, digest

_TENSORS_BY_KEY: dict[str, dict[str, torch.Tensor]] = {}
_MOST_ENTRIES = 64  # bounds the memory of a process that plans for days


def keep(tensors: dict[str, torch.Tensor], work_dir: Path | None, kind: str) -> str:
    """Store tensors for the rewrite and return their reference in a plan: a key, or a path in the work directory.

    The key is a hash of their names and values, so that a plan never reads tensors of another one.

    Args:
        tensors: the tensors by name.
        work_dir: the run's work directory, or None.
        kind: prefix of the key and file name.
    """
    names = "\n".join(f"{name} {digest(tensors[name])}" for name in sorted(tensors))
    key = f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:24]}"
    _TENSORS_BY_KEY.pop(key, None)
    _TENSORS_BY_KEY[key] = tensors
    while len(_TENSORS_BY_KEY) > _MOST_ENTRIES:
        _TENSORS_BY_KEY.pop(next(iter(_TENSORS_BY_KEY)))
    if work_dir is None:
        return key
    from ...ir.storage.safetensors_file import write_file

    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{key}.safetensors"
    write_file(path, {name: InMemory(tensor.contiguous()) for name, tensor in tensors.items()})
    return str(path)


def kept(where: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a plan refers to.

    Raises:
        PipelineError: they are no longer available.
    """
    key = Path(where).name.removesuffix(".safetensors")
    if key in _TENSORS_BY_KEY:
        return _TENSORS_BY_KEY[key]
    if Path(where).is_file():
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = load_file(where)
        return tensors
    raise PipelineError(
        f"the tensors that the plan refers to ({where}) are not there",
        hint="plan again with data; with work_dir they are stored in a file",
    )
