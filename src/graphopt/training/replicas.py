"""Several processes that train copies of one module, each on its own batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..ir import groups


class Replicas:
    """The processes that torchrun started, or only this one.

    Args:
        device: where this process trains.
    """

    def __init__(self, device: torch.device):
        # the first process may write a large state while the others wait
        groups.join(None if "GRAPHOPT_TIMEOUT" in os.environ else 3600.0)
        self.device = device
        self.rank, self.size = groups.rank(), groups.world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the mean over processes."""
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # routing leaves some weights unused, different ones in each process
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=True)

    @contextlib.contextmanager
    def apart(self, module: nn.Module, wanted: bool) -> Iterator[None]:
        """Accumulate gradients without synchronising them, if more batches of the same step follow."""
        with (
            module.no_sync()
            if wanted and isinstance(module, DistributedDataParallel)
            else contextlib.nullcontext()
        ):
            yield

    def agree(self, loss: float, stop: bool) -> tuple[float, bool]:
        """Return the mean loss of a step, and whether any process wants to stop."""
        if self.size == 1:
            return loss, stop
        both = torch.tensor([loss, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        return float(both[0]) / self.size, bool(both[1] > 0)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()
