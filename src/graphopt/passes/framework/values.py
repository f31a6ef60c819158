"""Values in pipeline text: numbers, fractions, true and false, words, quoted strings, lists."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from ...ir.errors import PipelineError

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_FRACTION = re.compile(r"([-+]?\d+)/(\d+)", re.ASCII)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def parse_word(word: str) -> Any:
    """Return the value of an unquoted word."""
    if word in ("true", "false"):
        return word == "true"
    if word == "none":
        return None
    try:
        return _number(word)
    except (ValueError, OverflowError):
        raise PipelineError(f"{word[:40]} is too large a number") from None


def _number(word: str) -> Any:
    fraction = _FRACTION.fullmatch(word)
    if fraction:
        if int(fraction[2]) == 0:
            raise PipelineError(f"{word[:40]} divides by zero")
        return float(Fraction(int(fraction[1]), int(fraction[2])))
    if _INTEGER.fullmatch(word):
        return int(word)
    if _NUMBER.fullmatch(word):
        if not math.isfinite(float(word)):
            raise OverflowError
        return float(word)
    return word


def format_value(value: Any) -> str:
    """Return the text that parses back to ``value``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return f"{value:.1f}"
        exact = Fraction(value).limit_denominator(128)
        if float(exact) == value and exact.denominator > 1 and len(repr(value)) > 8:
            return f"{exact.numerator}/{exact.denominator}"
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(format_value(item) for item in value) + "]"
    text = str(value)
    if _WORD.fullmatch(text) and parse_word(text) == text:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
