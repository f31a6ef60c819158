"""A Triton driver for a GPU that is not here: kernels are specialised and compiled as they would be there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Architecture:
    """What kernels are compiled for, and what a program may use of it.

    Attributes:
        name: as its vendor calls it.
        backend: of Triton.
        arch: Triton's name.
        warp: threads that run together.
        shared: bytes of shared memory that a program can have.
        registers: of a thread.
    """

    name: str
    backend: str
    arch: Any
    warp: int
    shared: int
    registers: int


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "cuda", 80, 32, 163 * 1024, 255),
        Architecture("sm_90", "cuda", 90, 32, 227 * 1024, 255),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024, 512),
    )
}
"""By name. Limits are the vendors'."""


class StubDriver:
    """Answers with one target, and has no device."""

    def __init__(self, architecture: Architecture, number: int):
        self._number = number
        self._target = GPUTarget(architecture.backend, architecture.arch, architecture.warp)

    def get_current_target(self) -> Any:
        """The target."""
        return self._target

    def get_current_device(self) -> int:
        """A number of its own, as what is compiled is kept by device."""
        return self._number

    def get_active_torch_device(self) -> Any:
        """Where tensors would be."""
        import torch

        return torch.device("meta")

    def get_current_stream(self, device: Any = None) -> int:
        """A number."""
        return 0

    @staticmethod
    def is_active() -> bool:
        """It is."""
        return True


def pretend(architecture: Architecture, number: int) -> None:
    """Make Triton compile for this architecture, in this process and from now on; ``number`` is no other one's."""
    triton.runtime.driver.set_active(StubDriver(architecture, number))
