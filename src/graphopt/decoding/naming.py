"""Strategies and policies by name and options, ``"window{budget=1024}"``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from ..ir.errors import UsageError
from ..passes.framework.pipeline import parse_calls

Kind = TypeVar("Kind")


def named(
    text: str, kinds: Mapping[str, type[Kind]], one: str, many: str, also: tuple[str, ...] = ()
) -> tuple[str, dict[str, Any]]:
    """Return the name in a text and the options that it gives, which the class of that name takes.

    Args:
        text: one name, with options in braces.
        kinds: classes by name.
        one: what such a thing is called: "strategy".
        many: several of them.
        also: further names, which take no options.

    Raises:
        PipelineError: the text is malformed.
        UsageError: there is no such name, or no such option.
    """
    calls = parse_calls(text, f"a {one}")
    if len(calls) != 1:
        raise UsageError(f"{text!r} names {len(calls)} {many}; give exactly one")
    name, options = calls[0]
    names = [*also, *kinds]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UsageError(
            f"there is no {one} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"there are {', '.join(names)}",
        )
    if name in also:
        if options:
            raise UsageError(f"{name} has no options", hint="leave them out")
        return name, {}
    known = list(inspect.signature(kinds[name]).parameters)
    for option in options:
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}", hint=f"its options are {', '.join(known)}")
    return name, dict(options)


__all__ = ["named"]
