"""Capture of a transformers model in memory, whose attention and expert implementations are switched while tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..ir.canonical import canonicalise
from ..ir.errors import CaptureError, GraphoptError
from ..ir.program import Origin, Program
from .calling import Inputs, by_name, uncompiled
from .compare import require_equal
from .compare_checkpoint import compare_with_model
from .example_inputs import causal, example_inputs, size_names
from .huggingface import ATTENTION_LADDER, _export, _fill_rules, _symbol_names
from .lift import lift
from .rotary_types import refuse_varying_frequencies
from .size_limits import settle_by_guards
from .size_trials import numbers_in, settle_limits, trial
from .torch_module import evaluation, widen


@contextlib.contextmanager
def _traceable(model: Any, attention: str) -> Iterator[None]:
    """Apply the settings that tracing needs, and restore the user's afterwards."""
    config = model.config
    before = {
        name: getattr(config, name, None)
        for name in ("use_cache", "_attn_implementation", "_experts_implementation")
        if hasattr(config, name)
    }
    try:
        config.use_cache = False
        model.set_attn_implementation(attention)
        if before.get("_experts_implementation") is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")
        yield
    finally:
        if before.get("_attn_implementation"):
            model.set_attn_implementation(before["_attn_implementation"])
        if before.get("_experts_implementation") is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(before["_experts_implementation"])
        for name, value in before.items():
            setattr(config, name, value)


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
    """
    refuse_varying_frequencies(model.config)
    failures = []
    for attention in ATTENTION_LADDER:
        try:
            with _traceable(model, attention):
                program = _capture(model, inputs, dynamic)
        except (GraphoptError, ValueError) as error:
            failures.append(f"with {attention} attention: {error}")
            continue
        cache = model.config.use_cache
        try:
            if compare:
                with evaluation(model):
                    _compare(program, model, inputs)
            else:
                settle_by_guards(program)
        except GraphoptError as error:
            failures.append(f"with {attention} attention: {error}")
            continue
        finally:
            model.config.use_cache = cache
        return program
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
            cache, model.config.use_cache = model.config.use_cache, False
            try:
                require_equal(program, called, [("the example", named, None)])
            finally:
                model.config.use_cache = cache
    for node, weight in program.weights.items():
        names = tuple(f"{name}.{n}" for n in weight.names)
        program.weights[node] = replace(weight, name=f"{name}.{weight.name}", names=names)
    program.origin.model_class = f"{type(wrapper).__module__}:{type(wrapper).__qualname__}"
    return program


def _capture(model: Any, inputs: dict[str, Any], dynamic: Any) -> Program:
    example = widen(inputs) if dynamic == "auto" else dict(inputs)
    if dynamic == "auto" and "input_ids" in example:
        ids = example["input_ids"]
        for name, value in example_inputs(model).items():
            if name in ("attention_mask", "position_ids", "token_type_ids") and name not in example:
                filler = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
                if name == "position_ids":
                    filler = torch.arange(ids.shape[1]).expand(ids.shape).clone()
                example[name] = filler
                del value
    dimension_names = size_names({k: v for k, v in example.items() if isinstance(v, torch.Tensor)})
    with evaluation(model):
        exported = _export(model, example, dynamic, dimension_names)
    program = lift(exported, example, names=_symbol_names(exported, dimension_names))
    _fill_rules(program, model.config)
    canonicalise(program)
    program.origin = Origin(
        kind="module",
        model_class=f"transformers:{type(model).__name__}",
        config=model.config.to_dict(),
        padding="causal" if causal(model.config) else "",
    )
    return program


def _compare(program: Program, model: Any, inputs: dict[str, Any]) -> None:
    accepted = (
        set(example_inputs(model))
        if getattr(model, "main_input_name", "") in ("input_ids", "pixel_values")
        else set()
    )
    if set(program.signature.inputs) <= accepted:
        compare_with_model(program, model)
    else:
        settle_limits(program, trial(program, model, inputs), numbers_in(model.config.to_dict()))
        require_equal(program, model, [("the example", inputs, None)])
