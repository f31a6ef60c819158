"""Adding, removing and changing inputs of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .compat import symint
from .constraints import rename_in
from .errors import UsageError
from .signature import Fill, FillRule, Input, SizeRange
from .sizes import format_size

if TYPE_CHECKING:
    from .program import Program


def add_input(
    program: Program, name: str, shape: list[int | torch.SymInt], dtype: torch.dtype,
    *, fill: tuple[FillRule, str] | None = None,
) -> fx.Node:  # fmt: skip
    """Add an input tensor to a program and return its node.

    Args:
        program: changed in place.
        name: of the input.
        shape: numbers and sizes of the program.
        dtype: of its elements.
        fill: the rule for its default, and the input that the rule reads; None if the input is required.

    Raises:
        UsageError: the program already has an input of that name.
    """
    signature = program.signature
    if name in signature.parameters or name in signature.inputs or name in program.dials:
        raise UsageError(f"the program already takes {name!r}")
    last = list(program.graph.find_nodes(op="placeholder"))[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(name)
    node.target = node.name
    node.meta.update(val=program.fake(shape, dtype), input=name)
    sizes = tuple(format_size(size, program.symbols) for size in shape)
    program.signature = replace(
        signature,
        inputs={**signature.inputs, name: Input(name, dtype, sizes, None if fill is None else Fill(*fill))},
        parameters={**signature.parameters, name: {"leaf": name}},
    )
    program.changed()
    return node


def remove_input(program: Program, name: str) -> None:
    """Remove an input that is no longer used.

    Raises:
        UsageError: a node reads it, or it is part of a larger parameter.
    """
    signature, node = program.signature, program.input_nodes[name]
    if node.users:
        raise UsageError(f"input {name!r} is still read by {next(iter(node.users)).name}")
    if signature.parameters.get(name) != {"leaf": name}:
        raise UsageError(f"input {name!r} is part of a larger parameter")
    program.graph.erase_node(node)
    program.signature = replace(
        signature,
        inputs={k: v for k, v in signature.inputs.items() if k != name},
        parameters={k: v for k, v in signature.parameters.items() if k != name},
    )
    program.changed()


def limit_size(program: Program, size: str, low: int, high: int | None = None) -> None:
    """Lower the smallest value of a size to ``low``, and limit its largest to ``high`` if given."""
    signature = program.signature
    limits = signature.sizes[size]
    highest = limits.high if high is None else min(high, limits.high or high)
    hint = limits.hint if highest is None else min(limits.hint, highest)
    program.signature = replace(
        signature, sizes={**signature.sizes, size: SizeRange(min(low, limits.low), highest, hint)}
    )


def unite_sizes(program: Program, kept: str, gone: str) -> None:
    """Merge two named sizes that were equal at capture, for inputs that must agree.

    Args:
        program: changed in place; its values, inputs and constraints refer only to ``kept`` afterwards.
        kept: the name that stays.
        gone: the name that goes.
    """
    symbols = {name: symbol for symbol, name in program.symbols.items()}
    substitution = {symbols[gone]: symbols[kept]}

    def united(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(united(item) for item in value)
        if isinstance(value, torch.SymInt) and symbols[gone] in value.node.expr.free_symbols:
            return symint(program.mode, value.node.expr.xreplace(substitution), value.node.hint)
        if isinstance(value, torch.Tensor) and any(united(size) is not size for size in value.shape):
            return program.fake([united(size) for size in value.shape], value.dtype)
        return value

    for node in program.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = united(node.meta["val"])
    signature, names = program.signature, frozenset(program.signature.sizes)
    constraints = [rename_in(text, names, gone, kept) for text in signature.constraints]
    signature.constraints = tuple(dict.fromkeys(text for text in constraints if text is not None))
    signature.sizes = {n: limits for n, limits in signature.sizes.items() if n != gone}
    del program.symbols[symbols[gone]]
    for name, spec in signature.inputs.items():
        shape = tuple(program.size_text(size) for size in program.input_nodes[name].meta["val"].shape)
        signature.inputs[name] = replace(spec, shape=shape)
    program.changed()


def standing_at(program: Program, dial: str, value: float) -> Program:
    """Return a copy in which a run-time setting has another default.

    Raises:
        UsageError: there is no such setting, or the value is out of its range.
    """
    settings_of(program, {dial: value})
    result = program.copy()
    result.dials[dial] = replace(result.dials[dial], default=float(value))
    return result


def remove_dial(program: Program, name: str) -> None:
    """Remove a run-time setting that is no longer used."""
    node = program.input_nodes[name]
    if node.users:
        raise UsageError(f"run-time setting {name} is still read by {next(iter(node.users)).name}")
    program.graph.erase_node(node)
    del program.dials[name]
    program.changed()


def settings_of(program: Program, values: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return the value of each run-time setting: of those values, or its default.

    Raises:
        UsageError: there is no such setting, or a value is out of its range.
    """
    for name in values:
        if name not in program.dials:
            raise UsageError(
                f"the program has no run-time setting {name!r}",
                hint=f"it has {', '.join(program.dials) or 'none'}",
            )
    settings = {}
    for name, dial in program.dials.items():
        value = float(values.get(name, dial.default))
        if not dial.low <= value <= dial.high:
            raise UsageError(
                f"run-time setting {name} is {value}, but its range is {dial.low} to {dial.high}"
            )
        settings[name] = torch.tensor(value, dtype=torch.float64)
    return settings
