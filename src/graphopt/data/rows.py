"""Reading rows unchanged, in the order of their file: none is joined, split or left out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..ir.errors import UsageError
from ..ir.program import Program
from .reading import Batch, encoded, longest, padding_id, read_arrays
from .token_ids import require_ids
from .tokenizer import Tokenizer

AT_ONCE = 8
"""Rows per batch if a program takes any number."""


@dataclass
class Rows:
    """What a file holds.

    Attributes:
        inputs: by name, all rows.
        count: rows.
        lengths: of texts in tokens; empty for arrays.
        sample: the first text.
    """

    inputs: Batch
    count: int
    lengths: list[int] = field(default_factory=list)
    sample: str = ""

    def pieces(self, program: Program) -> list[Batch]:
        """Return inputs for one forward each.

        Raises:
            UsageError: the program takes a fixed number of rows, which does not divide their number.
        """
        firsts = {
            spec.shape[0] if spec.shape else None
            for name, spec in program.signature.inputs.items()
            if name in self.inputs
        }
        if len(firsts) != 1 or None in firsts:
            return [self.inputs]
        (first,) = firsts
        step = first if isinstance(first, int) else AT_ONCE
        if self.count <= step or not _by_row(program, next(iter(self.inputs))):
            return [self.inputs]
        if isinstance(first, int) and self.count % first:
            raise UsageError(
                f"there are {self.count} rows, and the program takes {first} at a time",
                hint=f"fill up to {-(-self.count // first) * first} rows, or capture with a size that varies",
            )
        return [
            {name: value[start : start + step] for name, value in self.inputs.items()}
            for start in range(0, self.count, step)
        ]


def _by_row(program: Program, name: str) -> bool:
    """Return whether the first dimension of every output is the batch."""
    rows = str(program.input_nodes[name].meta["val"].shape[0])
    shapes = [node.meta["val"].shape for node in program.outputs.values() if "val" in node.meta]
    return bool(shapes) and all(len(shape) and str(shape[0]) == rows for shape in shapes)


def read_rows(program: Program, source: str | os.PathLike[str]) -> Rows:
    """Return the rows of a .npz, .txt or .jsonl file.

    Raises:
        UsageError: the file is missing or of another kind, a row is longer than the program takes or has an unknown
            token, or rows differ in length and the program takes no mask.
    """
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"the data file {path} does not exist")
    if path.suffix == ".npz":
        inputs = read_arrays(program, path)
        return Rows(inputs, next(iter(inputs.values())).shape[0] if inputs else 0)
    if path.suffix not in (".jsonl", ".txt", ".json"):
        raise UsageError(f"{path}: rows are read from .jsonl, .txt and .npz files")
    tokenizer = Tokenizer(program)
    if "input_ids" not in program.signature.inputs:
        raise UsageError("the program takes no input_ids, so text cannot be its data")
    rows = [row.ids for row in encoded(path, tokenizer)]
    if not rows or not all(rows):
        raise UsageError(f"{path} holds no text" if not rows else f"{path}: a line has no tokens")
    lengths = [len(row) for row in rows]
    limit = longest(program)
    for number, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise UsageError(f"{path}: text {number + 1} has {length} tokens, the program takes {limit}")
    width = max(lengths)
    masked = "attention_mask" in program.signature.inputs
    if len(set(lengths)) > 1 and not masked and program.origin.padding != "causal":
        raise UsageError(
            f"{path}: texts of {min(lengths)} to {width} tokens, and the program takes no attention_mask",
            hint="give texts of one length, each in a file of its own",
        )
    ids = torch.full((len(rows), width), padding_id(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    require_ids(program, {"input_ids": ids}, str(path))
    batch = {"input_ids": ids, "attention_mask": mask}
    accepted = {k: v for k, v in batch.items() if k in program.signature.inputs}
    return Rows(accepted, len(rows), lengths, tokenizer.decode(rows[0])[:300])
