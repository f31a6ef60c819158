"""Running a streaming program in pieces, and comparing it with the program it was made from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..facts import Streaming
from ..program import Program
from ..running.examples import example_inputs
from ..running.execute import interpret, run
from ..running.recurrent_state import states_of
from ..running.retype import retyped
from ..sizes import expression, parse_size
from .comparison import relative_error


@dataclass(frozen=True)
class Difference:
    """The value that differs most, and its error relative to the largest value."""

    name: str
    error: float


def initial_state(
    program: Program, batch: int = 1, *, sizes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Return the initial recurrent state: zeros, by input name.

    Args:
        program: made by stream-convolutions.
        batch: how many streams run in parallel.
        sizes: other sizes of the state that vary, by name.

    Raises:
        UsageError: the program has no recurrent state, or a size of it is not given.
    """
    names = states_of(program)
    if not names and Streaming not in program.facts:
        raise UsageError(
            "this program has no recurrent state", hint="stream-convolutions makes a program that has one"
        )
    states = {}
    for name in names:
        spec = program.signature.inputs[name]
        size_values = {str(spec.shape[0]): batch, **(sizes or {})}
        shape = [_number(program, name, size, size_values) for size in spec.shape]
        states[name] = torch.zeros(shape, dtype=spec.dtype)
    return states


def _number(program: Program, name: str, size: int | str, size_values: Mapping[str, int]) -> int:
    """Return the value of a size, which may be an expression over sizes of the inputs."""
    symbols = {size_name: symbol for symbol, size_name in program.symbols.items()}
    value = parse_size(size, symbols)
    value = value.subs(
        {symbols[size_name]: number for size_name, number in size_values.items() if size_name in symbols}
    )
    if not value.is_Integer:
        raise UsageError(f"{name} has the size {size}, which varies", hint=f"sizes={{{str(size)!r}: ...}}")
    return int(value)


def _sizes_of(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the sizes of the inputs, by name."""
    shapes = [(program.signature.inputs[name].shape, tensor.shape) for name, tensor in inputs.items()]
    return {s: n for names, shape in shapes for s, n in zip(names, shape, strict=True) if isinstance(s, str)}


def stream(program: Program, pieces: Iterable[Mapping[str, torch.Tensor] | torch.Tensor]) -> Iterator[Any]:
    """Yield the outputs of a streaming program for each piece, passing the recurrent state from piece to piece.

    Args:
        program: made by stream-convolutions.
        pieces: inputs by name, or the only input.
    """
    state: dict[str, torch.Tensor] | None = None
    others = [name for name in program.signature.inputs if name not in states_of(program)]
    for piece in pieces:
        inputs = dict(piece) if isinstance(piece, Mapping) else {others[0]: piece}
        if state is None:
            sizes = _sizes_of(program, {name: t for name, t in inputs.items() if name in others})
            state = initial_state(program, next(iter(inputs.values())).shape[0], sizes=sizes)
        results = run(program, program.bind((), {**inputs, **state}))
        state = {name: results.pop(f"next_{name}") for name in state}
        yield next(iter(results.values())) if len(results) == 1 else results


def compare_in_chunks(
    whole: Program, streaming: Program, time: str, *, every_value: bool = False
) -> Difference | None:
    """Run random pieces in float64 and return the largest difference from the program that takes all frames.

    Args:
        whole: the program that takes all frames at once.
        streaming: the program that takes pieces.
        time: the name of the size that is split into pieces.
        every_value: compare all values of the graph that both have, and return the first that differs.
    """
    wide, cut = retyped(whole), retyped(streaming)
    draw = random.Random(0)
    back = max(
        (int(s) for n in states_of(cut) for s in cut.signature.inputs[n].shape[2:] if isinstance(s, int)),
        default=1,
    )
    frames = 2 * back + 7
    inputs, axes = _inputs(wide, time, frames)
    recorded = [n for n in wide.graph.nodes if _timed(wide, n, time) is not None] if every_value else []
    expected = interpret(wide, wide.bind((), inputs), record=recorded)
    worst: Difference | None = None
    for pieces in ([1] * frames, _pieces(frames, draw), [frames]):
        results = _in_pieces(cut, inputs, axes, pieces, [n.name for n in recorded])
        for name in [*[n.name for n in recorded], *whole.signature.output_names]:
            error = _error(wide, name, results.get(name), expected, time)
            if error is not None and (worst is None or error > worst.error):
                if every_value and error > 1e-9:
                    return Difference(name, error)
                worst = Difference(name, error)
    return worst


def _pieces(frames: int, draw: random.Random) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < frames:
        sizes.append(min(draw.randint(1, 5), frames - sum(sizes)))
    return sizes


def _inputs(program: Program, time: str, frames: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return an input of so many frames; what a call may leave out is left out, so that every piece fills it by itself."""
    sizes = {name: _other(program, name) for name in program.signature.sizes} | {time: frames}
    made = example_inputs(program, sizes, padding="none")
    inputs, axes = {}, {}
    for name, spec in program.signature.inputs.items():
        if spec.fill is not None:
            continue
        inputs[name] = made[name]
        if time in spec.shape:
            axes[name] = spec.shape.index(time)
    return inputs, axes


def _other(program: Program, size: str) -> int:
    """Return 2 for the batch, and the size at capture for any other axis."""
    first = {str(spec.shape[0]) for spec in program.signature.inputs.values() if spec.shape}
    return 2 if size in first or size not in program.signature.sizes else program.signature.sizes[size].hint


def _in_pieces(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, int],
    pieces: Sequence[int],
    names: Sequence[str],
) -> dict[str, list[torch.Tensor]]:
    results: dict[str, list[torch.Tensor]] = {}
    batch = next(iter(inputs.values())).shape[0]
    states = initial_state(program, batch, sizes=_sizes_of(program, inputs))
    state = {n: t.double() for n, t in states.items()}
    nodes = {n.name: n for n in program.graph.nodes}
    start = 0
    for size in pieces:
        piece = {n: t.narrow(axes[n], start, size) if n in axes else t for n, t in inputs.items()}
        start += size
        bound = program.bind((), {**piece, **state})
        values = interpret(program, bound, record=[nodes[n] for n in names if n in nodes])
        state = {name: values[f"next_{name}"] for name in state}
        for name, value in values.items():
            results.setdefault(name, []).append(value)
    return results


def _timed(program: Program, node: Any, time: str) -> int | None:
    """Return the time axis of a value, if it has exactly one."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return None
    axes = [i for i, s in enumerate(value.shape) if program.symbols.get(expression(s)) == time]
    return axes[0] if len(axes) == 1 else None


def _error(
    program: Program, name: str, pieces: list[torch.Tensor] | None, expected: Mapping[str, Any], time: str
) -> float | None:
    """Return the error of a value's concatenated pieces; None where there are none."""
    nodes = {n.name: n for n in program.graph.nodes}
    node = nodes.get(name)
    if name in program.signature.output_names:
        node = dict(zip(program.signature.output_names, program.output_node.args[0], strict=True))[name]  # type: ignore[arg-type]
    if pieces is None or node is None:
        return None
    axis = _timed(program, node, time)
    if axis is None:
        return float("inf") if name in program.signature.output_names else None
    return relative_error(torch.cat(pieces, axis), expected[name])
