"""Weights, and sources of their values, which are read on demand and one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from .errors import CheckpointError

WeightKind = Literal["parameter", "buffer", "constant"]


class TensorSource(Protocol):
    """A tensor that may not be in memory yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        ...

    def load(self) -> torch.Tensor:
        """Return the values, which must not be written to."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A tensor in memory; shared, never written to."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        """Return the tensor, detached from autograd."""
        return self.tensor.detach()


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of a safetensors file, read on demand.

    It is read, not memory-mapped: a mapping counts as memory of the process for as long as any tensor of the file lives.
    ``start`` is the offset of its first byte in the file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    def load(self) -> torch.Tensor:
        """Return the values, read from the file."""
        size = numel(self.shape) * self.dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                read = file.readinto(raw.numpy().data) if size else 0
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.key!r} from {self.path}: {error}") from error
        if read != size:
            raise CheckpointError(
                f"{self.path} ends within tensor {self.key!r}",
                hint="the file changed since it was opened; restore it, or load the checkpoint again",
            )
        return raw.view(self.dtype).reshape(self.shape)

    def load_part(self, dim: int, start: int, end: int) -> torch.Tensor:
        """Return ``end - start`` entries along a dimension, reading only these from the file."""
        inner = numel(self.shape[dim + 1 :]) * self.dtype.itemsize
        outer, length = numel(self.shape[:dim]), (end - start) * inner
        raw = torch.empty(outer * length, dtype=torch.uint8)
        buffer = memoryview(raw.numpy().data).cast("B") if raw.numel() else memoryview(b"")
        read = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                for row in range(outer if length else 0):
                    file.seek(self.start + row * self.shape[dim] * inner + start * inner)
                    row_read = 0
                    while row_read < length:
                        count = file.readinto(buffer[row * length + row_read : (row + 1) * length])
                        if not count:
                            break
                        row_read += count
                    read += row_read
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.key!r} from {self.path}: {error}") from error
        if read != outer * length:
            raise CheckpointError(
                f"{self.path} ends within tensor {self.key!r}",
                hint="the file changed since it was opened; restore it, or load the checkpoint again",
            )
        return raw.view(self.dtype).reshape(*self.shape[:dim], end - start, *self.shape[dim + 1 :])


def load_part(source: TensorSource, dim: int, start: int, end: int) -> torch.Tensor:
    """Return a part of a tensor along one dimension; if the source supports it, only that part is read."""
    reader = getattr(source, "load_part", None)
    if reader is not None:
        part: torch.Tensor = reader(dim, start, end)
        return part
    return source.load().narrow(dim, start, end - start)


@dataclass(frozen=True)
class Uniform:
    """Uniformly distributed numbers from ``-bound`` to ``bound``, reproducible by seed and drawn on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bound: float
    seed: int

    def load(self) -> torch.Tensor:
        """Return the values, drawn anew."""
        generator = torch.Generator().manual_seed(self.seed)
        return ((torch.rand(self.shape, generator=generator) * 2 - 1) * self.bound).to(self.dtype)


@dataclass(frozen=True)
class Absent:
    """A tensor without values, in a graph captured from a configuration alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""

    def load(self) -> torch.Tensor:
        """Raise a CheckpointError, since there are no values."""
        raise CheckpointError(
            f"weight {self.name!r} has no values: this program was captured without weights",
            hint="capture from a checkpoint folder to run it or to write it out",
        )


@dataclass(frozen=True)
class Drawn:
    """Normally distributed values by seed, for checks that do not use real weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0
    scale: float = 1.0

    def load(self) -> torch.Tensor:
        """Return the values, drawn anew."""
        generator = torch.Generator().manual_seed(self.seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if not self.dtype.is_floating_point:
            return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)
        return (torch.randn(self.shape, generator=generator, dtype=wide) * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros, made on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model: its name, the names tied to it, and the source of its values.

    ``names`` lists every name the tensor has in the model, ``name`` first. ``persistent`` is false for
    buffers that are not in checkpoints.
    """

    name: str
    source: TensorSource
    kind: WeightKind = "parameter"
    names: tuple[str, ...] = ()
    persistent: bool = True
    trainable: bool = True

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name of the tensor, ``name`` first."""
        return (self.name, *(n for n in self.names if n != self.name))

    @property
    def bytes(self) -> int:
        """Size of the values in bytes."""
        return numel(self.source.shape) * self.source.dtype.itemsize

    @property
    def kept_as(self) -> str:
        """How its source keeps the values, where that is not as they are: codes, and how many share a scale."""
        return str(getattr(self.source, "kept_as", ""))

    def with_source(self, source: TensorSource) -> Weight:
        """Return the same weight with other values."""
        return replace(self, source=source)


def numel(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's type, shape and bytes."""
    plain = tensor.detach().contiguous().cpu()
    seen = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    seen.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
