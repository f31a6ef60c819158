"""How kernels are started: on a GPU, by Triton's interpreter, or only compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ...ir.compat import is_plain_tensor

Launch = Callable[[Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], None]


def _start(kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    # seen by torch.compile and AOTInductor as a Triton kernel, and an ordinary launch everywhere else
    from torch.library import wrap_triton

    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    # Triton starts on the current device, whatever the tensors' is
    device = torch.cuda.device(tensor.device) if is_plain_tensor(tensor) and tensor.is_cuda else nullcontext()
    with device:
        wrap_triton(kernel)[grid](*args, **meta)


def plainly(kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Start a kernel that is no compiled one: Triton's interpreter's."""
    kernel[grid](*args, **meta)


_current: list[Launch] = [_start]


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **meta: Any) -> None:
    """Start a kernel: ``grid`` programs, its arguments in order, its compile-time constants and options by name."""
    _current[-1](kernel, grid, args, meta)


@contextmanager
def launching(how: Launch) -> Iterator[None]:
    """Let ``how`` start kernels instead: to compile them for a GPU that is not here."""
    _current.append(how)
    try:
        yield
    finally:
        _current.pop()
