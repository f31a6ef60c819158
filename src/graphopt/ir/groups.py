"""Groups of ranks: symbolic names in graphs, bound to process groups of torch.distributed when a program runs.

The only module that uses torch's functional collectives. A graph names the group ``tensor_parallel``, whatever torch's
name for it is in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .compat import is_plain_tensor
from .errors import DistributedError, UsageError

TENSOR_PARALLEL = "tensor_parallel"
"""The group over which tensor-parallel programs reduce."""

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Bound:
    """A process group: torch's name of it, this process's rank in it, and its size."""

    name: str
    rank: int
    size: int


_BOUND: dict[str, Bound] = {}


def bind(group: str, process_group: Any = None) -> Bound:
    """Bind ``group`` to a process group, by default the whole world, and return the binding.

    Raises:
        UsageError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            "torch.distributed is not initialised",
            hint="start with torchrun, or call init_process_group first",
        )
    bound_to: Any = process_group if process_group is not None else dist.group.WORLD
    bound = Bound(str(bound_to.group_name), dist.get_rank(bound_to), dist.get_world_size(bound_to))
    _BOUND[group] = bound
    return bound


def unbind(group: str) -> None:
    """Remove the binding of ``group`` in this process."""
    _BOUND.pop(group, None)


def started_by_torchrun() -> bool:
    """Tell whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 and "RANK" in os.environ


def rank() -> int:
    """Return the rank of this process, 0 if it runs alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0") or 0) if started_by_torchrun() else 0


def world_size() -> int:
    """Return the number of processes, 1 if this one runs alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1") or 1) if started_by_torchrun() else 1


def join(timeout_seconds: float | None = None) -> None:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo on CPUs; does nothing in a single process.

    Args:
        timeout_seconds: how long a collective waits for a missing rank; by default GRAPHOPT_TIMEOUT from the
            environment, or two minutes.
    """
    if dist.is_initialized() or not started_by_torchrun():
        return
    seconds = timeout_seconds or float(os.environ.get("GRAPHOPT_TIMEOUT", TIMEOUT_SECONDS))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # a program's own tensors may be on either
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    atexit.register(leave)


def leave() -> None:
    """Leave the group that ``join`` joined; without this, a process may abort at its end."""
    _BOUND.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def group_for(size: int, group: str = TENSOR_PARALLEL) -> Bound | None:
    """Return the process group for a program of ``size`` ranks, binding it if necessary; None in a single process.

    Raises:
        UsageError: the number of processes is not ``size``.
    """
    if group in _BOUND:
        bound = _BOUND[group]
    else:
        join()
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        bound = bind(group)
    if bound.size != size:
        raise UsageError(
            f"the program is for {size} ranks, but {bound.size} processes are running",
            hint=f"start {size} with torchrun --nproc-per-node {size}, or shard again with size={bound.size}",
        )
    return bound


def bound_group(group: str, like: torch.Tensor) -> Bound | None:
    """Return the binding of a group; None for a tensor without values, of which only the shape is needed.

    Raises:
        UsageError: nothing is bound.
    """
    bound = _BOUND.get(group)
    if bound is None and is_plain_tensor(like):
        raise UsageError(
            f"no process group is bound to {group!r}",
            hint="call the program itself, which binds one, or graphopt.ir.groups.bind(group, process_group)",
        )
    return bound


def barrier() -> None:
    """Wait until all ranks arrive; does nothing in a single process.

    Raises:
        DistributedError: a rank did not arrive.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        with _explained("a barrier", Bound("", dist.get_rank(), dist.get_world_size())):
            dist.barrier()


@contextlib.contextmanager
def _explained(what: str, group: Bound) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistributedError(
            f"rank {group.rank} of {group.size} could not finish {what}: {first}",
            hint="another rank ended or hung; see its own messages. GRAPHOPT_TIMEOUT sets the seconds to wait",
        ) from error


def _wait(value: torch.Tensor) -> torch.Tensor:
    done: torch.Tensor = torch.ops._c10d_functional.wait_tensor(value)
    return done


def all_reduce(x: torch.Tensor, group: Bound) -> torch.Tensor:
    """Return the sum of all ranks' tensors."""
    with _explained("an all-reduce", group):
        return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name))


def all_gather(x: torch.Tensor, group: Bound) -> torch.Tensor:
    """Return all ranks' tensors, concatenated along the first dimension."""
    with _explained("an all-gather", group):
        return _wait(
            torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size, group.name)
        )


def reduce_scatter(x: torch.Tensor, group: Bound) -> torch.Tensor:
    """Return this rank's shard, along the first dimension, of the sum of all ranks' tensors."""
    with _explained("a reduce-scatter", group):
        return _wait(
            torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)
        )


def all_to_all(x: torch.Tensor, group: Bound) -> torch.Tensor:
    """Send part r of the first dimension to rank r, and return the parts received, in the order of ranks."""
    part = x.shape[0] // group.size
    sizes = [part] * group.size
    with _explained("an all-to-all", group):
        return _wait(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), sizes, sizes, group.name))
