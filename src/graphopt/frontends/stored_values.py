"""Properties that depend on the values in a checkpoint's files, not on its configuration alone.

A comparison of architectures with random weights shows none of it, so it is read from the files:

- whether weights that the configuration ties are one matrix (``untie``)
- whether weights are quantised, with separate scales, although the configuration does not say so (``plain_numbers``)
- buffers, which are taken from the files if these have them, and types, which become casts (``bind_weights``)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ir.errors import CheckpointError
from ..ir.weights import TensorSource, load_part, numel
from .checkpoint_files import CheckpointFiles
from .stamping.weight_mapping import Mapped

_PART = 1 << 24
_SCALES = re.compile(
    r"(.*?)[._](?:(?:weight|input|activation|output)_)?"
    r"(?:scales?(?:_inv|_2)?|qzeros|zero_points?|zeros|g_idx|absmax|quant_map|quant_state\..*|SCB|qweight|blocks)$"
)


def equal(one: TensorSource, other: TensorSource) -> bool:
    """Return whether two stored tensors have the same values; they are read in pieces, never as a whole."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.shape or numel(one.shape) * one.dtype.itemsize <= _PART:
        return bool(torch.equal(one.load(), other.load()))
    rows = max(1, _PART // (numel(one.shape[1:]) * one.dtype.itemsize))
    starts = range(0, one.shape[0], rows)
    ends = (min(start + rows, one.shape[0]) for start in starts)
    return all(
        torch.equal(load_part(one, 0, start, end), load_part(other, 0, start, end))
        for start, end in zip(starts, ends, strict=True)
    )


def untie(model: Any, mapped: Mapped, tensors: Mapping[str, TensorSource]) -> list[str]:
    """Untie weights that the configuration ties if the files have different values for them.

    The library does the same while loading: the files take precedence over the configuration.

    Args:
        model: built without values, its weights tied; changed in place.
        mapped: where each weight comes from.
        tensors: of the files.

    Returns:
        The names of the weights that are no longer tied.
    """
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups: dict[str, list[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, []).append(target)
    freed = []
    for source, targets in groups.items():
        stored = [name for name in (source, *targets) if name in mapped.plain]
        for name in stored[1:]:
            if mapped.plain[name] == mapped.plain[stored[0]]:
                continue
            if not equal(tensors[mapped.plain[stored[0]]], tensors[mapped.plain[name]]):
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                parameter = module._parameters.get(leaf)
                if parameter is None:
                    continue
                module._parameters[leaf] = nn.Parameter(
                    torch.empty_like(parameter), requires_grad=parameter.requires_grad
                )
                freed.append(name)
    return freed


def computed_weights(model: Any, mapped: Mapped) -> dict[str, torch.Tensor]:
    """Return the weights that are in no file because the library computes them while it builds a model.

    Tables of positions are such weights. They are computed twice, from different random numbers: what differs is a
    weight that is missing.

    Args:
        model: built without values, before it is traced; not changed.
        mapped: where each other weight comes from.
    """
    made = {name for recipe in mapped.recipes for name in recipe.targets}
    stored = {*mapped.plain, *made}
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    missing = [names for names in tied.values() if not stored & set(names)]
    found: dict[str, torch.Tensor] = {}
    for names in missing:
        owner, _, leaf = names[0].rpartition(".")
        module = model.get_submodule(owner)
        if module._parameters.get(leaf) is None or not hasattr(model, "_init_weights"):
            continue
        first, second = (_initialised(model, module, leaf, seed) for seed in (1, 2))
        if first is not None and second is not None and torch.equal(first, second):
            found.update(dict.fromkeys(names, first))
    return found


def _initialised(model: Any, module: nn.Module, leaf: str, seed: int) -> torch.Tensor | None:
    """Return a parameter as the library initialises it, or None if it leaves it alone."""
    parameters = dict(module._parameters)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.full(parameter.shape, float(seed), dtype=parameter.dtype),
                        requires_grad=parameter.requires_grad,
                    )
            model._init_weights(module)
            value = module._parameters[leaf]
        except (RuntimeError, AttributeError, TypeError, ValueError):
            return None
        finally:
            module._parameters.update(parameters)
    return None if value is None else value.detach()


def plain_numbers(model: Any, mapped: Mapped, files: CheckpointFiles) -> None:
    """Require that the stored numbers are the weights themselves, not quantised.

    Raises:
        CheckpointError: they have eight bits or are packed, or there are scales for them that nothing reads.
    """
    state = model.state_dict()
    sources = {key: [name] for name, key in mapped.plain.items()}
    for recipe in mapped.recipes:
        sources |= {key: list(recipe.targets) for key in recipe.sources}
    for key, names in sources.items():
        stored = files.tensors[key].dtype
        dtypes = [state[name].dtype for name in names if name in state]
        if stored.itemsize == 1 and stored.is_floating_point:
            raise _quantised(files, f"{key!r} is stored in {str(stored).removeprefix('torch.')}")
        if (
            stored is not torch.bool
            and not stored.is_floating_point
            and any(w.is_floating_point for w in dtypes)
        ):
            raise _quantised(files, f"{key!r} is stored in integers")
    stems = {key.removesuffix(".weight") for key in sources} | set(sources)
    for key in mapped.unused:
        match = _SCALES.fullmatch(key)
        if match and match.group(1) in stems:
            raise _quantised(
                files, f"{key!r} is stored beside {match.group(1)!r}, and no weight depends on it"
            )


def _quantised(files: CheckpointFiles, why: str) -> CheckpointError:
    return CheckpointError(
        f"{files.folder} holds quantised weights, although its configuration does not say so: {why}",
        hint="say in config.json how it is quantised (quantization_config), or save the model with plain weights",
    )
