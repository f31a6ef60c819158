"""The configuration of a model that became narrower, and tensor names after layers were removed."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from ...ir.errors import LoweringError
from ...ir.facts import RemovedLayers

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim",
           "ffn_hidden_size", "hidden_dim", "inner_dim")  # fmt: skip


def with_widths(config: dict[str, Any], widths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the configuration for a model with other feed-forward widths.

    Args:
        config: plain data, as in config.json.
        widths: pairs of a width before and after, in the order of the changes.

    Raises:
        LoweringError: no entry of the configuration holds the width.
    """
    edited = copy.deepcopy(config)
    for before, after in widths:
        tables = [edited, *(v for v in edited.values() if isinstance(v, dict))]
        entries = [(t, n) for t in tables for n in _WIDTHS if t.get(n) == before]
        hidden = next((t for t in tables if "n_inner" in t and t["n_inner"] is None), None)
        if not entries and hidden is not None and hidden.get("n_embd") and before == 4 * hidden["n_embd"]:
            entries = [(hidden, "n_inner")]  # if absent, it is four times the model's width
        if not entries:
            raise LoweringError(
                f"the configuration has no entry that holds the feed-forwards' width of {before}"
            )
        for table, name in entries:
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
    """Return the configuration for a model with another number of experts, or of active experts per token.

    Raises:
        LoweringError: no entry of the configuration holds the number.
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


def renumbered(name: str, removed: Sequence[RemovedLayers]) -> str:
    """Return the name of a tensor after layers before its own were removed."""
    for stack in removed:
        prefix = stack.prefix
        match = re.match(r"\d+", name[len(prefix) :]) if name.startswith(prefix) else None
        if match:
            number = int(match.group())
            after = number - sum(1 for gone in stack.removed if gone < number)
            name = f"{prefix}{after}{name[len(prefix) + match.end() :]}"
    return name
