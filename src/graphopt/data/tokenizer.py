"""The tokenizer of a checkpoint, and conversations in its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..ir.errors import CheckpointError, UsageError
from ..ir.program import Program
from .chat_template import render, special_tokens


class Tokenizer:
    """The tokenizer of a checkpoint, loaded without transformers."""

    def __init__(self, program: Program):
        data = program.origin.assets.get("tokenizer.json")
        if data is None:
            raise UsageError(
                "this program has no tokenizer, so it reads and writes no text",
                hint="as data it takes tokens: a .npz file, or batches of tensors in Python",
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
        self.config = _table(program, "tokenizer_config.json")
        self.special = special_tokens(self.config, _table(program, "special_tokens_map.json"))
        template = program.origin.assets.get("chat_template.jinja")
        try:
            chat_template = template.decode() if template else self.config.get("chat_template")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is no text: {error}") from error
        self.template = _default_template(chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens around it unless ``special`` is false."""
        return list(self.fast.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens."""
        return str(self.fast.decode(list(ids)))

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answering: bool = False) -> str:
        """Return a conversation in the checkpoint's own format; the template runs in a sandbox.

        Args:
            messages: with ``role`` and ``content``.
            answering: end with the prefix of the assistant's next turn.

        Raises:
            UsageError: the template does not accept this conversation.
        """
        if not self.template:
            lines = [f"{m.get('role', '')}: {m.get('content', '')}" for m in messages]
            return "\n".join([*lines, *(["assistant:"] if answering else [])])
        return render(self.template, messages, self.special, answering=answering)

    def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text from :meth:`chat`, and their character ranges; templates write special tokens."""
        encoding = self.fast.encode(text, add_special_tokens=not self.template)
        return list(encoding.ids), [(int(a), int(b)) for a, b in encoding.offsets]

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the character ranges that the assistant says, including the end of its turns.

        Raises:
            UsageError: the assistant says nothing, or the template changes earlier turns when later ones follow.
        """
        conversation = self.chat(messages)
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self.chat(messages[:number], answering=True)
            after = self.chat(messages[: number + 1])
            if not (after.startswith(before) and conversation.startswith(after)):
                raise UsageError(
                    "the checkpoint's chat template does not write turns in sequence, so it is unknown "
                    "what the assistant says",
                    hint="train on all tokens",
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise UsageError("the assistant says nothing in a conversation")
        return conversation, spans


def _table(program: Program, name: str) -> dict[str, Any]:
    """Return a JSON object from a file of the checkpoint; an empty one if the file does not exist."""
    try:
        table = json.loads(program.origin.assets.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{name} holds no table")
    return table


def _default_template(templates: Any) -> str | None:
    """Return the default template, given one or several by name."""
    if isinstance(templates, list):
        by_name = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}
        if by_name and "default" not in by_name:
            raise CheckpointError(
                f"the checkpoint has the chat templates {', '.join(map(str, by_name))}, and none is the default"
            )
        templates = by_name.get("default")
    if templates is not None and not isinstance(templates, str):
        raise CheckpointError("the checkpoint's chat template is no text")
    return templates
