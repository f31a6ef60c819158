"""A captured program in one piece of bytes, without the weights that a checkpoint's files hold: for the cache.

It is a safetensors file: the program's document (:mod:`.write`) is in its header, and its tensors are those weights that
are in no file, such as tables of frequencies. All others are named as the checkpoint names them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from ..errors import CheckpointError
from ..program import Program
from ..weights import Absent, InMemory, TensorSource
from .documents import Entry
from .encode import dtype_name, dtype_of
from .read import Reader
from .write import describe_program, require_savable

MOST_BYTES = 64 << 20
"""Most bytes of weights that are in no file; a program with more is not packed."""


def pack(program: Program, tensors: Mapping[str, TensorSource]) -> bytes | None:
    """Return a program as bytes, or None if it has weights that are neither in files nor small.

    Args:
        program: as captured; small files of its checkpoint are left out.
        tensors: of the checkpoint's files, by name.

    Raises:
        CheckpointError: the program cannot be saved.
    """
    require_savable(program)
    names = {source: name for name, source in tensors.items()}
    document = describe_program(program)
    document["origin"]["assets"] = []
    values = {}
    for name, weight in program.weights.items():
        entry, source = document["weights"][name], weight.source
        if isinstance(source, Absent):
            entry["absent"] = [list(source.shape), dtype_name(source.dtype), source.name]
        elif isinstance(source, InMemory):
            values[name] = source.load().contiguous().clone()
        elif source in names:
            entry["tensor"] = names[source]
        else:
            return None
    if sum(value.numel() * value.dtype.itemsize for value in values.values()) > MOST_BYTES:
        return None
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return bytes(save(values, {"program": text}))


def unpack(data: bytes, tensors: Mapping[str, TensorSource]) -> Program:
    """Return the program that :func:`pack` made bytes of.

    Args:
        data: whole, which its keeper knows by a hash.
        tensors: of the checkpoint's files as they are now, by name.

    Raises:
        CheckpointError: it is none, or the files lack a tensor that it reads.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        text = json.loads(data[8 : 8 + length])["__metadata__"]["program"]
        return _Reader(Entry(json.loads(text), "a cached capture"), load(data), tensors).program()
    except CheckpointError:
        raise
    except Exception as error:  # what is damaged can raise any error in the libraries below
        raise CheckpointError(f"a cached capture is damaged: {type(error).__name__}: {error}") from error


class _Reader(Reader):
    def __init__(self, document: Entry, values: Mapping[str, Any], tensors: Mapping[str, TensorSource]):
        super().__init__(Path(), document, {})
        self.tensors, self.kept = tensors, values

    def source(self, name: str, entry: dict[str, Any]) -> TensorSource:
        """Return where the values of a weight are: in a file, in what was packed, or nowhere."""
        if "tensor" in entry:
            source = self.tensors.get(entry["tensor"])
            if source is None:
                raise CheckpointError(f"the checkpoint has no tensor {entry['tensor']!r}")
            return source
        if "absent" in entry:
            shape, dtype, original = entry["absent"]
            return Absent(tuple(int(size) for size in shape), dtype_of(dtype, name), str(original))
        if name not in self.kept:
            raise CheckpointError(f"the weight {name!r} has no values")
        return InMemory(self.kept[name])
