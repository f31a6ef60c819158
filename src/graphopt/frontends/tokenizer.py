"""The tokenizer that came with a checkpoint, and conversations in its form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..ir.errors import CheckpointError, UsageError
from ..ir.program import Program


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
        if isinstance(self.template, list):  # several by name
            named = {t.get("name"): t.get("template") for t in self.template}
            self.template = named.get("default")
        self._compiled: Any = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer puts around it unless ``special`` is false."""
        return list(self.fast.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens."""
        return str(self.fast.decode(list(ids)))

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answering: bool = False) -> str:
        """Return a conversation in the checkpoint's own form; the template runs in a sandbox.

        Args:
            messages: with ``role`` and ``content``.
            answering: end with what stands before the assistant's next turn.

        Raises:
            UsageError: the template does not take this conversation.
        """
        if not self.template:
            lines = [f"{m.get('role', '')}: {m.get('content', '')}" for m in messages]
            return "\n".join([*lines, *(["assistant:"] if answering else [])])
        if self._compiled is None:
            self._compiled = _compiled(self.template)
        special = {
            k: v if isinstance(v, str) else v.get("content", "")
            for k, v in self.config.items()
            # add_bos_token and its like are flags
            if k.endswith("_token") and isinstance(v, (str, dict)) and v
        }
        try:
            return str(self._compiled.render(messages=messages, add_generation_prompt=answering, **special))
        except Exception as error:
            raise UsageError(
                f"the checkpoint's chat template does not take a conversation: {error}"
            ) from error

    def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of what :meth:`chat` made, and the characters of each; templates write special ones."""
        found = self.fast.encode(text, add_special_tokens=not self.template)
        return list(found.ids), [(int(a), int(b)) for a, b in found.offsets]

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and which characters of it the assistant says, the end of its turn included.

        Raises:
            UsageError: the assistant says nothing, or the template writes earlier turns otherwise once later ones follow.
        """
        whole = self.chat(messages)
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self.chat(messages[:number], answering=True)
            after = self.chat(messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise UsageError(
                    "the checkpoint's chat template does not write turns one after the other, so nobody can tell "
                    "what the assistant says",
                    hint="train on all tokens",
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise UsageError("the assistant says nothing in a conversation")
        return whole, spans


def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    # marks of what the assistant says; found without them here
    plain = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template)
    try:
        return environment.from_string(plain)
    except TemplateError as error:
        raise CheckpointError(f"the chat template cannot be read: {error}") from error
