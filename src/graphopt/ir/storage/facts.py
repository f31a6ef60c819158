"""Facts of a saved program as plain data, and back; also those of programs saved before facts had types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import CheckpointError
from ..facts import KINDS, Fact, Facts, OwnRank

# facts of earlier releases that repeat one with fields, or that nothing reads
_REDUNDANT = (
    "cached", "quantized_values", "multi_token", "masked", "early_exit", "drafting", "trimmed_vocabulary", "streaming",
    "tensor_parallel", "eval", "calibrated", "calibrated_communication",
)  # fmt: skip
_CAPTURED = {
    "unraised_attention": "plain_attention", "unraised_experts": "plain_experts", "fixed_sizes": "fixed_sizes",
    "packed_positions": "packed_positions", "compared": "compared", "attention_implementation": "attention_implementation",
}  # fmt: skip
_CHANGED = {
    "renumbered": "removed_layers", "ffn_widths": "ffn_widths", "expert_counts": "expert_counts",
    "fixed_experts": "active_experts",
}  # fmt: skip
# facts that earlier releases stored as a bare value, and the field that now holds it
_BARE = {"early_exits": "layers", "decode_layers": "names", "export_blockers": "reasons"}


def plain_facts(facts: Facts) -> dict[str, Any]:
    """Return facts in their JSON form: by name, ``true`` or the fields."""
    return {
        fact.name: TypeAdapter(type(fact)).dump_python(fact, mode="json") if fields(fact) else True
        for fact in facts
        if not isinstance(fact, OwnRank)
    }


def typed_facts(plain: Mapping[str, Any]) -> Facts:
    """Return the facts that a saved program holds.

    Raises:
        CheckpointError: one is of no known type, or has fields of other types.
    """
    return Facts(_typed(name, value) for name, value in _current_form(plain).items())


def _typed(name: str, value: Any) -> Fact:
    kind = KINDS.get(name)
    if kind is None or kind is OwnRank:
        raise CheckpointError(
            f"the program has the fact {name!r}, which this version of graphopt does not know",
            hint="install the package whose pass made it, or a newer graphopt",
        )
    field_names = {field.name for field in fields(kind)}
    if not field_names:
        if value is not True:
            raise CheckpointError(f"the fact {name!r} is damaged: {str(value)[:80]}")
        return kind()
    if not isinstance(value, Mapping) or not field_names >= value.keys():
        raise CheckpointError(f"the fact {name!r} is damaged: {str(value)[:80]}")
    try:
        # strict JSON mode: text is not converted to numbers, and arrays become tuples
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"the fact {name!r} is damaged: {first}") from error


def _current_form(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts converted to their current names and fields."""
    current: dict[str, Any] = {}
    capture: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for name, value in plain.items():
        if name in _REDUNDANT and value is True:
            continue
        if name in _CAPTURED:
            capture[_CAPTURED[name]] = value
        elif name in _CHANGED:
            changes[_CHANGED[name]] = value
        elif name == "ranks":
            current["tensor_parallel"] = {"ranks": value}
        elif name == "time":
            current["streaming"] = {"time": value}
        elif name == "unwritable":
            current.setdefault("export_blockers", {"reasons": {}})["reasons"]["an earlier pass"] = [value]
        elif name in _BARE and not _has_field(value, _BARE[name]):
            current[name] = {_BARE[name]: value}
        else:
            current[name] = value
    if capture:
        current["capture"] = capture
    if changes:
        current["checkpoint_changes"] = changes
    return current


def _has_field(value: Any, field: str) -> bool:
    """Tell whether a value holds a fact's fields, and is not a table with an entry of the field's name."""
    return (
        isinstance(value, Mapping)
        and value.keys() == {field}
        and isinstance(value[field], list if field == "names" else Mapping)
    )
