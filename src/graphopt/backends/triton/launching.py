"""Launching kernels: on a GPU, in Triton's interpreter, or only compiling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ...ir.compat import is_plain_tensor

Launch = Callable[[Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], None]


def _start(kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    # torch.compile and AOTInductor see a Triton kernel; anywhere else it is an ordinary launch
    from torch.library import wrap_triton

    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    # Triton launches on the current device, whatever the tensors' device
    device = torch.cuda.device(tensor.device) if is_plain_tensor(tensor) and tensor.is_cuda else nullcontext()
    with device:
        wrap_triton(kernel)[grid](*args, **meta)


def plainly(kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch a kernel of Triton's interpreter, which is not compiled."""
    kernel[grid](*args, **meta)


_current: list[Launch] = [_start]


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **meta: Any) -> None:
    """Launch a kernel with ``grid`` programs; arguments in order, compile-time constants and options by name."""
    _current[-1](kernel, grid, args, meta)


@contextmanager
def launching(how: Launch) -> Iterator[None]:
    """Make ``how`` launch kernels instead, for example to compile them for another GPU."""
    _current.append(how)
    try:
        yield
    finally:
        _current.pop()
