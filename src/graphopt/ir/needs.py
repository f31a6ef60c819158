"""Conditions on other options under which an option has an effect, declared with the option."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PipelineError


@dataclass(frozen=True)
class Condition:
    """A condition on the value of another option.

    Args:
        text: follows the option's name in a message: ``rate is given``.
        holds: tells whether a value satisfies it.
    """

    text: str
    holds: Callable[[Any], bool]


GIVEN = Condition(" is given", lambda value: value not in (None, ""))
ABSENT = Condition(" is not given", lambda value: value in (None, ""))
NONZERO = Condition(" is not 0", bool)
SOME = Condition(" has entries", bool)


def above(bound: float) -> Condition:
    """Return the condition that a number is larger than this."""
    return Condition(f" > {bound:g}", lambda value: value > bound)


def below(bound: float) -> Condition:
    """Return the condition that a number is smaller than this."""
    return Condition(f" < {bound:g}", lambda value: value < bound)


def longer(count: int) -> Condition:
    """Return the condition that a list has more entries than this."""
    return Condition(
        f" has more than {count} entr{'y' if count == 1 else 'ies'}", lambda value: len(value) > count
    )


Needs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Conditions by option, all of which must hold, or several such sets, one of which must. Anything but a
:class:`Condition` is a required value, and a tuple lists alternative values."""


def alternatives(needs: Needs | None) -> list[dict[str, Condition]]:
    """Return the sets of conditions, one of which must hold; empty where an option always has an effect."""
    if not needs:
        return []
    sets = [needs] if isinstance(needs, Mapping) else list(needs)
    return [{name: _condition(value) for name, value in conditions.items()} for conditions in sets]


def _condition(value: Any) -> Condition:
    if isinstance(value, Condition):
        return value
    values = value if isinstance(value, tuple) else (value,)
    return Condition("=" + " or ".join(_value_text(v) for v in values), lambda found: found in values)


def _value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def matters(needs: Needs | None, values: Mapping[str, Any]) -> bool:
    """Tell whether an option has an effect, given the values of the others."""
    sets = alternatives(needs)
    return not sets or any(
        all(c.holds(values[name]) for name, c in conditions.items()) for conditions in sets
    )


def text_of(needs: Needs | None) -> str:
    """Return the conditions as a phrase, such as ``algorithm=auto``; empty where there are none."""
    sets = alternatives(needs)
    return ", or ".join(" and ".join(name + c.text for name, c in conditions.items()) for conditions in sets)


def refuse_without_effect(
    owner: str, needs: Mapping[str, Needs | None], values: Mapping[str, Any], given: Collection[str]
) -> None:
    """Refuse options that were given although they have no effect with the values of the others.

    Args:
        owner: the pass or recipe.
        needs: of each option.
        values: of all options.
        given: names of those that were given.

    Raises:
        PipelineError: names the option, and the options that leave it without effect.
    """
    for name in given:
        if matters(needs.get(name), values):
            continue
        sets = alternatives(needs.get(name))
        unmet = dict.fromkeys(
            o for conditions in sets for o, c in conditions.items() if not c.holds(values[o])
        )
        obstacles = ", ".join(f"{o}={_written(values[o])}" for o in unmet)
        raise PipelineError(
            f"{owner}: {name}={_written(values[name])} has no effect beside {obstacles}",
            hint=f"leave {name} out; it matters where {text_of(needs.get(name))}",
        )


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_written(v) for v in value) + "]"
    return "none" if value is None else _value_text(value) if not isinstance(value, float) else f"{value:g}"
