"""Example inputs of a program: random, of the right types and sizes, padded where there is a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..facts import QuantizedCache
from ..operators.traits import Trait, has
from ..schema import is_operator
from ..sizes import expression, parse_size

if TYPE_CHECKING:
    from ..program import Program

DEFAULT_SIZES = {"batch": 2, "sequence": 9, "decoder_sequence": 5}


def rows_of(node: fx.Node) -> int:
    """Return the number of values an integer input may have: the rows of the tables it indexes."""
    rows = [2]
    work, seen = [node], set()
    while work:
        current = work.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if is_operator(user, "aten.embedding") and user.args[1] is current:
                rows.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
            elif has(user, Trait.VIEW | Trait.IDENTITY | Trait.CAST):
                work.append(user)
    return max(rows)


def marked_tokens(program: Program, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the token that stands for parts of an image or of audio, and how many a row needs, by input.

    Such tokens are compared with their id, and what takes their place is scattered over them. Fewer would leave values
    out, so that a change of them would not show.

    Args:
        program: of which inputs are made.
        sizes: by name.
    """
    symbols = {name: symbol for symbol, name in program.symbols.items()}
    values = {symbols[name]: size for name, size in sizes.items() if name in symbols}
    found: dict[str, tuple[int, int]] = {}
    for name, node in program.input_nodes.items():
        if node.meta["val"].dim() != 2:
            continue
        for comparison in (u for u in node.users if is_operator(u, "aten.eq") and isinstance(u.args[1], int)):
            work, seen = [comparison], {comparison}
            while work:
                current = work.pop()
                for user in current.users:
                    if is_operator(user, "aten.masked_scatter") and user.args[1] is current:
                        source = user.args[2].meta["val"]  # type: ignore[union-attr]
                        count = math.prod(int(expression(size).subs(values)) for size in source.shape[:-1])
                        rows = int(expression(node.meta["val"].shape[0]).subs(values))
                        found[name] = (int(comparison.args[1]), -(-count // max(1, rows)))  # type: ignore[arg-type]
                    elif user not in seen and has(user, Trait.VIEW | Trait.IDENTITY | Trait.CAST):
                        seen.add(user)
                        work.append(user)
    return found


def example_inputs(
    program: Program, sizes: dict[str, int] | None = None, *, seed: int = 0, padding: str = "right"
) -> dict[str, torch.Tensor]:
    """Return a value for each input of a program.

    Args:
        program: the program to make inputs for.
        sizes: by name; small ones within the program's limits if not given.
        seed: of the random values.
        padding: which end of the first row a mask hides: right, left or none.
    """
    chosen = {**{n: r.hint for n, r in program.signature.sizes.items()}, **DEFAULT_SIZES, **(sizes or {})}
    for name, limits in program.signature.sizes.items():
        chosen[name] = max(limits.low, min(chosen[name], limits.high or chosen[name]))
    for name in chosen:
        # the tracer numbers sizes that occur twice
        base = name.rsplit("_", 1)[0]
        if name not in (sizes or {}) and base in ("batch", "sequence") and name.rsplit("_", 1)[-1].isdigit():
            chosen[name] = chosen.get(base, chosen[name])
    if sizes is None:
        chosen |= program.signature.nearest({n: v for n, v in chosen.items() if n in program.signature.sizes})
    marked = marked_tokens(program, chosen)
    for name, (_, count) in marked.items():
        length = program.signature.inputs[name].shape[1]
        if isinstance(length, str) and length not in (sizes or {}) and chosen.get(length, count) < count:
            chosen[length] = count + 5
    generator = torch.Generator().manual_seed(seed)
    symbols = {name: symbol for symbol, name in program.symbols.items()}
    values = {symbols[name]: size for name, size in chosen.items() if name in symbols}
    inputs: dict[str, torch.Tensor] = {}
    for name, spec in program.signature.inputs.items():
        shape = [int(parse_size(s, symbols, name).subs(values)) for s in spec.shape]
        held = _of_codes(program, name, shape, spec.dtype, generator)
        if held is not None:
            inputs[name] = held
        elif spec.dtype.is_floating_point:
            inputs[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)
        elif name == "step_mask":
            # every new token sees those before it
            inputs[name] = torch.ones(shape, dtype=spec.dtype).tril()
        elif "mask" in name:
            mask = torch.ones(shape, dtype=spec.dtype)
            hidden = shape[-1] // 3
            if padding == "right" and hidden:
                mask[0, ..., -hidden:] = 0
            elif padding == "left" and hidden:
                mask[0, ..., :hidden] = 0
            inputs[name] = mask
        elif "position" in name or name == "cache_slots":
            inputs[name] = torch.arange(shape[-1], dtype=spec.dtype).expand(shape).contiguous()
        elif spec.fill is not None and spec.fill.rule == "zeros":
            inputs[name] = torch.zeros(shape, dtype=spec.dtype)
        elif spec.dtype is torch.bool:
            inputs[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            rows = rows_of(program.input_nodes[name])
            low = 3 if rows > 8 else 0
            inputs[name] = torch.randint(low, rows, shape, generator=generator).to(spec.dtype)
        if name in marked:
            token, count = marked[name]
            ids = inputs[name]
            ids[ids == token] = low if token != low else low + 1
            if count <= ids.shape[1]:
                ids[:, :count] = token
    return inputs


def _of_codes(
    program: Program, name: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor | None:
    """Return any codes for a cache of few bits, and positive scales that make them about as large as random values."""
    cache = program.facts.get(QuantizedCache)
    if cache is None:
        return None
    if name in cache.caches:
        limits = torch.iinfo(dtype)
        low = -limits.max if limits.min else 0
        return torch.randint(low, limits.max + 1, shape, generator=generator).to(dtype)
    if name.removesuffix("_scale") in cache.caches:
        largest = 2.0 / (127 if cache.bits == 8 else 7.5)
        return (largest * (0.5 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64))).to(dtype)
    return None
