"""Pipelines as text: ``name{option=value option=[item item]}, name{...}``."""

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
        PipelineError: the text is no pipeline or an option is wrong; the message gives the position.
    """
    return _Reader(text).pipeline()


def parse_calls(text: str, what: str = "a pass") -> list[tuple[str, dict[str, Any]]]:
    """Return names with their options, ``name{option=value}, name``, which need not name passes.

    Raises:
        PipelineError: the text is not of that form; the message gives the position.
    """
    return _Reader(text).calls(what)


def format_pipeline(passes: Iterable[Pass]) -> str:
    """Return the text that :func:`parse_pipeline` reads back to these passes."""
    return ", ".join(str(p) for p in passes)


def as_passes(passes: str | Pass | Sequence[str | Pass]) -> list[Pass]:
    """Return passes given as objects, text, or a mix of both."""
    if isinstance(passes, (str, Pass)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise PipelineError(f"{passes!r} is neither a pass nor its text")
    steps: list[Pass] = []
    for entry in passes:
        if isinstance(entry, Pass):
            steps.append(entry)
        elif isinstance(entry, str):
            steps.extend(parse_pipeline(entry))
        elif isinstance(entry, type) and issubclass(entry, Pass):
            steps.append(entry())
        else:
            raise PipelineError(f"{entry!r} is neither a pass nor its text")
    return steps


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def fail(self, reason: str) -> PipelineError:
        excerpt = (
            self.text[max(0, self.position - 20) : self.position]
            + " >>> "
            + self.text[self.position : self.position + 20]
        )
        return PipelineError(f"{reason} at character {self.position + 1} of the pipeline: {excerpt.strip()}")

    def space(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def peek(self) -> str:
        self.space()
        return self.text[self.position] if self.position < len(self.text) else ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.fail(f"expected {character!r}, found {self.peek() or 'the end'!r}")
        self.position += 1

    def word(self, what: str) -> str:
        self.space()
        start = self.position
        while self.position < len(self.text):
            character = self.text[self.position]
            if character.isspace() or character in _SPECIAL:
                break
            self.position += 1
        if start == self.position:
            raise self.fail(f"expected {what}, found {self.peek() or 'the end'!r}")
        return self.text[start : self.position]

    def pipeline(self) -> list[Pass]:
        return [find_pass(name).from_options(options) for name, options in self.calls("a pass")]

    def calls(self, what: str) -> list[tuple[str, dict[str, Any]]]:
        calls: list[tuple[str, dict[str, Any]]] = []
        if not self.peek():
            raise self.fail("a pipeline names at least one pass" if what == "a pass" else f"expected {what}")
        while True:
            calls.append(self.one(what))
            if not self.peek():
                return calls
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
                # spaces separate items; commas as Python writes them may
                if self.peek() == ",":
                    self.take(",")
            self.take("]")
            return items
        if character in ('"', "'"):
            return self.quoted(character)
        return parse_word(self.word("a value"))

    def quoted(self, quote: str) -> str:
        self.take(quote)
        characters: list[str] = []
        while self.position < len(self.text):
            character = self.text[self.position]
            self.position += 1
            if character == "\\" and self.position < len(self.text):
                characters.append(self.text[self.position])
                self.position += 1
            elif character == quote:
                return "".join(characters)
            else:
                characters.append(character)
        raise self.fail("a quoted string is not closed")
