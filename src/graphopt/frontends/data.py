"""Data for calibration and judging: text through the checkpoint's own tokenizer, or arrays as they are."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import CheckpointError, UsageError
from ..ir.program import Program

Batch = dict[str, torch.Tensor]


class Tokenizer:
    """The tokenizer that came with a checkpoint, without any of its library's code paths."""

    def __init__(self, program: Program):
        data = program.origin.assets.get("tokenizer.json")
        if data is None:
            raise UsageError(
                "this program has no tokenizer, so text cannot be its data",
                hint="give a .npz file, or batches of tensors in Python",
            )
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise UsageError(
                "reading text needs tokenizers", hint='pip install "graphopt[huggingface]"'
            ) from None
        try:
            self.fast = Fast.from_str(data.decode("utf-8"))
        except Exception as error:
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        self.fast.no_padding()
        self.fast.no_truncation()
        raw = program.origin.assets.get("tokenizer_config.json", b"{}")
        self.config: dict[str, Any] = json.loads(raw)
        template = program.origin.assets.get("chat_template.jinja")
        self.template = template.decode() if template else self.config.get("chat_template")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, special ones included."""
        return list(self.fast.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens."""
        return str(self.fast.decode(list(ids)))

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation in the checkpoint's own form; the template runs in a sandbox."""
        if not self.template:
            return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {
            k: v if isinstance(v, str) else v.get("content", "")
            for k, v in self.config.items()
            if k.endswith("_token") and v
        }
        return str(
            environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=False, **special
            )
        )


def read_data(
    program: Program,
    source: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    *,
    sequences: int | None = 128,
    length: int = 2048,
    batch: int = 8,
    seed: int = 0,
    shuffle: bool = True,
) -> tuple[list[Batch], str]:
    """Return batches by input name, and one sample as text for the user to look at.

    Args:
        program: whose inputs are made.
        source: a .jsonl (``text`` or ``messages`` a line), .txt or .npz file, or batches themselves.
        sequences: how many rows at most; None takes all there are.
        length: tokens a row at most; no more than the program takes.
        batch: rows a batch.
        seed: of the choice where there are more.
        shuffle: take texts in random order, else in the file's.

    Raises:
        UsageError: the file is of no known kind, or holds nothing usable.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [dict(b) for b in source], ""
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"the data file {path} does not exist")
    if path.suffix == ".npz":
        return _arrays(program, path, batch), ""
    if path.suffix not in (".jsonl", ".txt", ".json"):
        raise UsageError(f"{path}: data is read from .jsonl, .txt and .npz files")
    tokenizer = Tokenizer(program)
    length = min(length, longest(program) or length)
    texts = list(_texts(path, tokenizer))
    if not texts:
        raise UsageError(f"{path} holds no text")
    if shuffle:
        random.Random(seed).shuffle(texts)
    rows = _rows(program, tokenizer, texts, sequences, length)
    pad = _padding_id(tokenizer)
    batches = [_padded(program, rows[i : i + batch], pad) for i in range(0, len(rows), batch)]
    # judging needs data of its own
    if len(batches) == 1 and len(rows) > 1:
        half = len(rows) // 2
        batches = [_padded(program, rows[:half], pad), _padded(program, rows[half:], pad)]
    return batches, tokenizer.decode(rows[0])[:300]


# as configurations call the number of positions that a model was made for
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def longest(program: Program) -> int | None:
    """Return how many tokens a row may have: what the graph takes and the checkpoint says it was made for."""
    size = program.signature.sizes.get("sequence")
    limits = [size.high] if size is not None and size.high is not None else []
    config = program.origin.config
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        limits += [
            v for k in _CONTEXT if isinstance(v := table.get(k), int) and not isinstance(v, bool) and v > 1
        ]
    return min(limits, default=None)


def _texts(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        if path.suffix == ".txt":
            yield from (line.strip() for line in file if line.strip())
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from None
            if isinstance(entry, str):
                yield entry
            elif isinstance(entry, dict) and isinstance(entry.get("text"), str):
                yield entry["text"]
            elif isinstance(entry, dict) and isinstance(entry.get("messages"), list):
                yield tokenizer.chat(entry["messages"])
            else:
                raise UsageError(f'{path}, line {number} has neither "text" nor "messages"')


def _rows(
    program: Program, tokenizer: Tokenizer, texts: list[str], sequences: int | None, length: int
) -> list[list[int]]:
    """One text a row for encoders; for models that predict tokens, texts joined and cut."""
    rows: list[list[int]] = []
    if program.origin.padding != "causal":
        for text in texts[:sequences]:
            ids = tokenizer.encode(text)
            if len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            rows.append(ids)
        return [row for row in rows if row]
    joined: list[int] = []
    for text in texts:
        joined.extend(tokenizer.encode(text))
        while len(joined) >= length:
            rows.append(joined[:length])
            joined = joined[length:]
        if sequences is not None and len(rows) >= sequences:
            return rows[:sequences]
    if len(joined) > 1:
        rows.append(joined)
    return rows


def _padding_id(tokenizer: Tokenizer) -> int:
    for key in ("pad_token", "eos_token", "unk_token"):
        token = tokenizer.config.get(key)
        text = token if isinstance(token, str) else (token or {}).get("content")
        found = tokenizer.fast.token_to_id(text) if text else None
        if found is not None:
            return int(found)
    return 0


def _padded(program: Program, rows: list[list[int]], pad: int) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    made = {"input_ids": ids, "attention_mask": mask}
    kept = {k: v for k, v in made.items() if k in program.signature.inputs}
    if not kept:
        raise UsageError("the program takes no input_ids, so text cannot be its data")
    return kept


def _arrays(program: Program, path: Path, batch: int) -> list[Batch]:
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    unknown = [name for name in tensors if name not in program.signature.inputs]
    if unknown:
        raise UsageError(
            f"{path} holds {', '.join(unknown)}; the program takes {', '.join(program.signature.inputs)}"
        )
    rows = min((t.shape[0] for t in tensors.values()), default=0)
    if rows == 0:
        raise UsageError(f"{path} holds no rows")
    cast = {n: t.to(program.signature.inputs[n].dtype) for n, t in tensors.items()}
    fixed = any(isinstance(spec.shape[0], int) for spec in program.signature.inputs.values() if spec.shape)
    step = next(int(s.shape[0]) for s in program.signature.inputs.values() if s.shape) if fixed else batch
    return [
        {n: t[i : i + step] for n, t in cast.items()}
        for i in range(0, rows - rows % step if fixed else rows, step)
    ]
