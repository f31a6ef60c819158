"""The weight mapping: which tensors of a checkpoint make which weight of a model, traced from the library's conversion.

The only module that reads transformers' conversion tables. Operations that join or split tensors are traced on fake
tensors, so that whatever the library does to a weight while loading becomes operators of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..ir.compat import FakeTensorMode, fake_tensor, new_fake_mode
from ..ir.errors import CheckpointError
from ..ir.weights import TensorSource
from .architecture import with_memory
from .stamping.weight_mapping import Mapped, Recipe
from .stored_values import untie


def map_names(model: Any, tensors: Mapping[str, TensorSource], mode: FakeTensorMode) -> Mapped:
    """Return the weight mapping of a transformers model from a checkpoint.

    Args:
        model: built without values.
        tensors: of the checkpoint, by name.
        mode: for tracing conversions.

    Raises:
        CheckpointError: a conversion of the library cannot be traced.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    mapped = Mapped()
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name not in state:
            mapped.unused.append(key)
        elif pattern is None:
            mapped.plain[name] = key
        else:
            groups.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
    for first, (converter, members) in groups.items():
        mapped.recipes.append(_trace(model, first, converter, members, tensors, mode))
    return mapped


def filled(config: Any, tensors: Mapping[str, TensorSource], dtype: torch.dtype) -> Any:
    """Return the library's model of a configuration with the values of a checkpoint, read one tensor at a time.

    Args:
        config: of transformers; not changed.
        tensors: of the checkpoint, by name.
        dtype: of the parameters.
    """
    model = with_memory(config, dtype)
    mapped = map_names(model, tensors, new_fake_mode())
    untie(model, mapped, tensors)
    state = model.state_dict()
    with torch.no_grad():
        for name, key in mapped.plain.items():
            state[name].copy_(tensors[key].load())
        for recipe in mapped.recipes:
            run = fx.Interpreter(fx.GraphModule(torch.nn.Module(), recipe.graph))
            results = run.run(*(tensors[key].load() for key in recipe.sources))
            for name, result in zip(recipe.targets, results, strict=True):
                if name in state:
                    state[name].copy_(result)
    return model


def _trace(
    model: Any,
    first: str,
    converter: Any,
    members: list[tuple[str, str]],
    tensors: Mapping[str, TensorSource],
    mode: FakeTensorMode,
) -> Recipe:
    names: list[str] = []

    def convert(*values: torch.Tensor) -> list[torch.Tensor]:
        working = copy.deepcopy(converter)
        for (key, pattern), value in zip(members, values, strict=True):
            working.add_tensor(first, key, pattern, value)
        results = working.convert(first, model=model, config=model.config)
        names[:] = list(results)
        return [r[0] if isinstance(r, list) else r for r in results.values()]

    fakes = [fake_tensor(mode, tensors[key].shape, tensors[key].dtype) for key, _ in members]
    try:
        with mode:
            traced = make_fx(convert)(*fakes)
    except Exception as error:
        raise CheckpointError(
            f"the library's conversion of {members[0][0]!r} to {first!r} cannot be followed: {error}",
            hint="load the model with transformers and pass the module itself",
        ) from error
    return Recipe(traced.graph, tuple(key for key, _ in members), tuple(names))
