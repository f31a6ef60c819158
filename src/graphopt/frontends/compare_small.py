"""Comparison for checkpoints too large to run: a model of the same architecture with one layer of each kind.

Random weights do not reveal what depends on stored values; ``stored_values`` lists that and reads it from the files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..ir.anatomy import Layer
from ..ir.anatomy.residual import between
from ..ir.errors import CaptureError
from ..ir.facts import note_capture
from ..ir.program import Program
from ..ir.running.region import cut
from ..ir.weights import Absent, InMemory
from .architecture import model_class, nested
from .compare_checkpoint import compare_with_model
from .example_inputs import Given
from .size_limits import take_limits

CaptureConfiguration = Callable[[Any], Program]

_KINDS = ("layer_types", "mlp_layer_types")
# numbers of layers beside the one that every configuration has
_COUNTS = ("encoder_layers", "decoder_layers", "num_decoder_layers", "depth")


def compare_small(
    program: Program,
    config: Any,
    dtype: torch.dtype,
    capture: CaptureConfiguration,
    given: Given | None = None,
) -> None:
    """Compare a small model with random weights, and require every layer of the program to be like one of its layers.

    Args:
        program: the whole model.
        config: its configuration.
        dtype: of its parameters.
        capture: function that captures a configuration in the same way.
        given: what the user gave as inputs.

    Raises:
        CaptureError: the small model differs, or a layer of the program is like none of its layers.
    """
    small = fewer_layers(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(small)._from_config(small, dtype=dtype).eval()
    captured = capture(small)
    state = model.state_dict()
    for name, weight in list(captured.weights.items()):
        if isinstance(weight.source, Absent):
            tensor = next(state[n] for n in weight.all_names if n in state)
            captured.weights[name] = replace(weight, source=InMemory(tensor))
    constraints = set(captured.signature.constraints)
    compare_with_model(captured, model, given)
    take_limits(program.signature, captured.signature, constraints)
    for name, spec in captured.signature.inputs.items():
        if name in program.signature.inputs:
            # how the model fills in positions was found by comparison
            program.signature.inputs[name] = replace(program.signature.inputs[name], fill=spec.fill)
    layer_kinds = {layer_key(captured, layer) for layer in captured.anatomy.layers}
    for layer in program.anatomy.layers:
        if layer_key(program, layer) not in layer_kinds:
            raise CaptureError(
                f"{layer.name} is like no layer of the small model it was compared with",
                source=program.source_line(layer.writes),
                hint="this architecture varies by layer in a way the comparison does not cover",
            )
    note_capture(program, compared=f"{len(layer_kinds)} kinds of layers, with random weights")


def fewer_layers(config: Any) -> Any:
    """Return a configuration with the fewest layers that has one of each kind."""
    small = copy.deepcopy(config)
    text = small.get_text_config() if hasattr(small, "get_text_config") else small
    for part in nested(small):
        # settings that name layers by number would name others, or none
        named = any(value and name.endswith(("indexes", "indices")) for name, value in vars(part).items())
        if part is text or not named:
            _shorten(part)
    return small


def _shorten(text: Any) -> None:
    for name in _COUNTS:
        count = vars(text).get(name)
        if isinstance(count, int) and count > 2:
            setattr(text, name, 2)
    if not isinstance(getattr(text, "num_hidden_layers", None), int):
        return
    count = text.num_hidden_layers
    needed = [i for i in (0, 1) if i < count]
    kinds = [
        list(getattr(text, name)) for name in _KINDS if isinstance(getattr(text, name, None), (list, tuple))
    ]
    for index in range(count):
        kind = tuple(k[index] for k in kinds if index < len(k))
        if kind and kind not in {tuple(k[i] for k in kinds if i < len(k)) for i in needed}:
            needed.append(index)
    first_sparse = getattr(text, "first_k_dense_replace", None)
    if isinstance(first_sparse, int) and first_sparse < count:
        # dense layers come first; the others are MoE layers
        needed = [0, *([first_sparse] if first_sparse else [])]
        text.first_k_dense_replace = min(first_sparse, 1)
        needed = needed if len(needed) > 1 or not first_sparse else [0, first_sparse]
    text.num_hidden_layers = len(needed)
    for name in _KINDS:
        entries = getattr(text, name, None)
        if isinstance(entries, (list, tuple)):
            setattr(text, name, [entries[i] for i in needed])


def layer_key(program: Program, layer: Layer) -> Any:
    """Return a key that layers share if they are the same computation on other weights."""
    order: dict[Any, int] = program.derived(
        "order", lambda: {n: i for i, n in enumerate(program.graph.nodes)}
    )
    inside = set(between(layer.reads, layer.writes, order))
    return cut(program, [layer.writes], lambda node: node not in inside).key(program)
