"""Declares commands as classes: the fields are the command's arguments, the docstring is its help.

The class is the only description of a command. The parser is built from it, and the function that does the work gets an
instance with the values. Options shared by several commands are in a base class. This does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from ..cache import without_cache
from .output import note

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


def command(work: str, *, starting: str = "") -> Callable[[type[Described]], type[Described]]:
    """Return a decorator that makes a class a command, named after the class in lower case.

    Args:
        work: module and function that do the work, such as ``inspecting.inspect_checkpoint``. The module is imported
            when the command runs, so that help and usage errors need not wait for torch.
        starting: printed on standard error before that import, which takes longer than people like to see nothing.
    """
    module, _, function = work.partition(".")

    def register(described: type[Described]) -> type[Described]:
        def call(**values: Any) -> None:
            args = described()
            vars(args).update(values)
            if starting:
                note(starting.format(**values))
            with _imports(f"{__package__}.{module}"):
                run = getattr(import_module(f"{__package__}.{module}"), function)
            with without_cache() if values.get("no_cache") else contextlib.nullcontext():
                run(args)

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


@contextlib.contextmanager
def _imports(name: str) -> Iterator[None]:
    """Collect no garbage while a module is imported for the first time, and never look at what was imported.

    Imports make hundreds of thousands of objects that stay; going through all of them again and again takes a fifth of
    the time.
    """
    if name in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
        # some libraries look at exit whether all of their objects are gone
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()
