"""Memory for weights in large pages, where Linux has them: matrices are then read a tenth faster."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

PAGE = 1 << 21
_CHUNK = 1 << 25
_SMALL = 1 << 18
_ALIGNED = 64


class LargePages:
    """Memory that is asked for in large pages and handed out piece by piece.

    A piece keeps its chunk; pages that nothing was written to take no memory. Where the system has no large pages, and for
    pieces that are small beside one, it is ordinary memory.
    """

    def __init__(self) -> None:
        self._chunk: torch.Tensor | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor on the CPU whose values are undefined."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(tuple(shape), dtype=dtype)
        if self._chunk is None or self._used + size > self._chunk.numel():
            chunk = _mapped(max(size, _CHUNK))
            if chunk is None:
                return torch.empty(tuple(shape), dtype=dtype)
            self._chunk, self._used = chunk, 0
        piece = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return piece.view(dtype).view(tuple(shape))

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _mapped(size: int) -> torch.Tensor | None:
    """Return bytes that begin at a border of large pages; None if there are none to be had."""
    try:
        memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, ValueError):
        return None
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :]
