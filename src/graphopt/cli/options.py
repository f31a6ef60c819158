"""Declares commands as classes: the fields are the command's arguments, the docstring is its help.

The class is the only description of a command. The parser is built from it, and the function that does the work gets an
instance with the values. Options shared by several commands are in a base class. This does not import torch.
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
        default: value if the option is not given; without a default it is None if its type allows that, else required.
        flags: its flags; ``--`` and its name is added if none of them is long.
        limits: limits that typer checks, such as ``min`` and ``max``.
    """
    return typer.Option(default, *flags, help=about, **limits)


def argument(about: str, default: Any = ...) -> Any:
    """Describe an argument."""
    return typer.Argument(default, help=about)


def command(work: str) -> Callable[[type[Described]], type[Described]]:
    """Return a decorator that makes a class a command, named after the class in lower case.

    Args:
        work: module and function that do the work, such as ``inspecting.inspect_checkpoint``. The module is imported
            when the command runs, so that help and usage errors need not wait for torch.
    """

    def register(described: type[Described]) -> type[Described]:
        def call(**values: Any) -> None:
            args = described()
            vars(args).update(values)
            module, _, function = work.partition(".")
            getattr(import_module(f"{__package__}.{module}"), function)(args)

        hints = get_type_hints(described)
        # the command's own fields before shared ones, and required ones before all others
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
