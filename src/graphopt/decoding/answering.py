"""Data written by the model itself: texts that it continues, and conversations in which it plays the assistant."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.reading import entries, longest
from ..data.tokenizer import Tokenizer
from ..ir.errors import UsageError
from ..ir.program import Model, Program, as_program
from ..ir.storage.atomic import atomic_file
from ..ir.storage.content import whole_hash
from ..measure.context import Progress, Silent
from .generation import end_tokens, stream

Entry = str | list[dict[str, Any]]


@dataclass
class Answered:
    """Result of :func:`answer`: rows written, rows left out because they did not fit, and tokens the model wrote."""

    rows: int = 0
    left_out: int = 0
    tokens: int = 0


def answer(
    model: Model | Program,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sequences: int | None = None,
    prompt_tokens: int = 32,
    max_new_tokens: int = 128,
    batch: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    strategy: str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Answered:
    """Let a model write the data that heads, drafts and :class:`~graphopt.decoding.Retrieval` learn from.

    The first tokens of a text are kept and the model continues them. In a conversation it writes every assistant turn,
    with its own earlier turns as context; a conversation that ends with the user's turn gets an answer. The data may
    therefore be prompts alone, and a model is never trained on another model's words (self-distillation of Medusa,
    arXiv 2401.10774).

    If an interrupted call is repeated with the same arguments, it resumes from the rows saved in ``output`` + ``.part``.

    Args:
        model: what :func:`graphopt.capture` takes, with its tokenizer.
        source: a .jsonl file (``text`` or ``messages`` on each line) or a .txt file.
        output: a .jsonl file to write, in the same form as the source.
        sequences: maximum number of rows; None takes all.
        prompt_tokens: number of tokens of each text that are kept as its prompt.
        max_new_tokens: maximum number of tokens the model writes in each turn.
        batch: number of rows generated together.
        temperature: 0 takes the most likely token.
        seed: for sampling.
        strategy: how candidates are proposed; the text is the same with any strategy.
        device: where the model runs.
        progress: notified after every batch.

    Raises:
        UsageError: the output exists, the source is missing or of an unknown kind, or the ``.part`` file belongs to a
            different call.
    """
    path, target = Path(source), Path(output)
    if target.exists():
        raise UsageError(f"{target} exists already", hint="choose another place, or remove it")
    if not path.is_file():
        raise UsageError(f"the data file {path} does not exist")
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UsageError(f"{path}: texts and conversations are read from .jsonl and .txt files")
    if min(prompt_tokens, max_new_tokens, batch) < 1:
        raise UsageError("prompt_tokens, max_new_tokens and batch must be at least 1")
    program = as_program(model)
    writer = _Writer(program, prompt_tokens, max_new_tokens, temperature, strategy, device)
    rows = [entry for _, entry in entries(path)][:sequences]
    if not rows:
        raise UsageError(f"{path} holds no text")
    header = {
        "source": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "program": whole_hash(program), "rows": len(rows),
        "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "batch": batch, "temperature": temperature,
        "seed": seed,
    }  # fmt: skip
    part = target.with_name(target.name + ".part")
    lines = _finished_rows(part, header)
    reporter = progress or Silent()
    starts = range(len(lines), len(rows), batch)
    reporter.start("writing answers", len(starts))
    target.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a", encoding="utf-8") as file:
        if not lines:
            file.truncate(0)
            file.write(json.dumps(header) + "\n")
        for start in starts:
            answers = writer.write(rows[start : start + batch], seed + start)
            lines.extend(json.dumps(row, ensure_ascii=False) for row in answers)
            file.write("\n".join(lines[start:]) + "\n")
            file.flush()
            reporter.step(f"{writer.tokens} tokens")
    reporter.done()
    answered_lines = [line for line in lines if line != "null"]
    if not answered_lines:
        raise UsageError("no row fits into the model's positions", hint="use shorter prompts or answers")
    with atomic_file(target) as temporary:
        temporary.write_text("\n".join(answered_lines) + "\n", encoding="utf-8")
    part.unlink()
    return Answered(len(answered_lines), len(lines) - len(answered_lines), writer.tokens)


def _finished_rows(part: Path, header: dict[str, Any]) -> list[str]:
    """Return the rows that an interrupted call finished, counting complete batches only."""
    if not part.is_file():
        return []
    text = part.read_text(encoding="utf-8")
    lines = text.splitlines()
    if not text.endswith("\n"):
        lines = lines[:-1]
    try:
        found_header = json.loads(lines[0]) if lines else None
    except ValueError:
        found_header = None
    if found_header != header:
        if not lines:
            return []
        raise UsageError(
            f"{part} was left by another call", hint="repeat that call to finish it, or remove the file"
        )
    whole = (len(lines) - 1) // int(header["batch"]) * int(header["batch"])
    finished = lines[1 : 1 + whole]
    part.write_text("\n".join([lines[0], *finished]) + "\n", encoding="utf-8")
    return finished


class _Writer:
    """Generates several rows together."""

    def __init__(
        self, program: Program, prompt_tokens: int, count: int, temperature: float, strategy: str | None,
        device: torch.device | str,
    ):  # fmt: skip
        self.program, self.tokenizer = program, Tokenizer(program)
        self.prompt_tokens, self.count = prompt_tokens, count
        self.options: dict[str, Any] = {"temperature": temperature, "strategy": strategy, "device": device}
        self.ends = set(end_tokens(program))
        self.limit = longest(program)
        self.tokens = 0

    def write(self, rows: Sequence[Entry], seed: int) -> list[dict[str, Any] | None]:
        """Return each row as a line of data, or None if it does not fit."""
        results: list[dict[str, Any] | None] = [None] * len(rows)
        texts = [n for n, row in enumerate(rows) if isinstance(row, str)]
        prompts = [self.tokenizer.encode(str(rows[n]))[: self.prompt_tokens] for n in texts]
        for n, prompt, new in zip(texts, prompts, self._continued(prompts, seed), strict=True):
            results[n] = None if new is None else {"text": self.tokenizer.decode([*prompt, *new])}
        conversations = {n: _Conversation(row) for n, row in enumerate(rows) if isinstance(row, list)}
        turn = 0
        while waiting := {n: conversation for n, conversation in conversations.items() if conversation.waits}:
            turn += 1
            chats = [
                self.tokenizer.encode_chat(self.tokenizer.chat(conversation.so_far, answering=True))[0]
                for conversation in waiting.values()
            ]
            for conversation, new in zip(waiting.values(), self._continued(chats, seed + turn), strict=True):
                conversation.say(None if new is None else self.tokenizer.decode(new).strip())
        for n, conversation in conversations.items():
            results[n] = {"messages": conversation.so_far} if conversation.usable else None
        return results

    def _continued(self, prompts: list[list[int]], seed: int) -> Iterator[list[int] | None]:
        fits = [bool(p) and (self.limit is None or len(p) + self.count <= self.limit) for p in prompts]
        rows = [p for p, fit in zip(prompts, fits, strict=True) if fit]
        continued: Iterator[list[int]] = iter(())
        if rows:
            stream_ = stream(self.program, rows, max_new_tokens=self.count, seed=seed, **self.options)
            for _, tokens in stream_:
                self.tokens += len(tokens)
            continued = (row[len(prompt) :] for row, prompt in zip(stream_.rows, rows, strict=True))
        for fit in fits:
            new = next(continued) if fit else None
            # the chat template writes the end token, and plain texts have none
            yield new if new is None else [t for t in new if t not in self.ends]


class _Conversation:
    """A conversation whose assistant turns are rewritten."""

    def __init__(self, messages: list[dict[str, Any]]):
        self.left = list(messages)
        if not messages or messages[-1].get("role") != "assistant":
            self.left.append({"role": "assistant"})
        self.so_far: list[dict[str, Any]] = []
        self.usable = len(self.left) > 1
        self._listen()

    @property
    def waits(self) -> bool:
        """Tell whether the assistant speaks next."""
        return self.usable and bool(self.left)

    def _listen(self) -> None:
        while self.left and self.left[0].get("role") != "assistant":
            self.so_far.append(self.left.pop(0))

    def say(self, content: str | None) -> None:
        """Add the assistant's turn; None means that it does not fit, which ends the conversation before this turn."""
        if content is None:
            # earlier turns are complete; the user's last turn has no answer, so it is dropped too
            while self.so_far and self.so_far[-1].get("role") != "assistant":
                self.so_far.pop()
            self.left, self.usable = [], bool(self.so_far)
            return
        self.left.pop(0)
        self.so_far.append({"role": "assistant", "content": content})
        self._listen()
