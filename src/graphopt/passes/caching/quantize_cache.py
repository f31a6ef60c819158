"""KV caches in few bits: codes with scales for each token, which are stored as the token is and never change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.facts import Canonical, KVCache, Legal, Quantized, QuantizedCache
from ...ir.inputs import add_input
from ...ir.option import option
from ...ir.program import Program
from ...ir.schema import argument, arguments, is_operator
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Refused, Site

composites = torch.ops.graphopt
_GROUP = 32
_CACHE = re.compile(r"(key|value)_cache_\d+")


@dataclass(frozen=True)
class _Cache:
    """A cache of one program.

    Attributes:
        input: where it comes from.
        local: the part of it that a rank holds; None if it is not divided.
        store: what writes new tokens into it.
        gathered: what puts the parts of all ranks together; None if it is not divided.
    """

    input: fx.Node
    local: fx.Node | None
    store: fx.Node
    gathered: fx.Node | None


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Keep keys and values of earlier tokens in 8 or 4 bits, each token's with scales of its own.

    After insert-cache. Caches become integers, and caches of their scales come beside them: ``key_cache_0_scale``
    (batch, key-value heads, capacity, groups), with ``next_key_cache_0_scale`` as output; for 4 bits also
    ``key_cache_0_low``, the least value of each group. Codes and scales are computed as a token is stored and do not
    change afterwards, so results do not depend on how a text is divided into steps. Keys are stored after their rotation.
    """

    name = "quantize-cache"
    contract = Approximate()
    requires = (Canonical, KVCache)
    provides = (QuantizedCache,)
    excludes = (QuantizedCache, Quantized, Legal)
    paper = "groups of a token: arXiv 2402.02750, 2303.06865"

    bits: int = option(8, help="bits of a stored entry; 8: symmetric, 4: with a least value", choices=(8, 4))
    group: int = option(
        0,
        help="entries of a token's vector that share a scale; 0: the whole vector for 8 bits, for 4 bits 32, or the "
        "largest number below that divides it",
        low=0,
    )
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield the caches, and those that cannot be stored in codes."""
        order = {node: number for number, node in enumerate(program.input_nodes.values())}
        stores = [n for n in program.graph.nodes if is_operator(n, "graphopt.cache_store")]
        found = [(store, _cache_of(program, store)) for store in stores]
        for store, cache in sorted(found, key=lambda pair: order.get(pair[1].input, 0) if pair[1] else 0):
            name = str(cache.input.meta.get("input", cache.input.name)) if cache else store.name
            reason = "it is no cache that insert-cache made" if cache is None else self._refusal(cache)
            if reason:
                yield Refused(name, reason, program.source_line(store))
                continue
            size = int(store.meta["val"].shape[-1])
            yield Site(name, bits=self.bits, group=self._group(size)), cache

    def _group(self, size: int) -> int:
        if self.group:
            return self.group
        if self.bits == 8:
            return size
        return max(n for n in range(1, min(size, _GROUP) + 1) if size % n == 0)

    def _refusal(self, cache: _Cache) -> str:
        value = cache.store.meta["val"]
        size = int(value.shape[-1])
        if not value.dtype.is_floating_point:
            return f"its type is {str(value.dtype).removeprefix('torch.')}"
        if size % self._group(size):
            return f"groups of {self.group} do not divide its vectors of {size}"
        if self.bits == 4 and size % 2:
            return f"two codes share a byte, and its vectors have {size} entries"
        group, item = self._group(size), value.dtype.itemsize
        if stored_bytes(size, item, self.bits, group) >= size * item:
            return f"scales for groups of {group} take more than {self.bits} bits save"
        return ""

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return how the bytes of the caches per token change."""
        planned = {site.block: site for site in plan.sites}
        before = after = 0
        for name, node in program.input_nodes.items():
            if _CACHE.fullmatch(name):
                value = node.meta["val"]
                heads, size, item = int(value.shape[1]), int(value.shape[-1]), value.dtype.itemsize
                before += heads * size * item
                site = planned.get(name)
                after += heads * (
                    size * item if site is None else stored_bytes(size, item, site["bits"], site["group"])
                )
        if not planned:
            return []
        return [f"caches take {before:,} bytes for each token before and {after:,} after"]

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Store codes and scales of each planned cache, and let attention read the values that they stand for."""
        chosen = self.chosen(program, plan)
        for site, cache in chosen:
            _store_codes(program, cache, site["bits"], site["group"])
        if chosen:
            bits = chosen[0][0]["bits"]
            program.facts.add(QuantizedCache(bits, tuple(site.block for site, _ in chosen)))


def stored_bytes(size: int, item: int, bits: int, group: int) -> int:
    """Return the bytes of one head's vector of one token: codes, and a scale for each group, for 4 bits with a low value.

    Args:
        size: entries of the vector.
        item: bytes of a scale.
        bits: of a code.
        group: entries that share a scale.
    """
    return size * bits // 8 + size // group * item * (1 if bits == 8 else 2)


def _cache_of(program: Program, store: fx.Node) -> _Cache | None:
    source = argument(store, "cache")
    local = source if is_operator(source, "graphopt.local_slice") else None
    place = source if local is None else argument(local, "x")
    name = str(place.meta.get("input", ""))
    output = program.outputs.get(f"next_{name}")
    if output is None or not _CACHE.fullmatch(name):
        return None
    gathered = output if is_operator(output, "graphopt.all_gather") else None
    whole = output if gathered is None else argument(gathered, "x")
    return _Cache(place, local, store, gathered) if whole is store else None


def _store_codes(program: Program, cache: _Cache, bits: int, group: int) -> None:
    store, call = cache.store, program.edit.call
    operands = arguments(store)
    values, slots = operands["values"], operands["slots"]
    name, whole = str(cache.input.meta["input"]), cache.input.meta["val"]
    kind = whole.dtype
    with program.edit.before(store):
        if values.meta["val"].dtype != kind:
            values = call(torch.ops.aten.to.dtype, values, kind)
        low = call(composites.cache_low.default, values, group=group) if bits == 4 else None
        scale = call(composites.cache_scale.default, values, low, group=group)
        codes = call(composites.cache_codes.default, values, scale, low)
    outputs = dict(program.outputs)
    placed = _retyped(program, cache.input, codes)
    parts: list[fx.Node | None] = []
    for suffix, part in (("", codes), ("_scale", scale), ("_low", low)):
        if part is None:
            parts.append(None)
            continue
        if suffix:
            shape = [*whole.shape[:3], part.meta["val"].shape[-1]]
            placed = add_input(program, name + suffix, shape, kind)
        with program.edit.before(store):
            local = placed
            if cache.local is not None:
                local = call(cache.local.target, placed, *cache.local.args[1:], **cache.local.kwargs)
            stored = call(composites.cache_store.default, local, part, slots)
            result = stored
            if cache.gathered is not None:
                result = call(
                    cache.gathered.target, stored, *cache.gathered.args[1:], **cache.gathered.kwargs
                )
        parts.append(stored)
        if suffix:
            program.add_output(f"next_{name}{suffix}", result)
        else:
            outputs[f"next_{name}"] = result
            program.edit.set_outputs(list(outputs.values()))
    with program.edit.before(store):
        loaded = call(composites.cache_load.default, *parts)
    gathered = cache.gathered
    program.edit.replace(store, loaded, record=False)
    if gathered is not None and not gathered._erased:
        program.edit.erase_dead([gathered])


def _retyped(program: Program, placeholder: fx.Node, codes: fx.Node) -> fx.Node:
    """Let a cache input hold codes."""
    before, value = placeholder.meta["val"], codes.meta["val"]
    placeholder.meta["val"] = program.fake([*before.shape[:3], value.shape[-1]], value.dtype)
    name = str(placeholder.meta["input"])
    spec = program.signature.inputs[name]
    changed = replace(spec, dtype=value.dtype, shape=(*spec.shape[:3], int(value.shape[-1])))
    program.signature = replace(program.signature, inputs={**program.signature.inputs, name: changed})
    program.changed()
    return placeholder
