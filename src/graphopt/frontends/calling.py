"""Calling a module by the names of its inputs, however its ``forward`` takes them.

Programs take inputs by name, and so does everything that compares them with their model. A ``forward`` of ``*args``,
``**kwargs`` or positional-only parameters is called through a view of the module: the same parameters and submodules, with
a ``forward`` that has a name for each input. Names that ``forward`` does not give are those of the first submodule that is
handed the same tensors, as wrappers do; failing that, ``args_0``, ``args_1``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..ir.compat import FakeTensor, FakeTensorMode, new_fake_mode, quiet_failures
from ..ir.errors import UsageError
from .stamping.untouched import put_back

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def original(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given; any other is returned as it is."""
    while type(model).__module__ == "torch._dynamo.eval_frame" and hasattr(model, "_orig_mod"):
        inner = model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run submodules that ``torch.compile`` was given as they were written, under their original names."""
    calls, children = [], []
    for module in list(model.modules()):
        if module.__dict__.get("_compiled_call_impl") is not None:
            calls.append((module, module._compiled_call_impl))
            module._compiled_call_impl = None
        for name, child in module._modules.items():
            if child is not None and original(child) is not child:
                children.append((module, name, child))
    try:
        for module, name, child in children:
            module._modules[name] = original(child)
        yield
    finally:
        for module, name, child in children:
            module._modules[name] = child
        for module, call in calls:
            module._compiled_call_impl = call


def by_name(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, dict[str, Any]]:
    """Return a module that takes its inputs by name, and the example inputs by these names.

    Args:
        model: returned itself where its ``forward`` names its inputs.
        inputs: a tensor, positional inputs, keywords, or the pair (args, kwargs).

    Raises:
        UsageError: the inputs do not fit ``model.forward``.
    """
    args, kwargs = _split(inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from None
    kinds = {name: signature.parameters[name].kind for name in bound.arguments}
    named = {n: v for n, v in bound.arguments.items() if kinds[n] in _NAMED}
    if len(named) == len(bound.arguments):
        return model, named
    # positional ones in their order; those with a name that stand before *args can be given by position alone
    positions = list(bound.args)
    names = _names_of(model, bound, positions)
    by_position = dict(zip(names, positions, strict=True))
    keywords = dict(bound.kwargs)
    return _View.of(model, names, list(keywords)), {**by_position, **keywords}


def _faked(mode: FakeTensorMode, fakes: dict[int, torch.Tensor], value: Any) -> Any:
    """Return a tensor without values for a tensor, the same each time; anything else as it is."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    if id(value) not in fakes:
        fakes[id(value)] = mode.from_tensor(value.detach(), static_shapes=True)
    return fakes[id(value)]


def run_dry(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode | None = None
) -> Any:
    """Run a module on tensors without values, which changes none of its buffers and takes no memory; return its results.

    Raises:
        Exception: whatever the module raises at these sizes, or because values are missing.
    """
    mode = mode or new_fake_mode()
    fake = partial(_faked, mode, {})
    state = {n: fake(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    # functional_call does not put back the tensors of a module that has two names
    with put_back(model), mode, torch.no_grad(), quiet_failures():
        return torch.func.functional_call(model, state, tree_map(fake, args), tree_map(fake, kwargs))


def takes(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Return whether a module runs at the sizes of some inputs, which are given by name; it is run dry."""
    try:
        run_dry(model, (), inputs)
    except Exception:  # libraries raise all kinds of errors for sizes that they do not take
        return False
    return True


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return inputs[0], dict(inputs[1])
    return tuple(inputs), {}


def _names_of(model: nn.Module, bound: inspect.BoundArguments, positions: list[Any]) -> list[str]:
    """Return a name for each positional input, none of which a keyword has."""
    own: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            own += [f"{name}_{index}" for index in range(len(value))]
        elif kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            own.append(name)
    own = own[: len(positions)]
    counted = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in bound.signature.parameters.values())
    found = _handed_on(model, bound) if counted else {}
    names: list[str] = []
    for name, value in zip(own, positions, strict=True):
        wished = found.get(id(value), name)
        names.append(name if wished in names or wished in bound.kwargs else wished)
    return names if len(set(names)) == len(names) else own


def _handed_on(model: nn.Module, bound: inspect.BoundArguments) -> dict[int, str]:
    """Return by identity the names under which a submodule takes the inputs, if one is handed all of them."""
    mode = new_fake_mode()
    fakes: dict[int, torch.Tensor] = {}
    args, kwargs = tree_map(partial(_faked, mode, fakes), (bound.args, bound.kwargs))
    found: dict[int, str] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if found:
            return
        with contextlib.suppress(TypeError, ValueError):
            inner = inspect.signature(module.forward).bind(*args, **kwargs)
            kinds = inner.signature.parameters
            named = {id(v): n for n, v in inner.arguments.items() if kinds[n].kind in _NAMED}
            if fakes and all(id(value) in named for value in fakes.values()):
                found.update({key: named[id(value)] for key, value in fakes.items()})

    hooks = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if module is not model
    ]
    try:
        # what fails here fails again where it is captured, with a message; names may have been found before
        with contextlib.suppress(Exception):
            run_dry(model, args, kwargs, mode)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def wrapped(model: nn.Module, inputs: Inputs) -> tuple[str, nn.Module, dict[str, Any]] | None:
    """Return the model of transformers that a module passes its inputs to and whose results it returns, as PEFT does.

    Args:
        model: which is run on tensors without values.
        inputs: as for :func:`by_name`.

    Returns:
        Its name in ``model``, the model, and the inputs by its own names; None if there is none, or if more happens.
    """
    inside = {m: name for name, m in model.named_modules() if m is not model and _is_transformers(m)}
    if not inside:
        return None
    called, named = by_name(model, inputs)
    mode = new_fake_mode()
    fakes: dict[int, torch.Tensor] = {}
    given = tree_map(partial(_faked, mode, fakes), named)
    originals = {id(fakes[id(v)]): v for v in tree_leaves(named) if isinstance(v, torch.Tensor)}
    found: list[tuple[nn.Module, dict[str, Any], Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        taken = {n: originals[id(v)] for n, v in arguments.items() if id(v) in originals}
        if len(taken) == len(originals):
            found.append((module, taken, result))

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in inside]
    try:
        outcome = run_dry(called, (), given, mode)
    except Exception:  # it says why where it is captured
        return None
    finally:
        for hook in hooks:
            hook.remove()
    for module, taken, result in reversed(found):
        if result is outcome:
            return inside[module], module, taken
    return None


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.") and hasattr(module, "set_attn_implementation")


class _View(nn.Module):
    """The same module as another, called by names. Submodules, parameters, buffers and hooks are those of the other."""

    @staticmethod
    def of(model: nn.Module, positions: list[str], keywords: list[str]) -> nn.Module:
        """Return a view of ``model`` whose first inputs are handed on by position."""
        call = model.forward

        def forward(self: Any, **inputs: Any) -> Any:
            args = [inputs.pop(name) for name in positions]
            return call(*args, **inputs)

        parameters = [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
            *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in (*positions, *keywords)),
        ]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        kind = type(model)
        view: nn.Module = object.__new__(type(kind.__name__, (kind,), {"forward": forward}))
        view.__dict__.update({k: v for k, v in vars(model).items() if k != "forward"})
        return view
