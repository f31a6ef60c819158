"""How a command is described: a class whose fields are what it takes and whose docstring is its help.

That is the one description there is. The parser is made of it, and whoever does the work is given an instance with the
values. What several commands take is a class that they inherit. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

Described = TypeVar("Described")

app = typer.Typer(
    name="graphopt",
    help="Change the structure of a trained model by checked passes over one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def option(about: str, default: Any = ..., *flags: str, **limits: Any) -> Any:
    """Describe an option.

    Args:
        about: its help.
        default: what it is where it is not given; None where its type allows that; else it has to be given.
        flags: how it is written; ``--`` and its name where none of them is long.
        limits: what typer checks, such as ``min`` and ``max``.
    """
    return typer.Option(default, *flags, help=about, **limits)


def argument(about: str, default: Any = ...) -> Any:
    """Describe an argument."""
    return typer.Argument(default, help=about)


def command(work: str) -> Callable[[type[Described]], type[Described]]:
    """Make a class a command under its name in lower case.

    Args:
        work: module and function that do the work, as ``inspecting.inspect_checkpoint``. The module is imported when the
            command runs, so that help and wrong usage need not wait for torch.
    """

    def register(described: type[Described]) -> type[Described]:
        def call(**values: Any) -> None:
            args = described()
            vars(args).update(values)
            module, _, function = work.partition(".")
            getattr(import_module(f"{__package__}.{module}"), function)(args)

        hints = get_type_hints(described)
        # its own before what it shares, and what has to be given before all others
        names = dict.fromkeys(name for cls in described.__mro__ for name in inspect.get_annotations(cls))
        parameters = {name: getattr(described, name) for name in names}
        for name, parameter in parameters.items():
            if parameter.default is ... and NoneType in get_args(hints[name]):
                parameter.default = None
            if isinstance(parameter, OptionInfo) and not any(
                f.startswith("--") for f in parameter.param_decls or ()
            ):
                parameter.param_decls = (*(parameter.param_decls or ()), f"--{name.replace('_', '-')}")
        call.__annotations__ = hints
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=parameter, annotation=hints[name]
                )
                for name, parameter in sorted(parameters.items(), key=lambda item: item[1].default is not ...)
            ]
        )
        app.command(described.__name__.lower(), help=described.__doc__)(call)
        return described

    return register
