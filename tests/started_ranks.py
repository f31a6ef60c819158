"""Ranks as processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from forks import Fork, Forks

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


IN_A_FORK = """
import json, os, runpy, sys
environment, script = json.loads(sys.argv[1]), sys.argv[2]
os.environ.update(environment)
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def start(
    command: list[str], ranks: int, forks: Forks | None = None, **environment: str
) -> list[subprocess.Popen[str]] | list[Fork]:
    """Start ranks as torchrun does; those of a script as forks, where given, which need not import torch each."""
    port = next(port for port in PORTS if _free(port))
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GRAPHOPT_TIMEOUT": "60", **environment,
    }  # fmt: skip
    if forks is not None:
        each = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        return [forks.start(IN_A_FORK, json.dumps(own), *command) for own in each]
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(ranks)
    ]  # fmt: skip


def finish(
    processes: list[subprocess.Popen[str]] | list[Fork], seconds: float = 150
) -> list[tuple[int, str, str]]:
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
