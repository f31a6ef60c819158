"""The configuration of a model that lost layers: counts, per-layer lists, lists of layer numbers."""

from __future__ import annotations

import copy
import re
from typing import Any

from ..ir.errors import LoweringError

_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
_NUMBERS = (
    "mlp_only_layers",
    "cross_attention_layers",
    "full_attn_idxs",
    "global_attn_idx",
    "attn_layer_indices",
)
_LEADING = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
_NEVER = ("architectures", "eos_token_id", "pruned_heads", "id2label", "label2id")


def without_layers(config: dict[str, Any], removed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a configuration for a model without some layers.

    Args:
        config: plain data, as in config.json.
        removed: for each stack of layers: the prefix of its names, the count before, the numbers gone.

    Raises:
        LoweringError: nothing in the configuration counts these layers.
    """
    edited = copy.deepcopy(config)
    for stack in removed:
        gone = set(stack["removed"])
        kept = [i for i in range(stack["count"]) if i not in gone]
        if not _recount(edited, stack["prefix"], stack["count"], len(kept)):
            raise LoweringError(
                f"the configuration has no entry that counts the {stack['count']} layers "
                f"named {stack['prefix']}N"
            )
        _reindex(edited, stack["count"], kept)
    return edited


def _recount(config: dict[str, Any], prefix: str, before: int, after: int) -> bool:
    tables = [config, *(v for v in config.values() if isinstance(v, dict))]
    side = "decoder" if "decoder" in prefix else "encoder" if "encoder" in prefix else ""
    names = sorted(_COUNTS, key=lambda name: bool(side) and side not in name)
    if side == "encoder":
        names = [n for n in names if "decoder" not in n]
    for table in tables:
        for name in names:
            if table.get(name) == before and not isinstance(table[name], bool):
                table[name] = after
                return True
    return False


def _reindex(config: dict[str, Any], count: int, kept: list[int]) -> None:
    for name, value in list(config.items()):
        if isinstance(value, dict) and name not in _NEVER:
            _reindex(value, count, kept)
        elif name in _NUMBERS and isinstance(value, list):
            config[name] = [kept.index(i) for i in value if i in kept]
        elif name in _LEADING and isinstance(value, int):
            config[name] = sum(1 for i in kept if i < value)
        elif isinstance(value, list) and len(value) == count and count > 1 and name not in _NEVER:
            config[name] = [value[i] for i in kept]


_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim",
           "ffn_hidden_size", "hidden_dim", "inner_dim")  # fmt: skip


def with_widths(config: dict[str, Any], widths: list[tuple[int, int]]) -> dict[str, Any]:
    """Return a configuration for a model whose feed-forwards have other widths.

    Args:
        config: plain data, as in config.json.
        widths: pairs of a width before and after, in the order of the changes.

    Raises:
        LoweringError: nothing in the configuration holds the width.
    """
    edited = copy.deepcopy(config)
    for before, after in widths:
        tables = [edited, *(v for v in edited.values() if isinstance(v, dict))]
        places = [(t, n) for t in tables for n in _WIDTHS if t.get(n) == before]
        hidden = next((t for t in tables if "n_inner" in t and t["n_inner"] is None), None)
        if not places and hidden is not None and hidden.get("n_embd") and before == 4 * hidden["n_embd"]:
            places = [(hidden, "n_inner")]  # left out, it is four times the model's width
        if not places:
            raise LoweringError(
                f"the configuration has no entry that holds the feed-forwards' width of {before}"
            )
        for table, name in places:
            table[name] = after
    return edited


_ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "top_k",
    "num_selected_experts",
    "moe_topk",
)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def with_experts(config: dict[str, Any], before: int, after: int, *, active: bool) -> dict[str, Any]:
    """Return a configuration for a model with another number of experts, or of those that a token goes to.

    Raises:
        LoweringError: nothing in the configuration holds the number.
    """
    edited = copy.deepcopy(config)
    for table in (edited, *(v for v in edited.values() if isinstance(v, dict))):
        for name in _ACTIVE if active else _EXPERTS:
            if table.get(name) == before:
                table[name] = after
                return edited
    raise LoweringError(
        f"the configuration has no entry that holds the {before} {'active ' if active else ''}experts"
    )


def renumbered(name: str, removed: list[dict[str, Any]]) -> str:
    """Return the name of a tensor after the layers before its own have left."""
    for stack in removed:
        prefix = stack["prefix"]
        match = re.match(r"\d+", name[len(prefix) :]) if name.startswith(prefix) else None
        if match:
            number = int(match.group())
            after = number - sum(1 for gone in stack["removed"] if gone < number)
            name = f"{prefix}{after}{name[len(prefix) + match.end() :]}"
    return name
