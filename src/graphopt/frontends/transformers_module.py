"""Capture of a transformers model in memory, whose attention and expert implementations are switched while tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..ir.canonical import canonicalise
from ..ir.errors import CaptureError, GraphoptError, UsageError
from ..ir.program import Origin, Program
from .architecture import ask_no_caches, configurations
from .calling import Inputs, by_name, uncompiled
from .compare import require_equal
from .compare_checkpoint import OwnPositions, compare_with_model
from .example_inputs import Given, causal, example_inputs, with_few_rows
from .fixed_values import fixing
from .frozen import note_frozen
from .huggingface import ATTENTION_LADDER, _export, _fill_rules, _symbol_names, take_fixed
from .lift import lift
from .rotary_types import refuse_varying_frequencies
from .size_limits import settle_by_guards
from .stamping.plan import exported_layers, plan_stamping, stamp
from .stamping.record import CannotStamp
from .stamping.tensors import tensors_of
from .torch_module import evaluation
from .untraceable import traceable

_SETTINGS = ("use_cache", "_attn_implementation_internal", "_experts_implementation_internal")


@contextlib.contextmanager
def _without_caches(model: Any) -> Iterator[None]:
    """Ask no part of a model for caches, and restore the user's settings of every part afterwards."""
    parts = configurations(model)
    before = [{name: vars(part)[name] for name in _SETTINGS if name in vars(part)} for part in parts]
    try:
        ask_no_caches(model)
        yield
    finally:
        for part, settings in zip(parts, before, strict=True):
            for name in _SETTINGS:
                if name in settings:
                    setattr(part, name, settings[name])
                else:
                    vars(part).pop(name, None)


@contextlib.contextmanager
def _traceable(model: Any, attention: str) -> Iterator[None]:
    """Apply the settings that tracing needs to every part of a model, and restore the user's afterwards."""
    with _without_caches(model):
        model.set_attn_implementation(attention)
        experts = getattr(model.config, "_experts_implementation", None)
        if experts is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")
        yield


def capture_transformers_module(
    model: Any, inputs: dict[str, Any], *, dynamic: Any, compare: bool
) -> Program:
    """Capture a transformers model in memory; its usual optional inputs are included and filled in by default.

    Args:
        model: its settings are restored.
        inputs: an example by parameter name.
        dynamic: "auto", None, or sizes by input and dimension.
        compare: compare with the model on padded and unpadded inputs of several sizes.

    Raises:
        CaptureError: no way of tracing it gives the model's results.
        UsageError: the model does not take the inputs.
    """
    refuse_varying_frequencies(model.config)
    given = Given(inputs, grow=dynamic == "auto", complete=dynamic == "auto")

    def attempt(attention: str, without: tuple[str, ...], given: Given = given) -> Program:
        with _traceable(model, attention):
            program = _capture(model, given, dynamic, without)
        few = with_few_rows(given, {n: spec.shape for n, spec in program.signature.inputs.items()})
        if few is not None:
            return attempt(attention, without, few)
        if not compare:
            settle_by_guards(program)
            return program
        with _without_caches(model), evaluation(model):
            compare_with_model(program, model, given)
        return program

    failures = []
    for attention in ATTENTION_LADDER:
        try:
            try:
                return attempt(attention, ())
            except OwnPositions:
                if "position_ids" in inputs:
                    raise
                return attempt(attention, ("position_ids",))
        except UsageError:
            raise
        except (GraphoptError, ValueError) as error:
            failures.append(f"with {attention} attention: {error}")
    raise CaptureError(f"{type(model).__name__} cannot be captured\n  " + "\n  ".join(failures))


def capture_wrapped(
    wrapper: nn.Module,
    inputs: Inputs,
    name: str,
    model: Any,
    named: dict[str, Any],
    *,
    dynamic: Any,
    compare: bool,
) -> Program:
    """Capture a transformers model inside a module that passes on what it takes and returns, such as PEFT's.

    Args:
        wrapper: the program's weights have their names in it.
        inputs: an example for the wrapper.
        name: of the model in the wrapper.
        model: of transformers.
        named: the example by the names of its parameters.
        dynamic: "auto", None, or sizes by input and dimension.
        compare: compare with the model, and with the wrapper on the example.

    Raises:
        CaptureError: the model cannot be captured, or the wrapper does something else.
    """
    with uncompiled(wrapper), evaluation(wrapper):
        program = capture_transformers_module(model, named, dynamic=dynamic, compare=compare)
        if compare:
            called, _ = by_name(wrapper, inputs)
            with _without_caches(model):
                require_equal(program, called, [("the example", named, None)])
    for node, weight in program.weights.items():
        names = tuple(f"{name}.{n}" for n in weight.names)
        program.weights[node] = replace(weight, name=f"{name}.{weight.name}", names=names)
    program.origin.model_class = f"{type(wrapper).__module__}:{type(wrapper).__qualname__}"
    return program


def _capture(
    model: Any, given: Given, dynamic: Any, without: tuple[str, ...], whole: CannotStamp | None = None
) -> Program:
    with evaluation(model):
        made = example_inputs(model, given)
        example = {k: v for k, v in made.inputs.items() if k not in without}
        with traceable(), fixing(model, made.fixed, made.marked):
            plan = plan_stamping(model, example) if whole is None else whole
        with exported_layers(model, plan), traceable(), fixing(model, made.fixed, made.marked):
            exported = _export(model, example, dynamic, made.sizes)
    program = lift(exported, example, names=_symbol_names(exported, made.sizes))
    take_fixed(program, made.fixed)
    _fill_rules(program, model.config)
    canonicalise(program)
    try:
        stamp(program, plan, tensors_of(model))
    except CannotStamp as reason:
        return _capture(model, given, dynamic, without, reason)
    note_frozen(program, exported, example)
    program.origin = Origin(
        kind="module",
        model_class=f"transformers:{type(model).__name__}",
        config=model.config.to_dict(),
        notes=program.origin.notes,
        padding="causal" if causal(model.config) else "",
    )
    return program
