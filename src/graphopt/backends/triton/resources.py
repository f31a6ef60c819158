"""GPU resources of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .stub_driver import Architecture


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a kernel.

    Attributes:
        registers: per thread.
        spilled: bytes per thread that do not fit into registers, or are arrays on its stack.
        shared: bytes of shared memory.
        warps: number of warps.
    """

    registers: int
    spilled: int
    shared: int
    warps: int

    def too_much(self, architecture: Architecture) -> str:
        """Return why the kernel cannot run on an architecture; empty if it can."""
        if self.shared > architecture.shared:
            return f"{self.shared:,} bytes of shared memory, {architecture.name} has {architecture.shared:,}"
        if self.registers > architecture.registers:
            return f"{self.registers} registers, {architecture.name} has {architecture.registers}"
        return ""


def _nvidia(binary: bytes) -> tuple[int, int]:
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        process = subprocess.run(
            [str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True, timeout=60
        )
    match = re.search(r"REG:(\d+)\s+STACK:(\d+)", process.stdout)
    if match is None:
        raise RuntimeError(f"cuobjdump reports no registers: {process.stdout[:200]}")
    return int(match[1]), int(match[2])


def _amd(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    if registers is None or spilled is None:
        raise RuntimeError("the assembly states no registers")
    return int(registers[1]), 4 * int(spilled[1])


def resources_of(compiled: Any, architecture: Architecture) -> Resources:
    """Return the resources of a kernel that Triton compiled for this architecture."""
    if architecture.backend == "cuda":
        registers, spilled = _nvidia(compiled.asm["cubin"])
    else:
        registers, spilled = _amd(compiled.asm["amdgcn"])
    return Resources(registers, spilled, int(compiled.metadata.shared), int(compiled.metadata.num_warps))
