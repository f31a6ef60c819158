"""Chat templates of checkpoints: Jinja in a sandbox, with what transformers gives templates and nothing else."""

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
"""What templates see of a tokenizer's configuration."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


def special_tokens(*tables: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by name; earlier tables come first. Settings of the same ending are no tokens."""
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
    """Return a template to be rendered.

    Raises:
        CheckpointError: it is no template.
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
        messages: with ``role`` and ``content``; entries that are None count as not there.
        special: tokens by name.
        answering: end with what stands before the assistant's next turn.

    Raises:
        UsageError: the template does not take this conversation.
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
        raise UsageError(f"the checkpoint's chat template does not take a conversation: {error}") from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None, and give what a model thought under all of its names."""
    fields = {k: v for k, v in message.items() if v is not None}
    thought = next((fields[k] for k in _REASONING if k in fields), None)
    return fields if thought is None else {"thinking": thought, **fields, "reasoning_content": thought}


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: a mark around what the assistant says, which writes what is in it."""

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
        # Jinja's own escapes what HTML would take for its own
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
