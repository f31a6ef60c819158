"""The configuration of a model without some layers: per-layer settings are written out and checked by loading."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.errors import LoweringError
from ...ir.facts import RemovedLayers

Skeleton = Callable[[dict[str, Any]], Iterable[str]]
"""Returns the tensor names of the model that a configuration describes."""

_DEPTH = re.compile(r"(layers?|blocks?|depth)$")

# What the keys of the library's configurations mean for layers. By name, because nothing else distinguishes a list
# for two layers from a list of two tokens.
ENTRIES = (
    "layer_types", "mlp_layer_types", "attention_layers", "attn_layers", "layers_block_type", "block_types",
    "no_rope_layers", "layer_rope_theta", "num_attention_heads_per_layer", "num_key_value_heads_per_layer",
    "intermediate_size", "activation_sparsity_pattern", "indexer_types", "sliding_windows", "swiglu_limits",
    "swiglu_limits_shared", "attention_window", "moe_topk", "num_experts", "num_shared_expert",
    "moe_intermediate_size", "gnn_layers_types",
)  # fmt: skip
"""One entry per layer, if the list has as many entries as there are layers."""
SOURCES = ("kv_source_layers",)
"""One entry per layer: the number of the layer whose keys and values it shares."""
NUMBERS = (
    "mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "global_attn_idx", "attn_layer_indices",
    "moe_layers", "rope_scaling_layers", "window_block_indexes", "window_block_indices", "residual_block_indices",
    "global_attn_indexes", "fullatt_block_indexes", "hybrid_layer_ids", "ple_layer_ids", "kda_layers",
    "global_attention_blocks",
)  # fmt: skip
"""Lists of layer numbers."""
LEADING = (
    "first_k_dense_replace", "max_window_layers", "num_dense_layers", "num_first_full_attention_layers",
)  # fmt: skip
"""How many layers precede the first of another kind."""
TRAILING = ("num_kv_shared_layers", "num_last_full_attention_layers")
"""How many layers at the end are of another kind."""
RANGE = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
"""The first and the last number of a kind of layers, and the distance between them."""
PERIODS: dict[tuple[str, ...], Callable[..., bool]] = {
    ("attn_layer_period", "attn_layer_offset"): lambda i, period, offset: i % period == offset,
    ("expert_layer_period", "expert_layer_offset"): lambda i, period, offset: i % period == offset,
    ("encoder_sparse_step",): lambda i, period: (i + 1) % period == 0,
    ("decoder_sparse_step",): lambda i, period: (i + 1) % period == 0,
    ("cross_attention_frequency",): lambda i, period: i % period == 0,
}
"""Rules that decide which layers are of a kind; a new rule must give the same answer for the remaining layers."""


@dataclass(frozen=True)
class _Place:
    """A configuration nested in the loaded one, and its entry that counts layers."""

    path: tuple[str, ...]
    key: str


def without_layers(
    raw: dict[str, Any], removed: Sequence[RemovedLayers], skeleton: Skeleton | None = None
) -> dict[str, Any]:
    """Return the configuration for a model without some layers.

    What a configuration class derives from a layer's number (window patterns, which layers are MoE layers) is written
    out from the loaded configuration, so that each layer keeps it at its new position.

    Args:
        raw: plain data, as in config.json.
        removed: for each stack of layers: the prefix of its names, the count before, the numbers gone.
        skeleton: names the tensors of a configuration's model; tells which of several equal counts is meant.

    Raises:
        LoweringError: no entry counts these layers, or the configuration cannot describe the remaining ones.
    """
    edited = raw
    for stack in removed:
        edited = _without(edited, stack.prefix, stack.count, set(stack.removed), skeleton)
    return edited


def load(raw: dict[str, Any]) -> Any:
    """Return the library's configuration object for plain data.

    Raises:
        LoweringError: the library does not accept it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return CONFIG_MAPPING[raw.get("model_type")].from_dict(copy.deepcopy(raw))
    except Exception as error:
        raise LoweringError(
            f"transformers does not accept the configuration of the remaining layers: {error}",
            hint="this architecture cannot describe them; use program.save or program.lower",
        ) from error
    finally:
        logging.set_verbosity(before)


def _without(
    raw: dict[str, Any], prefix: str, count: int, gone: set[int], skeleton: Skeleton | None
) -> dict[str, Any]:
    loaded = load(raw)
    kept = [i for i in range(count) if i not in gone]
    counters = list(_counts(loaded, count))
    if not counters:
        raise LoweringError(f"the configuration has no entry that counts the {count} layers named {prefix}N")
    edits: list[tuple[_Place, dict[str, Any]]] = []
    refused: LoweringError | None = None
    for counter in counters:
        try:
            edits.append((counter, _edited(raw, loaded, counter, count, kept)))
        except LoweringError as error:
            refused = error
    if len(counters) > 1:
        edits = list(_matching_edits(raw, prefix, len(kept), edits, skeleton))
    if not edits and refused is not None:
        raise refused
    if len(edits) != 1:
        listing = ", ".join(".".join((*p.path, p.key)) for p in counters)
        raise LoweringError(
            f"the configuration counts {count} layers in {listing}; none of them is known to count {prefix}N"
        )
    return edits[0][1]


def configurations(loaded: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a configuration and those nested in it, each with its path."""
    yield path, loaded
    for key, value in vars(loaded).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configurations(value, (*path, key))


def _counts(loaded: Any, count: int) -> Iterator[_Place]:
    for path, config in configurations(loaded):
        keys = [
            key for key, value in vars(config).items()
            if type(value) is int and value == count and _DEPTH.search(key) and key not in (*LEADING, *TRAILING)
        ]  # fmt: skip
        if not keys:
            # only the list of layers itself counts them
            keys = [k for k in ENTRIES if _stored(config, k) and _is_list(config, k, count)][:1]
        yield from (_Place(path, key) for key in keys)


def _matching_edits(
    raw: dict[str, Any],
    prefix: str,
    after: int,
    edits: list[tuple[_Place, dict[str, Any]]],
    skeleton: Skeleton | None,
) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """Yield, of several equal counts, the edits that change the stack with this name, by trying each."""
    if skeleton is None:
        return
    before = _stacks(skeleton(raw))
    candidates: list[tuple[int, _Place, dict[str, Any]]] = []
    for counter, edited in edits:
        now = _stacks(skeleton(edited))
        changed = [name for name in before if now.get(name, 0) != before[name] and now.get(name, 0) == after]
        candidates.extend((_alike(prefix, name), counter, edited) for name in changed)
    best = max((likeness for likeness, _, _ in candidates), default=0)
    best_edits: dict[_Place, dict[str, Any]] = {
        p: e for likeness, p, e in candidates if likeness == best and best
    }
    yield from best_edits.items()


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """Return how many different numbers follow each numbered prefix."""
    numbers_after: dict[str, set[str]] = {}
    for name in names:
        words = name.split(".")
        for i, word in enumerate(words):
            if word.isdigit():
                numbers_after.setdefault(".".join(words[:i]) + ".", set()).add(word)
    return {name: len(numbers) for name, numbers in numbers_after.items()}


def _alike(first: str, second: str) -> int:
    """Return how many trailing words two prefixes share: a checkpoint may leave out leading ones."""
    pairs = zip(reversed(first.split(".")[:-1]), reversed(second.split(".")[:-1]), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _edited(raw: dict[str, Any], loaded: Any, counter: _Place, count: int, kept: list[int]) -> dict[str, Any]:
    edited = copy.deepcopy(raw)
    table, config = edited, loaded
    for name in counter.path:
        config = getattr(config, name)
        if not isinstance(table.get(name), dict):
            table[name] = config.to_dict()
        table = table[name]
    stack = next((s for s in ("encoder", "decoder") if s in counter.key), "")
    entries = settings(config, count, kept, stack)
    if counter.key not in entries:
        entries[counter.key] = len(kept)
    for key, value in entries.items():
        _write(table, config, key, value)
    again = load(edited)
    for name in counter.path:
        again = getattr(again, name)
    for key, value in {**entries, **_derived(config, count, kept)}.items():
        actual = _setting(again, key)
        if actual != value:
            raise LoweringError(
                f"the configuration cannot hold {key} for the remaining layers: it should be {value} and is {actual}",
                hint="remove layers so that its rule still holds, or use program.save or program.lower",
            )
    return edited


def settings(part: Any, count: int, kept: list[int], side: str = "") -> dict[str, Any]:
    """Return the configuration's per-layer entries for the layers that remain.

    Args:
        part: the loaded configuration that counts the layers.
        count: how many there were.
        kept: the old numbers of the remaining ones.
        side: "encoder" or "decoder" if one configuration describes both.
    """
    entries: dict[str, Any] = {}
    for key in ENTRIES:
        if _stored(part, key) and _is_list(part, key, count):
            values = _setting(part, key)
            entries[key] = [values[i] for i in kept]
    for key in SOURCES:
        if _stored(part, key) and _is_list(part, key, count):
            values = _setting(part, key)
            if any(values[i] not in kept for i in kept):
                raise LoweringError(
                    f"a remaining layer takes keys and values from one that was removed ({key})",
                    hint="remove the layers that share them too",
                )
            entries[key] = [kept.index(values[i]) for i in kept]
    for key in NUMBERS:
        values = _setting(part, key)
        if isinstance(values, list) and all(type(v) is int for v in values):
            entries[key] = [kept.index(i) for i in values if i in kept]
    if table := _setting(part, "per_layer_config"):
        # an empty table counts as none
        entries["per_layer_config"] = {
            str(kept.index(int(i))): v for i, v in table.items() if int(i) in kept
        } or None
    for key in (*LEADING, *TRAILING):
        number = _setting(part, key)
        if type(number) is int:
            first, last = (0, number) if key in LEADING else (count - number, count)
            entries[key] = sum(1 for i in kept if first <= i < last)
    entries.update(_periods(part, count, kept, side))
    entries.update(_stages(part, count, kept))
    return entries


def _stages(config: Any, count: int, kept: list[int]) -> dict[str, Any]:
    """Return the output stages of a backbone whose layers are stages: the same ones, renumbered."""
    names, out_indices = _setting(config, "stage_names"), _setting(config, "out_indices")
    if names != ["stem", *(f"stage{i}" for i in range(1, count + 1))] or not isinstance(out_indices, list):
        return {}
    remaining = names[: len(kept) + 1]
    # counted from the front: how many layers precede the output
    numbers = [sum(i < (k if k >= 0 else k + count + 1) for i in kept) for k in out_indices]
    return {"stage_names": remaining, "out_indices": numbers, "out_features": [remaining[k] for k in numbers]}


def _periods(config: Any, count: int, kept: list[int], stack: str) -> dict[str, Any]:
    """Return periodic rules that describe the remaining layers as the old rules did."""
    entries: dict[str, Any] = {}
    first, last, distance = (_setting(config, key) for key in RANGE)
    if type(first) is int and type(last) is int and type(distance) is int and distance > 0:
        final = count if last < 0 else last
        kind = [n for n, i in enumerate(kept) if (i + 1) % distance == 0 and first <= i <= final]
        start, end = (kind[0], kind[-1]) if kind else (len(kept), 0)
        steps = (d for d in (distance, *range(1, count + 1)) if _every(d, start, end) == kind)
        step = next(steps, None)
        if step is None:
            raise _inexpressible(RANGE)
        entries.update(zip(RANGE, (start, end, step), strict=True))
    for keys, rule in PERIODS.items():
        values = [_setting(config, key) for key in keys]
        if not all(type(v) is int for v in values) or values[0] < 1:
            continue
        if (stack and keys[0].startswith(("encoder", "decoder")) and not keys[0].startswith(stack)) or any(
            key.startswith("num_sparse_") for key in vars(config)
        ):
            continue  # belongs to another stack, or is a number that the library divides itself
        kinds = [rule(i, *values) for i in kept]
        if keys == ("decoder_sparse_step",) and _stored(config, "mlp_only_layers"):
            # the list of exceptions can describe every layer
            dense = {i for i in range(count) if not rule(i, *values)} | set(
                _setting(config, "mlp_only_layers") or ()
            )
            entries |= {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [n for n, i in enumerate(kept) if i in dense],
            }
            continue
        others = [range(count + 1)] * (len(keys) - 1)
        candidates = ((p, *offsets) for p in range(1, count + 2) for offsets in itertools.product(*others))
        able = (
            v for v in itertools.chain([values], candidates)
            if all(offset < v[0] for offset in v[1:]) and [rule(i, *v) for i in range(len(kept))] == kinds
        )  # fmt: skip
        parameters = next(able, None)
        if parameters is None:
            raise _inexpressible(keys)
        entries.update(zip(keys, parameters, strict=True))
    return entries


def _every(distance: int, start: int, end: int) -> list[int]:
    return [i for i in range(start, end + 1) if (i + 1) % distance == 0]


def _inexpressible(keys: tuple[str, ...]) -> LoweringError:
    return LoweringError(
        f"no value of {' and '.join(keys)} describes which of the remaining layers are of another kind",
        hint="remove layers so that those of that kind stay evenly spaced, or use program.save or program.lower",
    )


def _derived(config: Any, count: int, kept: list[int]) -> dict[str, Any]:
    """Return the values that lists which a configuration computes rather than stores must now have."""
    entries = {}
    for key in (*ENTRIES, "layers_num_experts", "kv_sharing_modes"):
        if not _stored(config, key) and _is_list(config, key, count):
            values = _setting(config, key)
            entries[key] = [values[i] for i in kept]
    return entries


def _write(table: dict[str, Any], config: Any, key: str, value: Any) -> None:
    if key == "attention_layers" and "attention_types" in vars(config):
        # GPT-Neo stores a pattern and its repetitions; the whole list is a pattern repeated once
        table["attention_types"] = [[value, 1]]
    table[key] = value
    for other, stands_for in (getattr(config, "attribute_map", None) or {}).items():
        if stands_for == key and other in table:
            table[other] = value


def _stored(config: Any, key: str) -> bool:
    return key in vars(config)


def _setting(config: Any, key: str) -> Any:
    """Return an entry of a configuration as plain data; None if it has none."""
    if key == "per_layer_config":
        spec = getattr(config, "_heterogeneity_spec", None)
        table = spec.per_layer_overrides if spec is not None else {}
        return {str(k): _plain(v) for k, v in sorted(table.items())} or None
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    try:
        return _plain(reader(key, None) if reader is not None else getattr(config, key, None))
    except Exception:
        # a property that depends on an entry that this configuration lacks
        return None


def _is_list(config: Any, key: str, count: int) -> bool:
    value = _setting(config, key)
    return isinstance(value, list) and len(value) == count


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


__all__ = ["configurations", "load", "settings", "without_layers"]
