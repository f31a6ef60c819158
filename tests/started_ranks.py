"""Ranks as processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

# below those that systems give out by themselves, and elsewhere for each process: nobody takes one between
# here and the moment when the first rank listens
PORTS = iter(range(10_000 + os.getpid() * 37 % 20_000, 32_000))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start(command: list[str], ranks: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start ranks as torchrun does."""
    port = next(port for port in PORTS if _free(port))
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GRAPHOPT_TIMEOUT": "60", **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(ranks)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], seconds: float = 150) -> list[tuple[int, str, str]]:
    end = time.monotonic() + seconds
    found = []
    for process in processes:
        try:
            out, error = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            pytest.fail("a rank hung")
        found.append((process.returncode, out, error))
    return found
