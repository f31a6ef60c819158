"""Pipelines as text: ``name{option=value option=value}, name{...}``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...ir.errors import PipelineError
from .base import Pass
from .registry import find_pass
from .values import parse_word

_SPECIAL = "{}[]=,\"'"


def parse_pipeline(text: str) -> list[Pass]:
    """Return the passes of a pipeline.

    Raises:
        PipelineError: with the place in the text, if it is no pipeline or an option is wrong.
    """
    return _Reader(text).pipeline()


def parse_calls(text: str, what: str = "a pass") -> list[tuple[str, dict[str, Any]]]:
    """Return names with their options, ``name{option=value}, name``, of things that need not be passes.

    Raises:
        PipelineError: with the place in the text, if it is not of that form.
    """
    return _Reader(text).calls(what)


def format_pipeline(passes: Iterable[Pass]) -> str:
    """Return the text that :func:`parse_pipeline` reads back to these passes."""
    return ", ".join(str(p) for p in passes)


def as_passes(passes: str | Pass | Sequence[str | Pass]) -> list[Pass]:
    """Return passes given as objects, text, or a mixture."""
    if isinstance(passes, (str, Pass)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise PipelineError(f"{passes!r} is neither a pass nor its text")
    found: list[Pass] = []
    for entry in passes:
        if isinstance(entry, Pass):
            found.append(entry)
        elif isinstance(entry, str):
            found.extend(parse_pipeline(entry))
        elif isinstance(entry, type) and issubclass(entry, Pass):
            found.append(entry())
        else:
            raise PipelineError(f"{entry!r} is neither a pass nor its text")
    return found


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def fail(self, reason: str) -> PipelineError:
        shown = (
            self.text[max(0, self.place - 20) : self.place]
            + " >>> "
            + self.text[self.place : self.place + 20]
        )
        return PipelineError(f"{reason} at character {self.place + 1} of the pipeline: {shown.strip()}")

    def space(self) -> None:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1

    def peek(self) -> str:
        self.space()
        return self.text[self.place] if self.place < len(self.text) else ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.fail(f"expected {character!r}, found {self.peek() or 'the end'!r}")
        self.place += 1

    def word(self, what: str) -> str:
        self.space()
        start = self.place
        while self.place < len(self.text):
            character = self.text[self.place]
            if character.isspace() or character in _SPECIAL:
                break
            self.place += 1
        if start == self.place:
            raise self.fail(f"expected {what}, found {self.peek() or 'the end'!r}")
        return self.text[start : self.place]

    def pipeline(self) -> list[Pass]:
        return [find_pass(name).from_options(options) for name, options in self.calls("a pass")]

    def calls(self, what: str) -> list[tuple[str, dict[str, Any]]]:
        found: list[tuple[str, dict[str, Any]]] = []
        if not self.peek():
            raise self.fail("a pipeline names at least one pass" if what == "a pass" else f"expected {what}")
        while True:
            found.append(self.one(what))
            if not self.peek():
                return found
            self.take(",")

    def one(self, what: str) -> tuple[str, dict[str, Any]]:
        name = self.word(f"the name of {what}")
        options: dict[str, Any] = {}
        if self.peek() == "{":
            self.take("{")
            while self.peek() != "}":
                key = self.word("an option")
                if key in options:
                    raise self.fail(f"option {key} is given twice")
                self.take("=")
                options[key] = self.value(0)
            self.take("}")
        return name, options

    def value(self, depth: int) -> Any:
        character = self.peek()
        if character == "[":
            if depth > 8:
                raise self.fail("lists are nested too deeply")
            self.take("[")
            items = []
            while self.peek() != "]":
                if not self.peek():
                    raise self.fail("a list is not closed")
                items.append(self.value(depth + 1))
            self.take("]")
            return items
        if character in ('"', "'"):
            return self.quoted(character)
        return parse_word(self.word("a value"))

    def quoted(self, quote: str) -> str:
        self.take(quote)
        read: list[str] = []
        while self.place < len(self.text):
            character = self.text[self.place]
            self.place += 1
            if character == "\\" and self.place < len(self.text):
                read.append(self.text[self.place])
                self.place += 1
            elif character == quote:
                return "".join(read)
            else:
                read.append(character)
        raise self.fail("a quoted string is not closed")
