"""Capture of an ``nn.Module`` with example inputs as a program, which is compared with the module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from ..ir.canonical import canonicalise
from ..ir.compat import quiet_export, without_fake_cache
from ..ir.errors import CaptureError, UsageError
from ..ir.program import Program
from ..ir.schema import is_mutable
from .compare_module import compare_with_model
from .lift import lift
from .size_limits import settle_by_guards
from .size_trials import larger_example, share_sizes

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
WIDE_BATCH, WIDE_LENGTH = 3, 13
MANY_PARAMETERS = 250  # as many as a Llama of 28 layers has


def bind_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return example inputs by the parameter names of ``model.forward``.

    Args:
        model: whose forward is called.
        inputs: a tensor, positional inputs, keywords, or the pair (args, kwargs).
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, torch.Tensor):
        args = (inputs,)
    elif len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        args, kwargs = inputs[0], dict(inputs[1])
    else:
        args = tuple(inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from None
    by_name: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise CaptureError(
                f"{type(model).__name__}.forward takes positional-only inputs ({name})",
                hint="wrap the model in a module whose forward names its inputs",
            )
        if kind is inspect.Parameter.VAR_KEYWORD:
            by_name.update(value)
        else:
            by_name[name] = value
    return by_name


def widen(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a larger copy of an example, so that no size is frozen at 1.

    A batch of 1 becomes 3. Integer matrices are assumed to be (batch, sequence): a length under 4 is repeated up to
    13. Results are clones: an example that is a view adds guards on its base.
    """
    tensors: list[torch.Tensor] = []
    tree_map(lambda v: tensors.append(v) if isinstance(v, torch.Tensor) else None, inputs)
    batches = {t.shape[0] for t in tensors if t.dim()}
    grow_batch = batches == {1}
    integers = [t for t in tensors if t.dim() == 2 and not t.dtype.is_floating_point]
    lengths = {t.shape[1] for t in integers}
    grow_length = len(lengths) == 1 and next(iter(lengths)) < 4

    def enlarged(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if grow_batch and value.dim():
            value = value.repeat(WIDE_BATCH, *[1] * (value.dim() - 1))
        if grow_length and value.dim() == 2 and not value.dtype.is_floating_point:
            times = -(-WIDE_LENGTH // value.shape[1])
            value = value.repeat(1, times)[:, :WIDE_LENGTH]
        return value.detach().clone()

    widened: dict[str, Any] = tree_map(enlarged, inputs)
    return widened


def dynamic_shapes(inputs: dict[str, Any], dynamic: Any) -> Any:
    """Return ``dynamic`` in the form that torch.export takes.

    Args:
        inputs: the example.
        dynamic: "auto", None for fixed sizes, or {"input": {dimension: "name of the size"}}.
    """
    if dynamic is None:
        return None
    if dynamic == "auto":
        return tree_map(
            lambda v: dict.fromkeys(range(v.dim()), Dim.AUTO) if isinstance(v, torch.Tensor) else None, inputs
        )
    if not isinstance(dynamic, Mapping):
        raise UsageError(
            f'dynamic must be "auto", None or a mapping of inputs to dimensions, not {dynamic!r}'
        )
    unknown = set(dynamic) - set(inputs)
    if unknown:
        raise UsageError(f"dynamic names inputs that are not given: {', '.join(sorted(unknown))}")
    sizes: dict[str, Any] = {}

    def size(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        return sizes.setdefault(name, Dim(name, min=1))

    return {
        name: (
            {d: size(n) for d, n in dynamic[name].items()}
            if name in dynamic
            else tree_map(lambda v: None, value)
        )
        for name, value in inputs.items()
    }


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without gradients while the context is open, and restore it afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def export(model: nn.Module, inputs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """Run torch.export in non-strict mode and explain its failures.

    Raises:
        CaptureError: the model cannot be traced.
    """
    few = sum(1 for _ in model.parameters()) < MANY_PARAMETERS
    try:
        with without_fake_cache() if few else contextlib.nullcontext(), quiet_export():
            return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {first}",
            source=_user_line(error),
            hint="branches on tensor values cannot be captured; "
            "if a size froze, pass dynamic= for the sizes that vary",
        ) from error


def _user_line(error: BaseException) -> str:
    import traceback

    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "graphopt" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""


def capture_module(
    model: nn.Module,
    inputs: Inputs,
    *,
    dynamic: Any = "auto",
    compare: bool = True,
    name_sizes: Callable[[ExportedProgram], Mapping[str, str]] | None = None,
) -> Program:
    """Capture a module as a program that matches it at two input sizes.

    Args:
        model: captured in evaluation mode; its state is restored.
        inputs: an example: tensor, tuple, dict, or (args, kwargs).
        dynamic: "auto", None, or sizes by input and dimension.
        compare: run model and program on the example and on another size.
        name_sizes: names for the symbols of the exported program.

    Raises:
        CaptureError: it cannot be traced, or the graph's results differ from the model's.
    """
    bound = bind_inputs(model, inputs)
    example = (
        widen(bound)
        if dynamic == "auto"
        else tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, bound)
    )

    def captured(example: dict[str, Any]) -> Program:
        exported = export(model, example, dynamic_shapes(example, dynamic))
        program = lift(exported, example, names=name_sizes(exported) if name_sizes else None)
        if compare:
            if any(is_mutable(node.target) for node in program.graph.nodes):
                # a model that changes its weights is rejected before anything runs it
                canonicalise(program.copy())
            share_sizes(program, model, example)
        canonicalise(program)
        if compare:
            compare_with_model(program, model, bound, example)
        else:
            settle_by_guards(program)
        return program

    with evaluation(model):
        program = captured(example)
        larger = larger_example(program, model, example) if compare and dynamic == "auto" else None
        if larger is not None:
            # a size so small that the model does less than with others
            with contextlib.suppress(CaptureError):
                program = captured(larger)
    program.origin.model_class = f"{type(model).__module__}:{type(model).__qualname__}"
    return program
