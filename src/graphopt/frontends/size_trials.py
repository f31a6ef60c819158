"""Comparing a captured program with its model at other sizes: which sizes are equal, fixed, or wrong."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..ir.compat import widen_symbol
from ..ir.facts import note_capture
from ..ir.inputs import unite_sizes
from ..ir.program import Program
from ..ir.signature import SizeRange
from ..ir.structure import describe
from .accepting import REFUSALS, accepts
from .compare import Remembered, compare_outputs, resized, tolerance_of
from .size_limits import holding, relations_of, simplify, within

Sizes = dict[str, int]
Trial = Callable[[Sizes], bool | None]

LONGEST = 2100
_WORK = 250_000_000  # limit on the multiplications with weights in one trial
_GROUPS = 12


def share_sizes(program: Program, model: Any, example: dict[str, Any]) -> None:
    """Unite sizes that the model requires to be equal, and fix those that it does not let vary.

    The tracer notices neither if no operator compares the sizes, so the model is run at other sizes.
    """
    signature = program.signature
    hints = {n: limits.hint for n, limits in signature.sizes.items()}
    for name in list(signature.sizes):
        if name not in signature.sizes or _varies(program, model, example, [name], hints):
            continue
        partners = [n for n in signature.sizes if n != name and hints[n] == hints[name]]
        for group in [*([p] for p in partners), partners]:
            if group and _varies(program, model, example, [name, *group], hints):
                first, *others = sorted([name, *group], key=list(signature.sizes).index)
                for other in others:
                    unite_sizes(program, first, other)
                break
        else:
            signature.sizes[name] = SizeRange(hints[name], hints[name], hints[name])
            note_capture(
                program, fixed_sizes=(f"{name} is {hints[name]}: the model took no other that was tried",)
            )


def _varies(program: Program, model: Any, example: dict[str, Any], names: list[str], hints: Sizes) -> bool:
    """Return whether the model accepts another value for some sizes together."""
    limits = [program.signature.sizes[n] for n in names]
    hint = hints[names[0]]
    trials = 0
    for size in (hint + 2, hint * 2, hint + 1, hint - 1, hint // 2, hint * 3):
        if size < 1 or any(size < r.low or (r.high is not None and size > r.high) for r in limits):
            continue
        other = resized(program, example, dict.fromkeys(names, size))
        if other is None:
            return True
        trials += 1
        if accepts(model, other):
            return True
    return not trials


def larger_example(program: Program, model: Any, example: dict[str, Any]) -> dict[str, Any] | None:
    """Return the example with the sizes doubled that the export fixed and the model lets vary, or None if there are none.

    Args:
        program: captured from the example, its limits settled.
        model: run to test sizes.
        example: by parameter name.
    """
    sizes = program.signature.sizes
    fixed: dict[int, list[tuple[str, int]]] = {}
    for name, spec in program.signature.inputs.items():
        for dim, size in enumerate(spec.shape):
            limits = sizes.get(size) if isinstance(size, str) else SizeRange(size, size, size)
            if limits is not None and limits.low == limits.high and limits.hint > 1:
                fixed.setdefault(limits.hint, []).append((name, dim))
    tensors = describe(example, lambda v: isinstance(v, torch.Tensor), "")[1]
    grown: set[tuple[str, int]] = set()
    for dimensions in fixed.values():
        # dimensions of one size often belong together
        for group in (dimensions, *([p] for p in dimensions if len(dimensions) > 1)):
            trial = grown | set(group)
            if not set(group) <= grown and accepts(model, _grown(example, tensors, trial)):
                grown = trial
    return _grown(example, tensors, grown) if grown else None


def _grown(
    example: dict[str, Any], tensors: Mapping[str, Any], dimensions: set[tuple[str, int]]
) -> dict[str, Any]:
    copies = {}
    for name, tensor in tensors.items():
        value = tensor
        for dim in (d for n, d in dimensions if n == name):
            value = torch.cat([value, value], dim)
        copies[id(tensor)] = value.clone()
    grown: dict[str, Any] = tree_map(
        lambda v: copies.get(id(v), v) if isinstance(v, torch.Tensor) else v, example
    )
    return grown


def widen_symbols(program: Program) -> None:
    """Make later inference use the accepted sizes that were found, not those of the example's branch."""
    for symbol, name in program.symbols.items():
        limits = program.signature.sizes[name]
        widen_symbol(program.mode, symbol, limits.low, limits.high)


def trial(program: Program, model: Any, example: dict[str, Any]) -> Trial:
    """Return a function that tells whether program and model agree at some sizes, or None if the model rejects them."""
    limit = tolerance_of(program)

    def same(sizes: Sizes) -> bool | None:
        inputs = resized(program, example, sizes)
        if inputs is None:
            return None
        try:
            with torch.no_grad():
                expected = model(**inputs)
        except REFUSALS:
            return None
        asked = model if isinstance(model, Remembered) else lambda **_: expected
        signature = program.signature
        program.signature = replace(signature, constraints=())
        try:
            # fx prints the traceback of a failure, which is an expected result here
            with contextlib.redirect_stderr(io.StringIO()):
                return compare_outputs(program, asked, inputs) <= limit
        except Exception:  # libraries raise all kinds of errors for a graph at a size it was not captured for
            return False
        finally:
            program.signature = signature

    return same


def settle_limits(program: Program, same: Trial, constants: Iterator[int] | None = None) -> set[str]:
    """Keep only the constraints without which the program is wrong; return those that were dropped.

    Each constraint is violated on purpose, at the nearest sizes and at a distant one, if possible without violating
    others. If the result still matches the model, the guard concerned memory layout or the like. If the model cannot
    be run there, the constraint remains.

    Args:
        program: its signature is changed in place.
        same: the comparison at given sizes, from :func:`trial`.
        constants: lengths at which the model's behaviour may change.
    """
    signature = program.signature
    before = set(signature.constraints)
    hints = {n: limits.hint for n, limits in signature.sizes.items()}
    if same(hints):
        work = _work(program)
        dropped = _break_each(program, same, work)
        kept = tuple(text for text in signature.constraints if text not in dropped)
        signature.constraints = kept
        _try_one(program, same)
        _try_far(program, same, work, set(constants or ()) | set(_numbers(program)))
    gone = before - set(signature.constraints)
    simplify(signature)
    widen_symbols(program)
    return gone


def _work(program: Program) -> Callable[[Sizes], bool]:
    """Return a predicate that tells whether a trial is affordable, by the number of weights and tokens."""
    weights = sum(torch.Size(w.source.shape).numel() for w in program.weights.values())
    hints = {n: limits.hint for n, limits in program.signature.sizes.items()}

    def volume(sizes: Mapping[str, int]) -> int:
        total = 1
        for size in sizes.values():
            total *= max(1, size)
        return total

    usual = volume(hints)

    def affordable(sizes: Sizes) -> bool:
        cost = volume({**hints, **sizes})
        few = cost <= 4 * usual or cost * weights <= _WORK
        return few and max(sizes.values(), default=0) <= max(LONGEST, *hints.values())

    return affordable


def _break_each(program: Program, same: Trial, affordable: Callable[[Sizes], bool]) -> set[str]:
    signature = program.signature
    relations = relations_of(signature)
    dropped: set[str] = set()
    confirmed: set[str] = set()
    for name, limits in signature.sizes.items():
        constraining = [r for r in relations if name in r.names]
        if not constraining:
            continue
        points = within(limits)
        points = points[points <= max(LONGEST, limits.hint)]
        holds = torch.stack([holding(signature, r, name, points) for r in constraining])
        groups: dict[frozenset[str], list[int]] = {}
        for point in (~holds).any(0).nonzero().flatten().tolist():
            broken = frozenset(
                r.text
                for r, satisfied in zip(constraining, holds[:, point].tolist(), strict=True)
                if not satisfied
            )
            groups.setdefault(broken, []).append(int(points[point]))
        near = {key: min(sizes, key=lambda n: abs(n - limits.hint)) for key, sizes in groups.items()}
        order = sorted(groups, key=lambda key: (len(key), abs(near[key] - limits.hint)))
        for key in order[:_GROUPS]:
            open_ = key - dropped
            if not open_ or open_ & confirmed:
                continue
            results = [
                same({name: size})
                for size in _witnesses(groups[key], limits.hint)
                if affordable({name: size})
            ]
            if False in results:
                confirmed |= open_
            elif True in results:
                dropped |= open_
    return dropped - confirmed


def _witnesses(sizes: list[int], hint: int) -> list[int]:
    below, above = [n for n in sizes if n < hint], [n for n in sizes if n > hint]
    return list(dict.fromkeys([*below[-1:], *above[:1], *above[-1:]]))


def _try_one(program: Program, same: Trial) -> None:
    """Test sizes of 1, which the tracer treats specially and without a guard."""
    for name, limits in program.signature.sizes.items():
        if limits.low <= 1 < limits.hint and same({name: 1}) is False:
            program.signature.sizes[name] = replace(limits, low=2)


def _try_far(program: Program, same: Trial, affordable: Callable[[Sizes], bool], constants: set[int]) -> None:
    """Compare beyond the largest number that may be a window or a chunk; shorten the range if results differ."""
    signature = program.signature
    rows = {spec.shape[0] for spec in signature.inputs.values() if spec.shape}
    for name, limits in list(signature.sizes.items()):
        if name in rows or limits.low == limits.high:
            continue
        others: Sizes = {n: 1 for n in rows if isinstance(n, str) and n in signature.sizes and n != name}
        others = {n: max(1, signature.sizes[n].low) for n in others}
        lengths = sorted({n + step for n in constants for step in (0, 1)} | {4 * limits.hint}, reverse=True)
        trials = 0
        for length in lengths:
            sizes = {**others, name: length}
            if (
                length <= limits.hint
                or not affordable(sizes)
                or not signature.takes({**_hints(program), **sizes})
            ):
                continue
            equal = same(sizes)
            trials += 1
            if equal is False:
                _shorten(program, same, name, others, length)
            if equal is not None or trials == 4:
                break


def _hints(program: Program) -> Sizes:
    return {n: limits.hint for n, limits in program.signature.sizes.items()}


def _shorten(program: Program, same: Trial, name: str, others: Sizes, wrong: int) -> None:
    """Limit a size to the values at which it was found correct, if it is wrong elsewhere for an unknown reason."""
    limits = program.signature.sizes[name]

    def last_right(wrong: int) -> int:
        right, step = limits.hint, 1 if wrong > limits.hint else -1
        if same({**others, name: right + step}) is False:
            return right
        while abs(wrong - right) > 1:
            middle = (wrong + right) // 2
            if same({**others, name: middle}) is False:
                wrong = middle
            else:
                right = middle
        return right

    low = limits.low
    if same({**others, name: max(low, 1)}) is False or same({**others, name: limits.hint - 1}) is False:
        low = last_right(max(low, 1))
    program.signature.sizes[name] = replace(limits, low=low, high=last_right(wrong))


def _numbers(program: Program) -> Iterator[int]:
    """Return the integers in the graph, and the lengths of its tables."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            stack = [*node.args, *node.kwargs.values()]
            while stack:
                value = stack.pop()
                if isinstance(value, (list, tuple)):
                    stack += value
                elif isinstance(value, int) and 1 < abs(value) <= LONGEST:
                    yield abs(value)
    for weight in program.weights.values():
        if not weight.trainable:
            yield from (n for n in weight.source.shape if 1 < n <= LONGEST)


def numbers_in(config: Any) -> Iterator[int]:
    """Return the integers in a configuration, which may be windows, chunks and blocks."""
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, int) and not isinstance(value, bool) and 1 < value <= LONGEST:
            yield value
