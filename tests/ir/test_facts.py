"""Facts of programs: one of each type, stored by name, read by the types of their fields."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from graphopt.ir.errors import CheckpointError, UsageError
from graphopt.ir.facts import (
    KINDS,
    Canonical,
    Capture,
    CheckpointChanges,
    EarlyExits,
    ExportBlockers,
    Fact,
    Facts,
    KVCache,
    OwnRank,
    Quantized,
    RemovedLayers,
    SkippedWhileDecoding,
    Streaming,
    TensorParallel,
    Vocabulary,
)
from graphopt.ir.storage.facts import plain_facts, typed_facts
from graphopt.passes import Pass

OWN = [kind for kind in KINDS.values() if kind.__module__.startswith("graphopt.") and kind is not OwnRank]
CACHE = {
    "capacity": "capacity", "layers": 2, "tree": False, "tokens": "input_ids", "positions": "positions", "limit": 2048,
    "logits": "logits",
}  # fmt: skip


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, as the fields of facts have them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(values(inner[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, inner))
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=5), values(inner[1]), max_size=3)
    if inner:
        return st.one_of(*map(values, inner))
    if hint is RemovedLayers:
        return st.builds(
            RemovedLayers, st.text(), st.integers(0, 99), st.lists(st.integers(0, 99)).map(tuple)
        )
    plain = {int: st.integers(-(2**40), 2**40), str: st.text(), bool: st.booleans(), type(None): st.none()}
    return st.floats(0, 1, width=32) if hint is float else plain[hint]


def facts_of(kind: type[Fact]) -> st.SearchStrategy[Fact]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})


@given(
    st.lists(st.sampled_from(OWN), unique=True, max_size=4).flatmap(lambda k: st.tuples(*map(facts_of, k)))
)
def test_facts_come_back_from_json(found: tuple[Fact, ...]) -> None:
    held = Facts(found)
    assert typed_facts(json.loads(json.dumps(plain_facts(held)))) == held


def test_one_of_each_type_and_copies_apart() -> None:
    held = Facts([Canonical(), TensorParallel(2)])
    other = held.copy()
    other.add(TensorParallel(4))
    assert held[TensorParallel].ranks == 2 and other[TensorParallel].ranks == 4
    other.discard(TensorParallel)
    assert other.get(TensorParallel) is None and TensorParallel in held
    with pytest.raises(UsageError, match="the program is not sharded"):
        other[TensorParallel]


def test_only_facts_that_need_nothing_known_are_provided() -> None:
    held = Facts()
    held.provide((Canonical, KVCache, Streaming))
    assert held == Facts([Canonical(), Streaming("")])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"canonical": True, "eval": True, "cached": True, "kv_cache": CACHE}, [Canonical(), KVCache(**CACHE)]),
        ({"tensor_parallel": True, "ranks": 4}, [TensorParallel(4)]),
        ({"streaming": True, "time": "frames"}, [Streaming("frames")]),
        ({"early_exit": True, "early_exits": {"exit_logits": 3}}, [EarlyExits({"exit_logits": 3})]),
        ({"early_exits": {"layers": 3}}, [EarlyExits({"layers": 3})]),
        ({"decode_layers": ["layer.1", "layer.2"]}, [SkippedWhileDecoding(("layer.1", "layer.2"))]),
        ({"export_blockers": {"quantize": ["no place"]}}, [ExportBlockers({"quantize": ("no place",)})]),
        ({"unwritable": "no place"}, [ExportBlockers({"an earlier pass": ("no place",)})]),
        ({"trimmed_vocabulary": True, "vocabulary": {"size": 9, "ids": [1, 2]}}, [Vocabulary(9, (1, 2))]),
        (
            {"renumbered": [{"prefix": "h.", "count": 3, "removed": [1]}], "fixed_experts": [8, 2], "ffn_widths": [[8, 4]]},
            [CheckpointChanges((RemovedLayers("h.", 3, (1,)),), ((8, 4),), (), (8, 2))],
        ),
        (
            {"unraised_attention": ["a: no"], "fixed_sizes": ["batch"], "compared": "2 kinds"},
            [Capture(plain_attention=("a: no",), fixed_sizes=("batch",), compared="2 kinds")],
        ),
        (
            {"quantized_values": True, "quantized": {
                "weights": 8, "activations": 16, "kind": "w8a16", "value": 3, "matrix": 2, "constant": 0, "four_bits": 0}},
            [Quantized(8, 16, "w8a16", 3, 2, 0, 0)],
        ),
    ],
)  # fmt: skip
def test_facts_of_programs_saved_before_they_had_types(old: dict[str, Any], new: list[Fact]) -> None:
    assert typed_facts(old) == Facts(new)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"moon_phase": True}, "moon_phase.*does not know"),
        ({"rank": {"number": 1}}, "rank.*does not know"),
        ({"canonical": 1}, "canonical.*damaged"),
        ({"kv_cache": True}, "kv_cache.*damaged"),
        ({"kv_cache": CACHE | {"layers": "2"}}, "kv_cache.*damaged"),
        ({"kv_cache": CACHE | {"more": 2}}, "kv_cache.*damaged"),
        ({"kv_cache": {"capacity": 3}}, "kv_cache.*damaged"),
        ({"vocabulary": {"size": 9, "ids": [1.5]}}, "vocabulary.*damaged"),
        ({"tensor_parallel": {"ranks": True}}, "tensor_parallel.*damaged"),
        ({"decode_layers": "layer"}, "decode_layers.*damaged"),
    ],
)
def test_damaged_facts_are_refused(stored: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        typed_facts(stored)


def test_two_types_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="kv_cache"):

        @dataclass(frozen=True)
        class Other(Fact, name="kv_cache"):
            pass


@pytest.mark.parametrize("where", ["requires", "provides", "invalidates", "excludes"])
def test_passes_name_types(where: str) -> None:
    with pytest.raises(TypeError, match="facts are types"):
        type("Old", (Pass,), {where: ("canonical",)})
