"""Hashes of a program with all values of its weights, for reusing results of other runs."""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import TYPE_CHECKING, Any

from ..weights import Absent, InMemory, SafetensorsEntry, TensorSource, digest

if TYPE_CHECKING:
    from ..program import Program

_HASHES: dict[int, tuple[weakref.ref[TensorSource], Any, str]] = {}


def whole_hash(program: Program) -> str:
    """Return a hash of a program's graph and of all values of its weights.

    Every byte counts, since name, size and date of a file do not identify a fine-tuned copy. Tensors
    are read one at a time, and a source that this process hashed before is not read again.
    """
    seen = hashlib.sha256(program.text().encode())
    for name in sorted(program.weights):
        seen.update(f"{name} {source_hash(program.weights[name].source)}\n".encode())
    return seen.hexdigest()[:16]


def source_hash(source: TensorSource) -> str:
    """Return a hash of the type, shape and values of one tensor."""
    if isinstance(source, Absent):
        return f"{tuple(source.shape)} {source.dtype} without values"
    state = _state(source)
    cached = _HASHES.get(id(source))
    if cached is not None and cached[0]() is source and cached[1] == state and state is not None:
        return cached[2]
    value_hash = digest(source.load())
    key = id(source)
    _HASHES[key] = (weakref.ref(source, lambda _: _HASHES.pop(key, None)), state, value_hash)
    return value_hash


def _state(source: TensorSource) -> Any:
    """Return a value that changes when the source's data is written to; None where that cannot be detected."""
    if isinstance(source, InMemory):
        return None if source.tensor.is_inference() else source.tensor._version
    if isinstance(source, SafetensorsEntry):
        status = os.stat(source.path)
        return (status.st_ino, status.st_size, status.st_mtime_ns)
    return None
