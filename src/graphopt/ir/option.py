"""Options of passes and recipes: typed fields with a description and the source of their default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from .errors import PipelineError
from .needs import Needs, refuse_without_effect, text_of

Origin = Literal["paper", "code", "recalled", "ours"]


def option(
    default: Any,
    *,
    help: str,
    source: Origin = "ours",
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    needs: Needs | None = None,
) -> Any:
    """Declare an option of a pass or a recipe.

    Args:
        default: its value when not given.
        help: one line for the command line and the documentation.
        source: where the default comes from; ``recalled`` means from memory, to be checked before quoting.
        choices: the only values allowed.
        low: smallest number allowed.
        high: largest number allowed.
        needs: conditions on other options for this one to have an effect (:mod:`graphopt.ir.needs`); where they do
            not hold, giving it is an error.
    """
    metadata = {"help": help, "source": source, "choices": choices, "low": low, "high": high, "needs": needs}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require_known(owner: str, cls: type, options: dict[str, Any]) -> None:
    """Refuse options that a class does not have, suggesting the nearest name.

    Raises:
        PipelineError: the class does not have an option.
    """
    options_by_name = options_of(cls)
    for name in options:
        if name not in options_by_name:
            near = difflib.get_close_matches(name, options_by_name, n=1)
            raise PipelineError(
                f"{owner} has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"its options are {', '.join(options_by_name)}",
            )


def options_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a pass class by name."""
    return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return the help of an option, with the conditions under which it has an effect."""
    needs = text_of(field.metadata.get("needs"))
    return str(field.metadata["help"]) + (f"; only where {needs}" if needs else "")


def checked(owner: str, declared: Any) -> None:
    """Convert every option of a pass or recipe to its type, and refuse those that have no effect.

    An option counts as given if its value is not the default; :func:`require_effect` is told which were given.

    Raises:
        PipelineError: a value is wrong, or has no effect.
    """
    hints = typing.get_type_hints(type(declared))
    for name, field in options_of(type(declared)).items():
        object.__setattr__(declared, name, check(owner, name, field, hints[name], getattr(declared, name)))
    require_effect(owner, declared, set_options(declared))


def require_effect(owner: str, declared: Any, given: typing.Collection[str]) -> None:
    """Refuse options that were given although they have no effect with the values of the others.

    Raises:
        PipelineError: there is such an option.
    """
    fields = options_of(type(declared))
    values = {name: getattr(declared, name) for name in fields}
    refuse_without_effect(owner, {n: f.metadata.get("needs") for n, f in fields.items()}, values, given)


def set_options(declared: Any) -> list[str]:
    """Return the names of the options that do not have their default."""
    return [n for n, f in options_of(type(declared)).items() if getattr(declared, n) != default_of(f)]


def refuse_set(owner: str, declared: Any, names: typing.Iterable[str], reason: str, hint: str = "") -> None:
    """Refuse options that were set although they have no effect on a program or data.

    Args:
        owner: the name of the pass or recipe.
        declared: the pass or recipe.
        names: of options.
        reason: why they have no effect here.
        hint: what to do.

    Raises:
        PipelineError: one of them does not have its default.
    """
    for name in set_options(declared):
        if name in names:
            raise PipelineError(f"{owner}: {name} has no effect: {reason}", hint=hint or f"leave {name} out")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value of an option that is not given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def check(owner: str, name: str, field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    """Return the value in the option's type.

    Raises:
        PipelineError: it has another type, is out of range, or is not one of the choices.
    """
    if value is None and "none" in (field.metadata.get("choices") or ()):
        value = "none"  # the text of a pipeline reads this word as None
    converted = _convert(annotation, value)
    if converted is _WRONG:
        raise PipelineError(f"{owner}: option {name} must be {describe(annotation)}, not {value!r}")
    choices, low, high = (field.metadata.get(k) for k in ("choices", "low", "high"))
    if choices is not None and converted is not None and converted not in choices:
        raise PipelineError(
            f"{owner}: option {name} is {value!r}; choose one of {', '.join(map(str, choices))}"
        )
    number = isinstance(converted, (int, float)) and not isinstance(converted, bool)
    if number and ((low is not None and converted < low) or (high is not None and converted > high)):
        span = f"from {low}" + (f" to {high}" if high is not None else " up")
        raise PipelineError(f"{owner}: option {name} is {converted}, allowed is {span}")
    return converted


_WRONG = object()


def _convert(annotation: Any, value: Any) -> Any:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            converted = _convert(part, value)
            if converted is not _WRONG:
                return converted
        return _WRONG
    if annotation is type(None):
        return None if value is None else _WRONG
    if annotation is bool:
        return value if isinstance(value, bool) else _WRONG
    if annotation is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG
    if annotation is float:
        return _finite(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _WRONG
    if annotation is str:
        return value if isinstance(value, str) else _WRONG
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return _WRONG
        inner = typing.get_args(annotation)[0]
        items = [_convert(inner, item) for item in value]
        return _WRONG if _WRONG in items else (tuple(items) if origin is tuple else items)
    return value


def _finite(value: float) -> Any:
    """Return a number as float, and refuse NaN and infinity, which range checks would miss."""
    try:
        return float(value) if math.isfinite(value) else _WRONG
    except OverflowError:
        return _WRONG


def describe(annotation: Any) -> str:
    """Return a user-readable name of a type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in typing.get_args(annotation) if part is not type(None))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    if origin in (list, tuple):
        return f"a list of {describe(typing.get_args(annotation)[0]).removeprefix('a ')}s"
    return names.get(annotation, str(annotation))
