"""Copies of a program for lowering: with fixed sizes, in float32, under their own fake mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.compat import add_symbol, fake_tensor, new_fake_mode, symint
from ...ir.constraints import constraints_with
from ...ir.errors import LoweringError, VerificationError
from ...ir.infer import infer
from ...ir.program import Program
from ...ir.sizes import expression, format_size
from ...ir.weights import TensorSource
from ..checking.sizes import namesake, static_sizes


def fixed_sizes(program: Program, sizes: Mapping[str, int], *, everything: bool) -> dict[str, int]:
    """Return the sizes that become numbers: the given ones, their namesakes, and with ``everything`` all others.

    Raises:
        LoweringError: a size that the program does not have.
    """
    unknown = [name for name in sizes if name not in program.signature.sizes]
    if unknown:
        names = ", ".join(program.signature.sizes) or "none"
        raise LoweringError(f"the program has no size {unknown[0]!r}", hint=f"its sizes: {names}")
    values = static_sizes(program, sizes)
    return {n: v for n, v in values.items() if everything or n in sizes or namesake(n) in sizes}


def limits_of(program: Program) -> tuple[str, ...]:
    """Return the constraints on dynamic sizes, beyond being at least 1."""
    rows = []
    for name, limits in program.signature.sizes.items():
        if limits.low > 1:
            rows.append(f"{name} >= {limits.low}")
        if limits.high is not None:
            rows.append(f"{name} <= {limits.high}")
    return (*rows, *program.signature.constraints)


def with_sizes(program: Program, sizes: Mapping[str, int], *, float32: bool = False) -> Program:
    """Return a copy of the program in which some sizes are numbers, with all values inferred anew.

    The copy has its own fake mode, so that what an exporter learns about sizes does not reach ``program``.

    Args:
        program: not changed.
        sizes: values by name of size; sizes not named stay dynamic, under their own names.
        float32: widen bfloat16 to float32, weights included.

    Raises:
        LoweringError: a value is out of its size's range, or an operator does not accept it.
    """
    _check(program, sizes)
    other = program.copy()
    other.mode = new_fake_mode()
    other.symbols = {}
    names = frozenset(program.signature.sizes)
    other.signature.constraints = constraints_with(program.signature.constraints, names, sizes)
    other.signature.sizes = {n: s for n, s in program.signature.sizes.items() if n not in sizes}
    moved = _Mover(other, float32)
    for symbol, name in program.symbols.items():
        if name in sizes:
            moved.symbols[symbol] = sympy.Integer(sizes[name])
        else:
            limits = program.signature.sizes[name]
            moved.symbols[symbol] = add_symbol(other.mode, name, limits.low, limits.high, limits.hint)
            moved.hints[moved.symbols[symbol]] = limits.hint
            other.symbols[moved.symbols[symbol]] = name
    _move_values(other, moved, bool(sizes))
    for name, node in other.input_nodes.items():
        if name in other.signature.inputs:
            value = node.meta["val"]
            shape = tuple(format_size(size, other.symbols) for size in value.shape)
            spec = other.signature.inputs[name]
            other.signature.inputs[name] = replace(spec, shape=shape, dtype=value.dtype)
    other.changed()
    return other


def _check(program: Program, sizes: Mapping[str, int]) -> None:
    for name, value in sizes.items():
        limits = program.signature.sizes[name]
        if value < limits.low or (limits.high is not None and value > limits.high):
            upper = "" if limits.high is None else f" to {limits.high}"
            raise LoweringError(
                f"{name} cannot be {value}: the program accepts {limits.low}{upper or ' and more'}"
            )
    broken = program.signature.broken_constraint(sizes)
    if broken is not None:
        listing = ", ".join(f"{n}={v}" for n, v in sizes.items() if n in broken)
        raise LoweringError(
            f"{listing}: the program accepts only sizes with {broken}", hint="choose sizes that keep this"
        )


class _Mover:
    """Converts fake values to the mode of another program."""

    def __init__(self, program: Program, float32: bool):
        self.mode = program.mode
        self.float32 = float32
        self.symbols: dict[sympy.Symbol, sympy.Expr] = {}
        self.hints: dict[sympy.Symbol, int] = {}
        self._sizes: dict[sympy.Expr, int | torch.SymInt] = {}

    def size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        """Return a size with the new symbols or numbers."""
        if isinstance(size, int):
            return size
        value = expression(size)
        if value not in self._sizes:
            new = value.subs(self.symbols)
            if not new.free_symbols <= set(self.hints):
                raise LoweringError(
                    f"a size of the graph, {value}, does not depend on the sizes of its inputs"
                )
            self._sizes[value] = symint(self.mode, new, int(new.subs(self.hints)))
        return self._sizes[value]

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32 for bfloat16 if widening, else the type itself."""
        return torch.float32 if self.float32 and dtype == torch.bfloat16 else dtype

    def value(self, value: Any) -> Any:
        """Return a fake value in the new mode."""
        if isinstance(value, torch.Tensor):
            return fake_tensor(self.mode, [self.size(s) for s in value.shape], self.dtype(value.dtype))
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return self.size(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(item) for item in value)
        return value


def _move_values(program: Program, moved: _Mover, again: bool) -> None:
    """Give every node its value in the new mode and remove nodes of sizes that became numbers."""
    numbers: dict[fx.Node, int] = {}
    for node in list(program.graph.nodes):
        if node.op == "output":
            node.meta["val"] = tuple(n.meta["val"] for n in node.args[0])
            continue
        node.args = _arguments(node.args, numbers, moved.dtype)
        node.kwargs = _arguments(node.kwargs, numbers, moved.dtype)
        if node.op == "call_function" and again:
            node.meta["val"] = _inferred(program, node)
        else:
            node.meta["val"] = moved.value(node.meta["val"])
        if node.name in program.weights and moved.float32:
            _widen_weight(program, node)
        if node.op == "call_function" and isinstance(node.meta["val"], int):
            numbers[node] = node.meta["val"]
    for node in reversed(numbers):
        if not node.users:
            program.graph.erase_node(node)


def _inferred(program: Program, node: fx.Node) -> Any:
    try:
        value = infer(program.mode, node.target, node.args, dict(node.kwargs))
    except VerificationError as error:
        raise LoweringError(
            f"the program does not accept these sizes: {error.message}",
            node=node.name,
            source=program.source_line(node),
        ) from error
    return int(expression(value)) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, torch.SymInt) and bool(expression(value).is_Integer))


def _arguments(
    argument: Any, numbers: Mapping[fx.Node, int], dtype: Callable[[torch.dtype], torch.dtype]
) -> Any:
    if isinstance(argument, fx.Node):
        return numbers.get(argument, argument)
    if isinstance(argument, torch.dtype):
        return dtype(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_arguments(item, numbers, dtype) for item in argument)
    if isinstance(argument, dict):
        return {key: _arguments(item, numbers, dtype) for key, item in argument.items()}
    return argument


# -- float32 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widened:
    """A tensor read as float32."""

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the source."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def load(self) -> torch.Tensor:
        """Return the values in float32."""
        return self.source.load().to(torch.float32)


def _widen_weight(program: Program, node: fx.Node) -> None:
    weight = program.weights[node.name]
    if weight.source.dtype == torch.bfloat16:
        program.weights[node.name] = weight.with_source(Widened(weight.source))


def uses_bfloat16(program: Program) -> bool:
    """Return whether any value of the program is in bfloat16."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 for v in values)
