"""Comparison of a program with a cache, run in chunks in float64, with the one without."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from ...ir.checking.comparison import relative_error
from ...ir.checking.streaming import Difference
from ...ir.errors import VerificationError
from ...ir.facts import CrossCache, KVCache, StateCache
from ...ir.operators.traits import Trait, has
from ...ir.running.examples import example_inputs
from ...ir.running.execute import interpret, memory_available
from ...ir.running.recurrent_state import caches_of, in_a_row, states_of
from ...ir.running.retype import retyped, widen_inputs
from ...ir.schema import is_operator
from ...ir.signature import make_fill

if TYPE_CHECKING:
    from ...ir.program import Program


def compare_with_cache(whole: Program, cached: Program, tokens: int = 9, seed: int = 0) -> Difference | None:
    """Run two rows of tokens in chunks, the second row slower than the first, and return the largest difference.

    The last tokens of a chunk may not count: those of a row that is slower, which are fed again in the next one.

    Args:
        whole: takes all tokens at once.
        cached: takes chunks of tokens, and caches.
        tokens: number of tokens, at most the capacity.
        seed: of tokens and chunks.

    Raises:
        VerificationError: caches of that capacity do not fit into memory.
    """
    cache, states = cached.facts[KVCache], cached.facts.get(StateCache)
    capacity = cache.capacity if isinstance(cache.capacity, int) else tokens + 3
    tokens = min(tokens, capacity - 1)
    _require_room(cached, capacity)
    # shapes are not inferred again: that fails where sizes depend on values
    wide, narrow = (retyped(program, shapes=False) for program in (whole, cached))
    for program in (wide, narrow):
        widen_inputs(program)
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    spec = whole.signature.inputs[cache.tokens]
    shape = (2, tokens, *(s for s in spec.shape[2:] if isinstance(s, int)))
    if spec.dtype.is_floating_point:
        tokens_in = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        tokens_in = _drawn(vocabulary(whole, cache.tokens), shape, generator).to(spec.dtype)
    beside = _of_encoder(whole, cached, tokens)
    expected = interpret(wide, wide.bind((), {cache.tokens: tokens_in, **beside}))
    worst: Difference | None = None
    state = empty_caches(narrow, 2, capacity, torch.float64)
    starts = [0, 0]
    while starts[0] < tokens:
        # both rows lie inside the text and the caches
        size = min(draw.randint(1, 3) if starts[0] else 3, tokens - starts[0])
        counts = [size, size if starts[1] == 0 or starts[1] < starts[0] else size - 1]
        if starts[1] == starts[0] == 0 and size > 1:
            counts[1] = size - 1
        positions = torch.tensor(starts)[:, None] + torch.arange(size)[None]
        piece = torch.stack([tokens_in[row].index_select(0, positions[row]) for row in range(2)])
        inputs = {cache.tokens: piece, **state, **beside}
        if cache.positions:
            inputs[cache.positions] = positions
        if states is not None:
            inputs[states.taken] = torch.arange(size)[None] < torch.tensor(counts)[:, None]
        for name, spec_ in narrow.signature.inputs.items():
            if spec_.fill is not None and spec_.fill.rule == "following":
                ahead = make_fill(spec_.fill, spec_.dtype, tokens_in)
                inputs[name] = torch.stack([ahead[row].index_select(0, positions[row]) for row in range(2)])
        if cache.tree:
            inputs = in_a_row(cached, inputs)
        values = interpret(narrow, narrow.bind((), inputs))
        state = {name: values.pop(f"next_{name}") for name in state}
        for name, value in values.items():
            reference = expected.get(name)
            if reference is None:  # keys and values of an encoder
                continue
            if not isinstance(value, torch.Tensor) or value.dim() < 2 or reference.shape[:2] != (2, tokens):
                continue
            if value.shape[1] != size:  # of an encoder that happens to be as long
                continue
            largest = float(reference.abs().nan_to_num(0.0, 0.0, 0.0).max())
            picked = torch.stack([reference[row].index_select(0, positions[row]) for row in range(2)])
            error = relative_error(value, picked, at_least=largest)
            if worst is None or not error <= worst.error:
                worst = Difference(name, error)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return worst


def _drawn(count: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return tokens, in each row different ones if there are enough: where keys are picked by score, equal ones tie."""
    if len(shape) != 2 or count < shape[1]:
        return torch.randint(0, count, shape, generator=generator)
    return torch.stack([torch.randperm(count, generator=generator)[: shape[1]] for _ in range(shape[0])])


def _of_encoder(whole: Program, cached: Program, tokens: int) -> dict[str, torch.Tensor]:
    """Return values of the inputs of an encoder, for two rows."""
    cross = cached.facts.get(CrossCache)
    if cross is None:
        return {}
    sizes = {str(whole.signature.inputs[name].shape[0]): 2 for name in cross.inputs}
    made = example_inputs(whole, sizes)
    return {
        name: made[name].double() if made[name].is_floating_point() else made[name] for name in cross.inputs
    }


def _require_room(cached: Program, capacity: int) -> None:
    """Raise an error before allocating too much: two rows in float64, before and after a step, and a copy in between."""
    shapes = [cached.signature.inputs[name].shape for name in caches_of(cached)]
    needed = 3 * 2 * 8 * capacity * sum(int(heads) * int(size) for _, heads, _, size in shapes)
    if needed > memory_available():
        raise VerificationError(
            f"caches of {capacity:,} slots cannot be compared here: {needed / 1e9:,.0f} GB are needed, "
            f"{memory_available() / 1e9:,.0f} GB are free",
            hint="choose a smaller max_length, or leave it out: the capacity is then that of the given caches",
        )


def empty_caches(
    program: Program, batch: int, capacity: int, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return empty caches and states by input name."""
    slots, caches = caches_of(program), {}
    for name in states_of(program):
        spec = program.signature.inputs[name]
        sizes = [batch, *(size for size in spec.shape[1:] if isinstance(size, int))]
        if name in slots:
            sizes = [batch, int(spec.shape[1]), capacity, int(spec.shape[3])]
        wide = dtype is not None and spec.dtype.is_floating_point
        caches[name] = torch.zeros(sizes, dtype=dtype if wide else spec.dtype)
    return caches


def vocabulary(program: Program, tokens: str) -> int:
    """Return the size of the vocabulary, by the smallest table that the token input indexes."""
    sizes, work = [], [program.input_nodes[tokens]]
    while work:
        for user in work.pop().users:
            if is_operator(user, "aten.embedding"):
                sizes.append(int(user.all_input_nodes[0].meta["val"].shape[0]))
            elif has(user, Trait.RESHAPE | Trait.CAST):
                work.append(user)
    return min(sizes, default=2)


__all__ = ["compare_with_cache", "empty_caches", "vocabulary"]
