"""A Triton driver for a GPU that is not present: kernels are specialised and compiled as on that GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture to compile for, with its limits.

    Attributes:
        name: the vendor's name.
        backend: Triton's backend.
        arch: Triton's name of the architecture.
        warp: threads per warp.
        shared: bytes of shared memory available to a program.
        registers: available to a thread.
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
"""Architectures by name, with the vendors' limits."""


class StubDriver:
    """A driver with one fixed target and no device."""

    def __init__(self, architecture: Architecture, number: int):
        self._number = number
        self._target = GPUTarget(architecture.backend, architecture.arch, architecture.warp)

    def get_current_target(self) -> Any:
        """The target."""
        return self._target

    def get_current_device(self) -> int:
        """Return a unique device number, since compiled kernels are cached by device."""
        return self._number

    def get_active_torch_device(self) -> Any:
        """Return the device that tensors would be on."""
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
    """Make Triton compile for this architecture from now on in this process; ``number`` must be unique to it."""
    triton.runtime.driver.set_active(StubDriver(architecture, number))
