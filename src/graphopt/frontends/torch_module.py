"""Capture of an ``nn.Module`` with example inputs as a program, which is compared with the module."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from ..ir.canonical import canonicalise
from ..ir.compat import quiet_export, recording_fixed_sizes, without_fake_cache
from ..ir.errors import CaptureError, UsageError
from ..ir.program import Program
from ..ir.recurrent import free_lengths
from ..ir.schema import is_mutable
from ..ir.structure import describe
from .accepting import accepts
from .calling import Inputs, by_name, original, takes, uncompiled
from .compare_module import compare_with_model
from .frozen import note_frozen, remember
from .lift import lift
from .size_limits import settle_by_guards
from .size_trials import larger_example, share_sizes
from .stamping.plan import exported_layers, plan_stamping, stamp
from .stamping.record import CannotStamp
from .stamping.tensors import tensors_of
from .stamping.untouched import put_back

__all__ = ["Inputs", "bind_inputs", "capture_module", "dynamic_shapes", "evaluation", "export", "widen"]

WIDE_BATCH, WIDE_LENGTH = 3, 13
MANY_PARAMETERS = 250  # as many as a Llama of 28 layers has
_MOST_CHOICES = 16


def bind_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return example inputs by name; see :func:`~graphopt.frontends.calling.by_name`.

    Args:
        model: whose forward is called.
        inputs: a tensor, positional inputs, keywords, or the pair (args, kwargs).
    """
    return by_name(model, inputs)[1]


def widen(inputs: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Return a larger copy of an example, so that no size is frozen at 1.

    A batch of 1 becomes 3, for as many inputs together as the model takes: an input without a batch stays as it is, and so
    does one whose batch must be 1. Integer matrices are assumed to be (batch, sequence): a length under 4 is repeated up
    to 13. Results are clones: an example that is a view adds guards on its base.

    Args:
        inputs: by parameter name.
        model: run on tensors without values to find out what it takes; without one, only a batch that all inputs have
            is widened.
    """
    tensors = {n: t for n, t in describe(inputs, _is_tensor, "")[1].items() if t.dim()}
    integers = [t for t in tensors.values() if t.dim() == 2 and not t.dtype.is_floating_point]
    lengths = {t.shape[1] for t in integers}
    longer: dict[str, tuple[int, ...]] = {}
    if len(lengths) == 1 and next(iter(lengths)) < 4:
        longer = {n: (t.shape[0], WIDE_LENGTH) for n, t in tensors.items() if any(t is i for i in integers)}
    single = {n for n, t in tensors.items() if t.shape[0] == 1}

    def enlarged(wide: Iterable[tuple[str, int]], longer: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        copies: dict[int, torch.Tensor] = {}
        for name, value in tensors.items():
            shape = list(longer.get(name, value.shape))
            for grown, dim in wide:
                if grown == name:
                    shape[dim] = WIDE_BATCH
            copies[id(value)] = _repeated(value, shape)
        return _with(inputs, copies)

    every = {(name, 0) for name in single}
    unasked = every if len(single) == len(tensors) else set()
    if model is None:
        return enlarged(unasked, longer)
    if single and takes(model, enlarged(every, longer)):
        return enlarged(every, longer)
    if not takes(model, inputs):
        # it cannot be asked without values
        return enlarged(unasked, longer)
    if longer and not takes(model, enlarged((), longer)):
        longer = {}
    for wide in _batches(tensors, single):
        if takes(model, enlarged(wide, longer)):
            return enlarged(wide, longer)
    return enlarged((), longer)


def _batches(tensors: Mapping[str, torch.Tensor], single: set[str]) -> Iterator[set[tuple[str, int]]]:
    """Yield which inputs may have a batch of one, and where: as many as possible first, then fewer."""
    first = sorted(single)
    for count in range(len(first), 0, -1):
        choices = itertools.combinations(first, count)
        yield from ({(name, 0) for name in chosen} for chosen in itertools.islice(choices, _MOST_CHOICES))
    # recurrent networks and attention of torch take (sequence, batch, width) by default
    second = {(n, 1) for n, t in tensors.items() if t.dim() == 3 and t.shape[0] > 1 and t.shape[1] == 1}
    if second:
        yield second


def _repeated(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    times = [-(-wanted // size) if size else 1 for wanted, size in zip(shape, value.shape, strict=True)]
    if any(count > 1 for count in times):
        value = value.repeat(*times)[tuple(slice(wanted) for wanted in shape)]
    return value.detach().clone()


def _with(inputs: dict[str, Any], copies: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    changed: dict[str, Any] = tree_map(
        lambda v: copies.get(id(v), v.detach().clone()) if isinstance(v, torch.Tensor) else v, inputs
    )
    return changed


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


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
    """Put the model into evaluation mode without gradients while the context is open, and restore it afterwards.

    Torch's fused transformer layers are switched off: they give zeros for padding where the layers themselves do not.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fused)


def export(model: nn.Module, inputs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """Run torch.export in non-strict mode and explain its failures.

    Raises:
        CaptureError: the model cannot be traced.
    """
    few = sum(1 for _ in model.parameters()) < MANY_PARAMETERS
    try:
        with (
            without_fake_cache() if few else contextlib.nullcontext(),
            quiet_export(),
            free_lengths(),
            recording_fixed_sizes() as stacks,
            put_back(model),
        ):
            exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {first}",
            source=_user_line(error),
            hint="branches on tensor values cannot be captured; "
            "if a size froze, pass dynamic= for the sizes that vary",
        ) from error
    remember(exported, stacks)
    return exported


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
    model = original(model)
    with uncompiled(model), evaluation(model):
        called, bound = by_name(model, inputs)
        program = _captured(called, bound, dynamic, compare, name_sizes)
    program.origin.model_class = f"{type(model).__module__}:{type(model).__qualname__}"
    return program


def _captured(
    model: nn.Module,
    bound: dict[str, Any],
    dynamic: Any,
    compare: bool,
    name_sizes: Callable[[ExportedProgram], Mapping[str, str]] | None,
) -> Program:
    example = widen(bound, model) if dynamic == "auto" else _with(bound, {})

    def captured(example: dict[str, Any], whole: CannotStamp | None = None) -> Program:
        plan = plan_stamping(model, example) if whole is None else whole
        with exported_layers(model, plan):
            exported = export(model, example, dynamic_shapes(example, dynamic))
        program = lift(exported, example, names=name_sizes(exported) if name_sizes else None)
        if compare:
            if any(is_mutable(node.target) for node in program.graph.nodes):
                # a model that changes its weights is rejected before anything runs it
                canonicalise(program.copy())
            share_sizes(program, model, example)
        canonicalise(program)
        try:
            stamp(program, plan, tensors_of(model))
        except CannotStamp as reason:
            return captured(example, reason)
        if compare:
            compare_with_model(program, model, bound, example)
        else:
            settle_by_guards(program)
        note_frozen(program, exported, example, partial(accepts if compare else takes, model))
        return program

    program = captured(example)
    larger = larger_example(program, model, example) if compare and dynamic == "auto" else None
    if larger is not None:
        # a size so small that the model does less than with others
        with contextlib.suppress(CaptureError):
            program = captured(larger)
    return program
