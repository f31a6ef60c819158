"""Inputs on which an export is compared with the program: several sizes, paddings, masks and cache positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ...ir.errors import GraphoptError
from ...ir.facts import KVCache, Quantized
from ...ir.program import Program
from ...ir.running.examples import example_inputs
from ...ir.running.execute import interpret, run
from ...ir.schema import arguments, is_operator
from .calibrated import within_ranges
from .sizes import namesake, static_sizes


@dataclass(frozen=True)
class Case:
    """One set of inputs to compare on. ``mask`` has the positions that count; ``left``: padding comes first."""

    label: str
    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None = None
    left: bool = False


def counted(
    result: torch.Tensor, reference: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the parts of two values to compare, without padded positions; None if the case does not cover them."""
    mask = case.mask
    if mask is not None:
        if reference.dim() >= 2 and reference.shape[:2] == mask.shape:
            result, reference = result[mask], reference[mask]
        elif case.left:
            return None
    return (result, reference) if reference.numel() else None


def comparison_cases(program: Program, sizes: Mapping[str, int], dynamic: bool) -> Iterator[Case]:
    """Yield inputs at one size, or at two if dynamic, padded on the right and on the left if there is an attention mask.

    Other masks have some entries flipped, run-time settings are tried at the far end of their range, and new tokens
    are also placed after existing cache entries.

    Args:
        program: the program to make inputs for.
        sizes: fixed sizes by name.
        dynamic: whether to compare at a second size too.
    """
    first = static_sizes(program, sizes)
    settings = [first]
    if dynamic:
        settings.append(_other_sizes(program, first, sizes))
    for values in settings:
        labels = [f"{name} {value}" for name, value in values.items() if namesake(name) == name]
        label = f"inputs of {', '.join(labels) or 'the captured sizes'}"
        plain = _unmasked(program, _inputs(program, values, "none"))
        yield Case(label, plain)
        for side in ("right", "left"):
            padded = _inputs(program, values, side)
            mask = padded.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not bool(mask.bool().all()):
                yield Case(f"{label}, padded {side}", padded, mask.bool(), side == "left")
        turned = {name: _flipped(plain[name]) for name in _masks(program)}
        if turned:
            yield Case(f"{label}, with another {' and '.join(turned)}", plain | turned)
        later = _later(program, plain)
        if later:
            yield Case(f"{label}, after what caches hold", plain | later)
    if program.dials:
        ends = {
            name: torch.tensor(
                d.low if d.default - d.low >= d.high - d.default else d.high, dtype=torch.float64
            )
            for name, d in program.dials.items()
        }
        listing = ", ".join(f"{name} {float(end):g}" for name, end in ends.items())
        yield Case(f"{label}, {listing}", plain | ends)


def _masks(program: Program) -> list[str]:
    """Return the names of inputs that are masks of unknown meaning."""
    return [
        name for name, spec in program.signature.inputs.items()
        if "mask" in name and name != "step_mask" and not spec.dtype.is_floating_point
        and not (name == "attention_mask" and len(spec.shape) == 2)
    ]  # fmt: skip


def _unmasked(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs whose masks hide nothing: ones in some programs, zeros in others."""
    names = _masks(program)
    if not names or _sees(program, inputs):
        return inputs
    other = inputs | {name: 1 - inputs[name].int() for name in names}
    other |= {name: other[name].to(inputs[name].dtype) for name in names}
    return other if _sees(program, other) else inputs


def _sees(program: Program, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Return whether every attention row sees a key, and no output is NaN."""
    attentions = [arguments(n) for n in program.nodes if is_operator(n, "graphopt.attention")]
    masks = {call[name] for call in attentions for name in ("key_mask", "bias")} - {None}
    values = interpret(program, dict(inputs), record=masks)
    visible_keys = [
        ((m := values[n.name]) != (0 if m.dtype is torch.bool else -math.inf)).any(-1).all() for n in masks
    ]
    numbers = [~v.isnan().any() for v in values.values() if isinstance(v, torch.Tensor)]
    return all(map(bool, [*visible_keys, *numbers]))


def _flipped(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask with the last third of its first row flipped."""
    turned = mask.clone()
    if mask.dim() and (few := mask.shape[-1] // 3):
        turned[0, ..., -few:] = 1 - turned[0, ..., -few:].int()
    return turned


def _later(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return positions after the filled part of the caches; empty if there are no caches or no room is left."""
    cache = program.facts.get(KVCache)
    if cache is None or cache.positions not in inputs:
        return {}
    new = int(inputs[cache.positions].shape[-1])
    slots = min(int(v.shape[2]) for n, v in inputs.items() if "_cache_" in n)
    start = slots - new
    if Quantized in program.facts:
        start = min(start, new)  # the caches come from one step
    if start <= 0:
        return {}
    return {n: inputs[n] + start for n in (cache.positions, "cache_slots") if n in inputs}


def _inputs(program: Program, sizes: Mapping[str, int], padding: str) -> dict[str, torch.Tensor]:
    settings = {
        name: torch.tensor(setting.default, dtype=torch.float64) for name, setting in program.dials.items()
    }
    inputs = example_inputs(program, dict(sizes), padding=padding) | settings
    if Quantized in program.facts:
        return within_ranges(program, inputs)
    return inputs


def _other_sizes(program: Program, first: Mapping[str, int], fixed: Mapping[str, int]) -> dict[str, int]:
    """Return other sizes that the program itself takes."""
    other = dict(first)
    for name in first:
        if name in fixed or namesake(name) in fixed:
            continue
        limits = program.signature.sizes[name]
        for value in (first[name] + 2, first[name] * 2, first[name] - 2):
            if value < max(limits.low, 1) or (limits.high is not None and value > limits.high):
                continue
            trial = {n: value if namesake(n) == namesake(name) else v for n, v in other.items()}
            if program.signature.takes(trial) and _runs(program, trial):
                other = trial
                break
    return other


def _runs(program: Program, sizes: Mapping[str, int]) -> bool:
    try:
        run(program, _inputs(program, sizes, "none"))
    except (RuntimeError, IndexError, ValueError, GraphoptError):
        return False
    return True
