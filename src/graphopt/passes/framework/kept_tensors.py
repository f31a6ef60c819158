"""Tensors that a plan was made with: too large for its text, kept in memory and in the work directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ...ir.errors import PipelineError
from ...ir.weights import InMemory, digest

_KEPT: dict[str, dict[str, torch.Tensor]] = {}
_MOST = 64  # a process that plans for days does not grow


def keep(found: dict[str, torch.Tensor], work_dir: Path | None, kind: str) -> str:
    """Keep tensors for the rewrite; return what a plan calls them: a key, or a file where there is a work directory.

    The key is a hash of their names and values, so that a plan never meets what was made for another one.

    Args:
        found: by name.
        work_dir: of the run.
        kind: the first part of the file's name.
    """
    names = "\n".join(f"{name} {digest(found[name])}" for name in sorted(found))
    key = f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:24]}"
    _KEPT.pop(key, None)
    _KEPT[key] = found
    while len(_KEPT) > _MOST:
        _KEPT.pop(next(iter(_KEPT)))
    if work_dir is None:
        return key
    from ...ir.storage.safetensors_file import write_file

    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{key}.safetensors"
    write_file(path, {name: InMemory(tensor.contiguous()) for name, tensor in found.items()})
    return str(path)


def kept(where: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a plan speaks of.

    Raises:
        PipelineError: they are not to be had any more.
    """
    key = Path(where).name.removesuffix(".safetensors")
    if key in _KEPT:
        return _KEPT[key]
    if Path(where).is_file():
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = load_file(where)
        return found
    raise PipelineError(
        f"what the plan was made with ({where}) is not there",
        hint="plan again with data; with work_dir it is kept in a file",
    )
