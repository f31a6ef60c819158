"""What transformers writes in ways that no graph can hold, in other words while a model is traced."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .expert_loops import ExpertLoops
from .named_kernels import named_kernels


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Write scans, masks, slices, triangular systems and loops over experts in ways that can be traced while it is open."""
    with named_kernels(), broadcast_masks(), casts_of_modules(), Sizes(), ExpertLoops():
        yield


@contextlib.contextmanager
def casts_of_modules() -> Iterator[None]:
    """Let modules that a model casts while it runs compute with cast weights, while the context is open.

    Routers are cast to a more precise type by ``Module.to`` on every call. It exchanges parameters, of which a tracer
    holds references. A module with nothing to cast is left alone.
    """
    before = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.dtype):
            return before(self, *args, **kwargs)
        for module in self.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.is_floating_point() and weight.dtype is not args[0]:
                    # the tracer puts its own back
                    module._parameters[name] = weight.to(args[0])  # type: ignore[assignment]
        return self

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]


def inverse_of_unit_lower(matrix: torch.Tensor) -> torch.Tensor:
    """Return the inverses of lower triangular matrices with ones on the diagonal, whatever else is stored there.

    A block of twice the size, ``[[A, 0], [C, B]]``, has the inverse ``[[A', 0], [-B' C A', B']]`` of those of its own
    blocks, for all blocks at once: a few products in place of one substitution a row.

    Args:
        matrix: of shape (..., n, n), n a number.

    Returns:
        Of the same shape.
    """
    size = int(matrix.shape[-1])
    rows = torch.arange(size, device=matrix.device)
    inverse = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    block = 1
    while block < size:
        index = rows // block
        second = index % 2 == 1
        below = second[:, None] & (index[:, None] == index[None, :] + 1)
        corner = torch.where(below, matrix, torch.zeros((), dtype=matrix.dtype, device=matrix.device))
        inverse = inverse - (corner if block == 1 else inverse @ corner @ inverse)
        block *= 2
    return inverse


@contextlib.contextmanager
def broadcast_masks() -> Iterator[None]:
    """Let masks with rules of their own be computed by broadcasting while the context is open.

    The library maps such rules with ``torch.vmap``, whose nodes no graph can hold. Its rules read positions and tables
    by index, which broadcasts.
    """
    from transformers import masking_utils

    names = ("_vmap_expansion_sdpa", "TransformGetItemToIndex")
    before = {name: getattr(masking_utils, name) for name in names if hasattr(masking_utils, name)}
    if len(before) < len(names):
        yield
        return
    expand = masking_utils._non_vmap_expansion_sdpa

    def broadcast(rule: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def whole(*positions: torch.Tensor) -> torch.Tensor:
            wide = expand(*positions)
            shape = [axis.shape[dim] for dim, axis in enumerate(wide)]
            return rule(*wide).expand(shape)

        return whole

    masking_utils._vmap_expansion_sdpa = broadcast
    masking_utils.TransformGetItemToIndex = contextlib.nullcontext
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking_utils, name, value)


class Sizes(TorchFunctionMode):
    """Remember which tensors hold a size that varies, so that slices up to them are no unknowns of the graph."""

    def __init__(self) -> None:
        super().__init__()
        # tensors are kept, so that their ids are not reused
        self.sizes: dict[int, tuple[torch.Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.solve_triangular and _of_unit_lower(*args, **(kwargs or {})):
            return inverse_of_unit_lower(args[0]) @ args[1]
        if func in _HOLDING and args and isinstance(args[0], torch.SymInt):
            return self._keep(func(*args, **(kwargs or {})), args[0])
        if not self.sizes:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            return func(args[0], self._plain_index(args[1]))
        if (
            func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__)
            and id(args[0]) in self.sizes
        ):
            return self._plain(args[0])
        if func in (torch.clamp, torch.Tensor.clamp):
            # limits of which one is a number are read as numbers
            args = (args[0], *map(self._plain, args[1:]))
            kwargs = {name: self._plain(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        operation = _ARITHMETIC.get(func)
        if operation is not None and len(args) == 2 and not kwargs:
            first, second = map(self._plain, args)
            whole = all(isinstance(v, (int, torch.SymInt)) for v in (first, second))
            if whole and isinstance(result, torch.Tensor):
                return self._keep(result, operation(first, second))
        return result

    def _keep(self, tensor: torch.Tensor, size: Any) -> torch.Tensor:
        self.sizes[id(tensor)] = (tensor, size)
        return tensor

    def _plain(self, value: Any) -> Any:
        return self.sizes[id(value)][1] if id(value) in self.sizes else value

    def _plain_index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._plain_index, index))
        if isinstance(index, slice):
            return slice(*(self._plain(v) for v in (index.start, index.stop, index.step)))
        return index


def _of_unit_lower(
    matrix: torch.Tensor,
    right: torch.Tensor | None = None,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
    out: torch.Tensor | None = None,
) -> bool:
    return (
        not upper
        and left
        and unitriangular
        and out is None
        and right is not None
        and isinstance(matrix.shape[-1], int)
    )


# torch.export writes the second for the first
_HOLDING = (torch.tensor, torch.scalar_tensor)
_ARITHMETIC = {
    torch.Tensor.__add__: operator.add,
    torch.Tensor.add: operator.add,
    torch.Tensor.__radd__: operator.add,
    torch.Tensor.__sub__: operator.sub,
    torch.Tensor.sub: operator.sub,
    torch.Tensor.__rsub__: lambda first, second: second - first,
    torch.Tensor.__mul__: operator.mul,
    torch.Tensor.mul: operator.mul,
    torch.Tensor.__rmul__: operator.mul,
}
