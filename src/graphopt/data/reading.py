"""Reading data for calibration and evaluation: text, encoded with the checkpoint's own tokenizer, or arrays."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.structure import flatten, leaf_names
from .token_ids import as_whole, require_ids
from .tokenizer import Tokenizer

Batch = dict[str, torch.Tensor]


def read_data(
    program: Program,
    source: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    *,
    sequences: int | None = 128,
    length: int = 2048,
    batch: int = 8,
    seed: int = 0,
    shuffle: bool = True,
    loss_on: str = "all",
) -> tuple[list[Batch], str]:
    """Return batches by input name, and one sample as text to show to the user.

    Args:
        program: to make inputs for.
        source: a .jsonl (``text`` or ``messages`` per line), .txt or .npz file, or batches themselves.
        sequences: largest number of rows; None for all.
        length: most tokens per row; no more than the program takes.
        batch: rows per batch.
        seed: of the random choice if there are more rows.
        shuffle: take texts in random order, otherwise in the order of the file.
        loss_on: "assistant" adds ``loss_mask`` (batch, sequence), 1 at tokens that the assistant says in conversations.

    Raises:
        UsageError: the file is of an unknown kind, or holds nothing usable, or has no conversations although they are
            needed.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [dict(b) for b in source], ""
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"the data file {path} does not exist")
    if loss_on not in ("all", "assistant"):
        raise UsageError(f"the loss is on all tokens or those of the assistant, not {loss_on!r}")
    if path.suffix == ".npz":
        if loss_on != "all":
            raise UsageError(f"{path} holds no conversations, so the assistant says nothing in it")
        return _arrays(program, path, batch), ""
    if path.suffix not in (".jsonl", ".txt", ".json"):
        raise UsageError(f"{path}: data is read from .jsonl, .txt and .npz files")
    tokenizer = Tokenizer(program)
    length = min(length, longest(program) or length)
    texts = list(encoded(path, tokenizer, assistant=loss_on == "assistant"))
    if not texts:
        raise UsageError(f"{path} holds no text")
    if shuffle:
        random.Random(seed).shuffle(texts)
    rows = _rows(program, texts, sequences, length)
    if loss_on == "assistant":
        rows = [row for row in rows if any(row.counted[1:])]
        if not rows:
            raise UsageError(f"{path}: within {length} tokens the assistant says nothing", hint="longer rows")
    pad = padding_id(tokenizer)
    marked = loss_on == "assistant"
    batches = [_padded(program, rows[i : i + batch], pad, marked) for i in range(0, len(rows), batch)]
    # evaluation needs data of its own
    if len(batches) == 1 and len(rows) > 1:
        half = len(rows) // 2
        batches = [_padded(program, half_of_rows, pad, marked) for half_of_rows in (rows[:half], rows[half:])]
    return batches, tokenizer.decode(rows[0].ids)[:300]


# names of the number of positions in configurations
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def longest(program: Program) -> int | None:
    """Return how many tokens a row may have, by the graph's limits and the checkpoint's number of positions."""
    size = program.signature.sizes.get("sequence")
    limits = [size.high] if size is not None and size.high is not None else []
    config = program.origin.config
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        limits += [
            v for k in _CONTEXT if isinstance(v := table.get(k), int) and not isinstance(v, bool) and v > 1
        ]
    return min(limits, default=None)


@dataclass
class Row:
    """Tokens, and for each whether the loss counts it (1) or not (0)."""

    ids: list[int]
    counted: list[int]


def entries(path: Path) -> Iterator[tuple[int, str | list[dict[str, Any]]]]:
    """Yield the texts and conversations of a file, with their line numbers.

    Raises:
        UsageError: a line is neither.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if path.suffix == ".txt":
                yield number, line.strip()
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from None
            if isinstance(entry, str):
                yield number, entry
            elif isinstance(entry, dict) and isinstance(entry.get("text"), str):
                yield number, entry["text"]
            elif (
                isinstance(entry, dict)
                and isinstance(entry.get("messages"), list)
                and all(isinstance(m, dict) for m in entry["messages"])
            ):
                yield number, entry["messages"]
            else:
                raise UsageError(f'{path}, line {number} has neither "text" nor "messages"')


def encoded(path: Path, tokenizer: Tokenizer, *, assistant: bool = False) -> Iterator[Row]:
    """Yield the tokens of a file's texts and conversations; with ``assistant``, the loss counts only the assistant's."""
    for number, entry in entries(path):
        if isinstance(entry, str):
            if assistant:
                raise UsageError(
                    f"{path}, line {number} is a text; it has no turns of an assistant",
                    hint='conversations are {"messages": [{"role": ..., "content": ...}]}',
                )
            ids = tokenizer.encode(entry)
            yield Row(ids, [1] * len(ids))
            continue
        try:
            text, spans = tokenizer.turns(entry) if assistant else (tokenizer.chat(entry), [])
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error.message}", hint=error.hint) from error
        ids, offsets = tokenizer.encode_chat(text)
        marked = [int(any(a < end and b > start and b > a for start, end in spans)) for a, b in offsets]
        yield Row(ids, marked if assistant else [1] * len(ids))


def _rows(program: Program, texts: list[Row], sequences: int | None, length: int) -> list[Row]:
    """Return rows of tokens: one text each for encoders; for models that predict tokens, texts joined and split."""
    rows: list[Row] = []
    if program.origin.padding != "causal":
        for text in texts[:sequences]:
            ids, counted = text.ids, text.counted
            if len(ids) > length:
                ids, counted = [*ids[: length - 1], ids[-1]], [*counted[: length - 1], counted[-1]]
            rows.append(Row(ids, counted))
        return [row for row in rows if row.ids]
    ids, counted = [], []
    for text in texts:
        ids.extend(text.ids)
        counted.extend(text.counted)
        while len(ids) >= length:
            rows.append(Row(ids[:length], counted[:length]))
            ids, counted = ids[length:], counted[length:]
        if sequences is not None and len(rows) >= sequences:
            return rows[:sequences]
    # if no input masks padding, all rows have one length
    if len(ids) > 1 and (not rows or "attention_mask" in program.signature.inputs):
        rows.append(Row(ids, counted))
    return rows


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the padding token: the tokenizer's own, or a special token, or 0."""
    for key in ("pad_token", "eos_token", "unk_token"):
        token = tokenizer.fast.token_to_id(tokenizer.special[key]) if key in tokenizer.special else None
        if token is not None:
            return int(token)
    return 0


def _padded(program: Program, rows: list[Row], pad: int, marked: bool) -> Batch:
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask, counted = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = torch.tensor(row.ids)
        counted[index, :size] = torch.tensor(row.counted)
        mask[index, :size] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    accepted = {k: v for k, v in inputs.items() if k in program.signature.inputs}
    if not accepted:
        raise UsageError("the program takes no input_ids, so text cannot be its data")
    return {**accepted, "loss_mask": counted} if marked else accepted


def arrays_of(path: Path) -> Batch:
    """Return the arrays of a .npz file as they are.

    Raises:
        UsageError: it cannot be read.
    """
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        EOFError,
        BadZipFile,
        zlib.error,
    ) as error:
        # a truncated file, one that is not an archive of arrays, or one with text or objects
        raise UsageError(f"{path} cannot be read as arrays: {error}") from None


def _without_fixed(program: Program, tensors: Batch) -> Batch:
    """Return arrays without those whose values a program was captured for, which must be these.

    Raises:
        UsageError: they are others.
    """
    signature = program.signature
    fixed = [
        name
        for name in tensors
        if name in signature.parameters and not any(leaf_names(signature.parameters[name]))
    ]
    for name in fixed:
        flatten(signature.parameters[name], tensors[name].tolist(), name)
    return {name: tensor for name, tensor in tensors.items() if name not in fixed}


def read_arrays(program: Program, path: Path) -> Batch:
    """Return the arrays of a .npz file in the types that the program takes.

    Raises:
        UsageError: it cannot be read, holds other inputs, arrays with different numbers of rows, rows longer than the
            model's positions, or numbers that are not tokens of the program.
    """
    tensors = _without_fixed(program, arrays_of(path))
    unknown = [name for name in tensors if name not in program.signature.inputs]
    if unknown:
        raise UsageError(
            f"{path} holds {', '.join(unknown)}; the program takes {', '.join(program.signature.inputs)}"
        )
    rows = {n: t.shape[0] for n, t in tensors.items() if t.dim()}
    if not rows or 0 in rows.values():
        raise UsageError(f"{path} holds no rows")
    shared = {
        n: r for n, r in rows.items() if _rows_size(program, n) == _rows_size(program, next(iter(rows)))
    }
    if len(set(shared.values())) > 1:
        listing = ", ".join(f"{r} of {n}" for n, r in shared.items())
        raise UsageError(f"{path} holds different numbers of rows: {listing}")
    _require_positions(program, tensors, path)
    cast = {n: as_whole(t, program.signature.inputs[n].dtype, n, str(path)) for n, t in tensors.items()}
    require_ids(program, cast, str(path))
    return cast


def _require_positions(program: Program, tensors: Batch, path: Path) -> None:
    """Check the lengths of rows, as for text: beyond its number of positions, a model's results mean nothing."""
    limit = longest(program)
    if limit is None:
        return
    for name, tensor in tensors.items():
        shape = program.signature.inputs[name].shape
        beyond = [g for s, g in zip(shape, tensor.shape, strict=False) if s == "sequence" and g > limit]
        if beyond:
            raise UsageError(
                f"{path}: rows of {name} have {beyond[0]} tokens, the program takes {limit}",
                hint="cut them, or leave them out",
            )


def _rows_size(program: Program, name: str) -> int | str | None:
    shape = program.signature.inputs[name].shape
    return shape[0] if shape else None


def _arrays(program: Program, path: Path, batch: int) -> list[Batch]:
    cast = read_arrays(program, path)
    rows = min(t.shape[0] for t in cast.values() if t.dim())
    fixed = any(isinstance(spec.shape[0], int) for spec in program.signature.inputs.values() if spec.shape)
    step = next(int(s.shape[0]) for s in program.signature.inputs.values() if s.shape) if fixed else batch
    if fixed and rows < step:
        raise UsageError(f"{path} holds {rows} rows, and the program takes {step} at a time")
    return [
        {n: t[i : i + step] if t.dim() else t for n, t in cast.items()}
        for i in range(0, rows - rows % step if fixed else rows, step)
    ]
