"""What each rank of a test runs: a saved program on saved inputs, with the bytes it sends counted."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.ir.errors import GraphoptError


class Counted(TorchDispatchMode):
    """Counts what goes into torch's collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("_c10d_functional.") and "wait" not in name:
            kind = name.split(".")[1]
            self.bytes[kind] = self.bytes.get(kind, 0) + args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def main(folder: Path, how: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    inputs = load_file(folder / "inputs.safetensors")
    try:
        program = graphopt.load(folder / "program")
        if how == "dies" and rank == 1:
            program(**inputs)
            os.kill(os.getpid(), signal.SIGKILL)
        with Counted() as counted:
            found = program(**inputs)
        if how == "dies":
            program(**inputs)
        module = program.module(fold_weights=True)
        with torch.no_grad():
            again = module(**inputs)
        tensors = {k: v.contiguous() for k, v in found.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, folder / f"rank{rank}.safetensors")
        difference = max(float((again[k] - v).abs().max()) for k, v in tensors.items())
        own = sum(p.numel() for p in module.parameters())
        facts = {"bytes": counted.bytes, "module": difference, "parameters": own}
        (folder / f"rank{rank}.json").write_text(json.dumps(facts))
    except GraphoptError as error:
        (folder / f"rank{rank}.error").write_text(f"{type(error).__name__}: {error}")
        os._exit(error.exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "runs")
