"""Chat templates of checkpoints: Jinja in a sandbox, with the functions that transformers provides and nothing else."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from ..ir.errors import CheckpointError, UsageError

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""Entries of a tokenizer's configuration that templates can read."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


def special_tokens(*tables: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by name; earlier tables take precedence, other settings are skipped."""
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        for table in tables:
            value = table.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """Return the compiled template.

    Raises:
        CheckpointError: it is not a valid template.
    """
    from jinja2 import TemplateError

    try:
        return _environment().from_string(template)
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"the chat template cannot be read: {error}") from error


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], *, answering: bool
) -> str:
    """Return a conversation as text.

    Args:
        template: of the checkpoint.
        messages: with ``role`` and ``content``; entries that are None count as absent.
        special: tokens by name.
        answering: end with the prefix of the assistant's next turn.

    Raises:
        UsageError: the template does not accept this conversation.
    """
    try:
        return str(
            compiled(template).render(
                messages=[_message(m) for m in messages], tools=None, documents=None,
                add_generation_prompt=answering, **special,
            )
        )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:
        raise UsageError(
            f"the checkpoint's chat template does not accept the conversation: {error}"
        ) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without entries that are None, and with its reasoning text under all usual names."""
    fields = {k: v for k, v in message.items() if v is not None}
    thought = next((fields[k] for k in _REASONING if k in fields), None)
    return fields if thought is None else {"thinking": thought, **fields, "reasoning_content": thought}


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: marks what the assistant says; its contents are written unchanged."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
