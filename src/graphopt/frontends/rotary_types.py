"""Detection of rotary embeddings whose frequencies depend on the length of the text, which a graph cannot represent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..ir.errors import CaptureError


def refuse_varying_frequencies(config: Any) -> None:
    """Raise an error for such rotary embeddings before anything is traced.

    Raises:
        CaptureError: the model would replace the frequencies in its buffers for a longer text.
    """
    for table, owner in _tables(config):
        kind = table.get("rope_type") or table.get("type")
        made_for = table.get("original_max_position_embeddings") or getattr(
            owner, "original_max_position_embeddings", None
        )
        if kind == "dynamic":
            limit = made_for or getattr(owner, "max_position_embeddings", None)
            raise CaptureError(
                f"the rotary type 'dynamic' computes its frequencies anew for every text longer than {limit} tokens, "
                "so one graph cannot hold them",
                hint="with rope_type 'default' in config.json (rope_parameters or rope_scaling) the model is the same "
                f"up to {limit} tokens",
            )
        if kind == "longrope":
            raise CaptureError(
                f"the rotary type 'longrope' takes short_factor for texts of up to {made_for} tokens and long_factor for "
                "longer ones, and writes the frequencies that count into the model, so one graph cannot hold them",
                hint="there is no plain setting of config.json that means either half; a checkpoint of another rotary "
                "type (default, linear, yarn, llama3) can be captured",
            )


def _tables(config: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the settings of rotary embeddings with their owner; one per kind of layer if there are several kinds."""
    owners = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for owner in owners:
        for name in ("rope_parameters", "rope_scaling"):
            table = getattr(owner, name, None)
            if not isinstance(table, dict):
                continue
            yield table, owner
            for inner in table.values():
                if isinstance(inner, dict):
                    yield inner, owner
