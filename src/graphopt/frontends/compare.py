"""Comparison of a captured program with the model it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..ir.checking.comparison import relative_error
from ..ir.errors import CaptureError, GraphoptError, UsageError
from ..ir.program import METHODS, Program
from ..ir.structure import describe
from ..ir.weights import digest

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}

_COMPARABLE = (torch.Tensor, bool, int, float, str, type(None))
_MOST_REMEMBERED = 128 << 20  # bytes of results


def counted_error(result: Any, reference: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Return the relative error of the positions that count; see :func:`~graphopt.ir.checking.comparison.relative_error`.

    Args:
        result: what is checked.
        reference: same shape.
        where: (batch, sequence), the positions that count; all if None.
    """
    if result.shape != reference.shape:
        return float("inf")
    if where is not None and result.dim() >= 2 and result.shape[:2] == where.shape:
        result, reference = result[where.bool()], reference[where.bool()]
    # where the terms of an output cancel, only rounding remains
    return relative_error(result, reference, at_least=1e-3)


class Remembered:
    """A model, and programs that are compared with it, which run once on equal inputs.

    Whether a model takes some inputs, which sizes it lets vary and whether the program agrees are asked in turn, of the
    same examples.
    """

    def __init__(self, model: Callable[..., Any]):
        self.model = model
        self.known: dict[Any, Any] = {}
        self.bytes = 0

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model makes of inputs; what it refuses is asked again."""
        return self._once(self, inputs, lambda: self.model(**inputs))

    def outputs(self, program: Program, inputs: dict[str, Any]) -> Any:
        """Return what a program makes of the inputs of the model; its limits are checked at every call."""
        bound = program.bind(kwargs=inputs)
        # another one once the graph changes
        graph = program.derived("compared_graph", _Graph)
        results = self._once(graph, bound, lambda: METHODS["run"](program, bound))
        return program.signature.unflatten(results)

    def _once(self, who: object, inputs: dict[str, Any], run: Callable[[], Any]) -> Any:
        leaves, structure = tree_flatten(inputs)
        if not all(isinstance(leaf, _COMPARABLE) for leaf in leaves):
            return run()
        # who is kept, so that its id is not reused; inputs are read before a model can write to them
        values = tuple(digest(v) if isinstance(v, torch.Tensor) else (type(v), v) for v in leaves)
        key = (who, str(structure), values)
        if key in self.known:
            return self.known[key]
        result = run()
        made = tree_leaves(result)
        size = sum(v.nbytes for v in made if isinstance(v, torch.Tensor))
        if self.bytes + size <= _MOST_REMEMBERED and all(isinstance(v, _COMPARABLE) for v in made):
            self.known[key] = result
            self.bytes += size
        return result


class _Graph:
    """Stands for a graph as it is."""


def compare_outputs(
    program: Program, model: Callable[..., Any], inputs: dict[str, Any], where: torch.Tensor | None = None
) -> float:
    """Run both on the same inputs and return the largest relative error over outputs."""
    run: Callable[[dict[str, Any]], Any] = (
        partial(model.outputs, program) if isinstance(model, Remembered) else lambda given: program(**given)
    )
    with torch.no_grad():
        expected = model(**inputs)
    _, reference = describe(expected, lambda v: isinstance(v, torch.Tensor))
    _, results = describe(run(inputs), lambda v: isinstance(v, torch.Tensor))
    shared = [name for name in reference if name in results]
    if set(results) - set(reference) or not shared:
        raise CaptureError(f"the program returns {sorted(results)}, the model returns {sorted(reference)}")
    return max(counted_error(results[name], reference[name], where) for name in shared)


def tolerance_of(program: Program) -> float:
    """Largest relative error that rounding explains, by the narrowest type of the weights."""
    types = {w.source.dtype for w in program.weights.values() if w.source.dtype.is_floating_point}
    return max((TOLERANCE.get(t, 1e-2) for t in types), default=2e-4)


def require_equal(
    program: Program, model: Callable[..., Any], cases: Iterable[tuple[str, dict[str, Any], Any]]
) -> dict[str, float]:
    """Compare on several inputs; each case is (label, inputs, positions that count or None).

    Raises:
        CaptureError: an output differs by more than rounding.
    """
    limit = tolerance_of(program)
    errors: dict[str, float] = {}
    for label, inputs, where in cases:
        try:
            errors[label] = compare_outputs(program, model, inputs, where)
        except UsageError as error:
            raise CaptureError(
                f"the captured graph does not accept {label}: {error.message}",
                hint="it was captured at other sizes, at which the model behaves differently; give a larger example",
            ) from error
        except GraphoptError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the captured graph does not run on {label}: {type(error).__name__}: {error}",
                hint="a size froze at capture; pass dynamic= with the sizes that vary, or another example",
            ) from error
        if not errors[label] <= limit:
            raise CaptureError(
                f"the captured graph differs from the model on {label}: relative error {errors[label]:.2g}, "
                f"rounding explains {limit:.0e}",
                hint="the model may branch on values or sizes that the example did not show",
            )
    return errors


def resized(program: Program, inputs: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any] | None:
    """Return the example sliced or repeated to other values of the named sizes, or None if that is impossible."""
    targets = {name: sizes.get(name, limits.hint) for name, limits in program.signature.sizes.items()}
    flat: dict[int, torch.Tensor] = {}
    structures = describe(inputs, lambda v: isinstance(v, torch.Tensor), "")[1]
    for name, tensor in structures.items():
        spec = program.signature.inputs.get(name)
        if spec is None:
            continue
        value = tensor
        for dim, size in enumerate(spec.shape):
            if isinstance(size, int):
                continue
            if size not in targets:
                return None
            more = targets[size] - value.shape[dim]
            if more > 0:
                # the end goes on: a row may begin with what stands for an image, which must not come twice
                end = value.narrow(dim, value.shape[dim] // 2, -(-value.shape[dim] // 2))
                repeats = [1] * value.dim()
                repeats[dim] = -(-more // end.shape[dim])
                value = torch.cat([value, end.repeat(*repeats).narrow(dim, 0, more)], dim)
            value = value.narrow(dim, 0, targets[size])
        if _rises(tensor):
            # where pieces begin, or which graph a node belongs to: out of order it has no meaning
            value = value.sort().values
        flat[id(tensor)] = value.clone()
    resized_inputs: dict[str, Any] = tree_map(
        lambda v: flat.get(id(v), v) if isinstance(v, torch.Tensor) else v, inputs
    )
    return resized_inputs


def _rises(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a list of integers that never fall, and do not all agree."""
    if tensor.dim() != 1 or tensor.dtype.is_floating_point or tensor.dtype.is_complex or len(tensor) < 2:
        return False
    return bool((tensor[1:] >= tensor[:-1]).all()) and bool(tensor[0] != tensor[-1])
