"""Captures of checkpoints, found again in the user's cache folder by what they depend on.

An entry belongs to the names, shapes, types and places of the checkpoint's tensors, to the size and dates of its files, its
configuration, the example, and the versions of all that takes part. What it holds was compared with the model when it was
captured, so one that is found again is not compared, and neither transformers nor the weights are read for it. Small
files beside the weights, such as the tokenizer's, are always read anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import cache
from ..ir.errors import CheckpointError, GraphoptError
from ..ir.facts import Capture
from ..ir.program import Program
from ..ir.storage.packed import pack, unpack
from ..ir.weights import digest
from . import huggingface
from .checkpoint_files import CheckpointFiles

_KIND = "captures"
_PACKAGES = ("transformers", "tokenizers", "safetensors", "gguf", "numpy")
_BESIDE = (".json", ".safetensors", ".gguf")


def capture_cached(
    source: str | os.PathLike[str], inputs: Mapping[str, Any] | None = None, *, dynamic: Any = "auto"
) -> Program:
    """Capture a checkpoint and compare it with its model, or return what an earlier call did of the same.

    Args:
        source: a folder, an id in the local cache, or a GGUF file.
        inputs: an example by name; by default made from the configuration.
        dynamic: "auto", None, or sizes by input and dimension.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        CaptureError: the architecture cannot be captured, or the graph differs from the model.
    """
    files, key = _look(source, inputs, dynamic)
    if files is None or key is None:
        return huggingface.capture_huggingface(source, inputs, dynamic=dynamic)
    program = _found(key, files)
    if program is not None:
        return program
    program = huggingface.capture_huggingface(source, inputs, dynamic=dynamic)
    # what changed while it was captured belongs to no state of the files
    if _look(source, inputs, dynamic)[1] == key:
        try:
            data = pack(program, files.tensors)
        except CheckpointError:  # an operator that no saved program may hold
            data = None
        if data is not None:
            cache.keep(_KIND, key, data)
    return program


def _look(
    source: str | os.PathLike[str], inputs: Mapping[str, Any] | None, dynamic: Any
) -> tuple[CheckpointFiles | None, str | None]:
    """Return the files of a checkpoint and the key of its capture; None for what cannot be cached, or read at all."""
    if cache.folder() is None:
        return None, None
    try:
        files = huggingface.read_checkpoint(huggingface.resolve(source))
        return files, _key(files, inputs, dynamic)
    except (GraphoptError, OSError, TypeError, ValueError):
        # where the checkpoint is at fault, capturing says so
        return None, None


def _found(key: str, files: CheckpointFiles) -> Program | None:
    data = cache.find(_KIND, key)
    if data is None:
        return None
    try:
        program = unpack(data, files.tensors)
    except CheckpointError:
        cache.discard(_KIND, key)
        return None
    capture = program.facts.get(Capture) or Capture()
    program.origin = replace(
        program.origin,
        config=files.config,
        assets=files.assets(),
        recalled="captured before and found in the cache; compared with the model then"
        + (f": {capture.compared}" if capture.compared else ""),
    )
    return program


def _key(files: CheckpointFiles, inputs: Mapping[str, Any] | None, dynamic: Any) -> str:
    return cache.key_of(
        cache.sources(),
        json.dumps([torch.__version__, sys.version, platform.machine(), str(torch.get_default_dtype())]),
        json.dumps([_version(name) for name in _PACKAGES]),
        json.dumps(files.config, sort_keys=True),
        json.dumps([(name, repr(tensor)) for name, tensor in sorted(files.tensors.items())]),
        json.dumps([_state(path) for path in _paths(files)]),
        json.dumps({name: _described(value) for name, value in (inputs or {}).items()} if inputs else None),
        json.dumps(_plain(dynamic)),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _paths(files: CheckpointFiles) -> list[Path]:
    """Return the files that a capture may read, in order."""
    paths = {tensor.path for tensor in files.tensors.values()}
    if files.folder.is_dir():
        paths |= {p for p in files.folder.iterdir() if p.suffix in _BESIDE and p.is_file()}
    return sorted(paths)


def _state(path: Path) -> tuple[str, int, int, int]:
    """Return what changes whenever a file is written or replaced, also by one of the same size and date."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _described(value: Any) -> Any:
    """Return an input as plain data by which an equal one is known.

    Raises:
        TypeError: it is neither a tensor nor plain.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": digest(value)}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"items": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_described(item) for item in value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is not plain")
