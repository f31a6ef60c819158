"""Checks that token ids are integers within the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.schema import is_operator


def known_ids(program: Program, name: str) -> int | None:
    """Return how many ids an input may have, by the rows of the tables that it indexes; None if it indexes none."""
    rows = [
        int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        for user in program.input_nodes[name].users
        if is_operator(user, "aten.embedding")
    ]
    return min(rows, default=None)


def require_ids(program: Program, batch: Mapping[str, torch.Tensor], where: str) -> None:
    """Check that indices into tables are within them.

    Args:
        program: that reads them.
        batch: tensors by input; rows along the first dimension.
        where: the file, for the message.

    Raises:
        UsageError: an index is out of range; the message names its row and value.
    """
    for name, value in batch.items():
        if name not in program.input_nodes or value.is_floating_point() or not value.numel():
            continue
        count = known_ids(program, name)
        if count is None:
            continue
        wrong = (value < 0) | (value >= count)
        if bool(wrong.any()):
            index = wrong.nonzero()[0].tolist()
            token = int(value[tuple(index)])
            row = f", row {index[0]}" if index else ""
            raise UsageError(
                f"{where}{row}: {name} is {token}, the program knows 0 to {count - 1}",
                hint="encode text with the checkpoint's own tokenizer",
            )


def as_input_type(value: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
    """Return an array in the type that an input takes.

    Raises:
        UsageError: the input takes integers, and a value is not one.
    """
    if value.is_complex() and not dtype.is_complex:
        raise UsageError(f"{where}: {name} is complex, the program takes {dtype}")
    if value.dtype is torch.uint64 and bool((value.view(torch.int64) < 0).any()):
        raise UsageError(f"{where}: {name} has numbers of 2^63 and more, which no input takes")
    if dtype.is_floating_point or dtype.is_complex or not value.is_floating_point():
        return value.to(dtype)
    wrong = value != value.round()
    wrong |= ~value.isfinite()
    if bool(wrong.any()):
        index = wrong.nonzero()[0].tolist()
        row = f", row {index[0]}" if index else ""
        raise UsageError(
            f"{where}{row}: {name} is {float(value[tuple(index)]):g}, the program takes whole numbers"
        )
    return value.to(dtype)
