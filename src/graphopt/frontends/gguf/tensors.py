"""Tensors of a GGUF file, dequantised when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ir.errors import CheckpointError
from ...ir.weights import numel
from .header import Header, StoredTensor, stamp_of
from .library import block_of, dequantise, dequantised_types, dequantises

# values dequantised at a time: the library's temporary memory is several times as large as the result
_PIECE = 1 << 20


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor in float32 with the layout of the model's own library; read from its offset in the file, not mapped.

    Float32 represents every value of every type exactly: blocks are half-precision scales times small integers, which
    llama.cpp and transformers multiply in float32 too.

    ``key`` is its name in the file, ``rotated`` the number of heads whose rows llama.cpp reordered for its rotary
    embedding (0: none), ``offset`` the number added to the values before they were stored.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    code: int
    start: int
    bytes: int
    stamp: tuple[int, ...]
    rotated: int = 0
    offset: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Float32."""
        return torch.float32

    def load(self) -> torch.Tensor:
        """Read and dequantise the values, a few rows at a time."""
        block = block_of(self.code)
        assert block is not None
        columns = self.shape[-1]
        rows, width = numel(self.shape[:-1]), columns // block[1] * block[2]
        result = torch.empty((rows, columns), dtype=torch.float32)
        step = max(1, _PIECE // columns)
        for first, blocks in self._rows(rows, width, step):
            values = dequantise(blocks.numpy().reshape(-1, width), self.code)
            result[first : first + len(values)] = torch.from_numpy(values)
        if self.offset:
            result -= self.offset
        result = result.reshape(self.shape)
        return _in_halves(result, self.rotated) if self.rotated else result

    def blocks(self) -> torch.Tensor:
        """Return the bytes as they are stored, rows in the file's order."""
        ((_, raw),) = self._rows(1, self.bytes, 1)
        return raw

    def _rows(self, rows: int, width: int, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the number of a row, and the bytes of it and of up to ``step - 1`` that follow."""
        raw = torch.empty(min(step, rows) * width, dtype=torch.uint8)
        try:
            if stamp_of(self.path) != self.stamp:
                raise CheckpointError(
                    f"{self.path} has changed since tensor {self.key!r} was found in it",
                    hint="load the checkpoint again",
                )
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                for first in range(0, rows, step):
                    blocks = raw[: (min(first + step, rows) - first) * width]
                    self._fill(file, blocks)
                    yield first, blocks
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.key!r} from {self.path}: {error}") from error

    def _fill(self, file: object, blocks: torch.Tensor) -> None:
        target = memoryview(blocks.numpy().data).cast("B")
        filled = 0
        while filled < len(target):
            count = file.readinto(target[filled:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"{self.path} ends within tensor {self.key!r}",
                    hint="the file changed since it was opened; load the checkpoint again",
                )
            filled += count


def _in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from pairs (first, second, first, ...) into halves, as the library rotates them."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def tensor_of(header: Header, stored: StoredTensor, *, rotated: int = 0, offset: float = 0.0) -> GGUFTensor:
    """Return a stored tensor as a source of values.

    Raises:
        CheckpointError: the library does not dequantise its type.
    """
    if not dequantises(stored.code):
        raise CheckpointError(
            f"{stored.path}: {stored.name!r} is stored as {stored.kind}, which the library gguf does not dequantise",
            hint=f"convert the model to one of {', '.join(dequantised_types())}, for example with llama-quantize",
        )
    return GGUFTensor(
        stored.path,
        stored.name,
        stored.shape,
        stored.code,
        stored.start,
        stored.bytes,
        stored.stamp,
        rotated,
        offset,
    )
