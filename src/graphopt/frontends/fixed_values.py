"""Inputs whose values decide sizes: grids of patches and sizes of images, which are fixed when a model is captured.

A graph has no place for a loop over the images of a batch. What is computed from such values alone is computed while the
model is traced, whatever the model does with it (lists, loops, lengths of pieces), and enters the graph as constants.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

FIXED = ("image_grid_thw", "video_grid_thw", "grid_thw", "spatial_shapes", "image_sizes", "merge_sizes")
# numbers from one to the next, which loops over known sizes make
_COUNTS = (torch.arange, torch.tensor)


def fixed_inputs(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs that a program takes, and those whose values it is captured for.

    Positions that a model derives from the values of tokens and grids are among the former: where they were not given,
    ``mm_token_type_ids`` stays and the model derives them.
    """
    fixed = {name: value for name, value in inputs.items() if name in FIXED and value is not None}
    free = {name: value for name, value in inputs.items() if name not in fixed}
    if fixed and "position_ids" in free:
        free.pop("mm_token_type_ids", None)
    return free, fixed


def describe_fixed(fixed: Mapping[str, Any]) -> str:
    """Return a note on what a program is captured for."""
    values = ", ".join(f"{n} = {v.tolist() if isinstance(v, torch.Tensor) else v}" for n, v in fixed.items())
    return f"captured for {values}; other values need a capture of their own"


class Bound:
    """A model with some inputs given."""

    def __init__(self, model: Any, fixed: Mapping[str, Any]):
        self.model, self.fixed = model, dict(fixed)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.model(**inputs, **self.fixed)


@contextlib.contextmanager
def fixing(model: Any, fixed: Mapping[str, Any], marked: int = 0) -> Iterator[None]:
    """Give a model some of its inputs while the context is open, and compute at once what follows from them.

    Args:
        model: its ``forward`` is replaced, and restored afterwards.
        fixed: tensors with values.
        marked: how many tokens stand for images, of all rows together.
    """
    if not fixed:
        yield
        return
    before = vars(model).get("forward")
    model.forward = functools.partial(model.forward, **fixed)
    try:
        with Known(tree_leaves(fixed), marked):
            yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


class Joined(TorchFunctionMode):
    """Let a list of the rows of a batch that varies be one piece, with the rows one after another.

    Models that make such a list concatenate it again. One that does anything else is found when its graph is compared.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__len__ and isinstance(args[0].shape[0], torch.SymInt):
            # lists ask for it as a hint, and go on without
            raise TypeError("this length varies")
        rows = func in (torch.Tensor.unbind, torch.unbind) and not kwargs and args[1:] in ((), (0,))
        if rows and args[0].dim() > 1 and isinstance(args[0].shape[0], torch.SymInt):
            return (args[0].flatten(0, 1),)
        return func(*args, **(kwargs or {}))


class Known(TorchFunctionMode):
    """Compute what depends on known tensors alone, outside whatever traces the model.

    Tokens chosen by a mask (``x[mask]``) have a known number too, if ``marked`` says how many the mask marks: they are
    found by sorting, so that their number is no unknown of the graph.
    """

    def __init__(self, known: list[Any], marked: int = 0):
        super().__init__()
        # tensors are kept, so that their ids are not reused
        self.known = {id(t): t for t in known if isinstance(t, torch.Tensor)}
        self.marked = marked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        plain = not any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves)
        counts = func in _COUNTS and not tensors
        if plain and (counts or (tensors and all(id(t) in self.known for t in tensors))):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            return tree_map(self._keep, result)
        if self.marked and func is torch.Tensor.__getitem__:
            mask = _mask_of(args[1])
            if mask is not None and id(mask) not in self.known:
                rows = torch.argsort((~mask).flatten().to(torch.int8), stable=True)[: self.marked]
                return args[0].flatten(0, mask.dim() - 1)[rows]
        if self.marked and func is torch.Tensor.__setitem__:
            mask, value = _mask_of(args[1]), args[2]
            if (
                mask is not None
                and isinstance(value, torch.Tensor)
                and value.dim() == args[0].dim() - mask.dim() + 1
            ):
                wide = mask.reshape(*mask.shape, *[1] * (args[0].dim() - mask.dim())).expand_as(args[0])
                args[0].masked_scatter_(wide, value)
                return None
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self.known[id(value)] = value
        return value


def _mask_of(index: Any) -> torch.Tensor | None:
    """Return the mask of an index such as ``x[mask]`` or ``x[mask, :]``."""
    if (
        isinstance(index, tuple)
        and index
        and all(i == slice(None) for i in index[1:] if isinstance(i, slice))
    ):
        if any(not isinstance(i, slice) for i in index[1:]):
            return None
        index = index[0]
    whole = isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.dim() == 2
    return index if whole else None
