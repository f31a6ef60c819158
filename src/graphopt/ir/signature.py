"""The signature of a program: inputs and outputs by name, structure, sizes, and defaults of optional inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch

from .constraints import parse_relation
from .errors import UsageError
from .sizes import parse_size
from .structure import Structure, flatten, leaf_names, rebuild

FillRule = Literal["ones", "zeros", "positions", "positions_from_mask", "following", "marks"]


@dataclass(frozen=True)
class Fill:
    """The default of an optional input: made from the size of another input, or from a mask.

    ``ones`` and ``zeros`` have the shape of ``like``. ``positions`` counts 0, 1, ... along the last
    dimension; ``positions_from_mask`` counts the ones of the mask ``like`` (masked positions get 1, as in the
    models that use it). ``following`` is ``like`` shifted by one, with a 0 at the end. ``marks`` is zeros, which mark
    every token as an ordinary one.
    """

    rule: FillRule
    like: str


@dataclass(frozen=True)
class Input:
    """An input tensor: flat name, type, sizes (numbers or names of sizes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    fill: Fill | None = None
    filled_positions_only: bool = False


@dataclass(frozen=True)
class SizeRange:
    """A named size: smallest, largest (None for no limit) and the value seen at capture."""

    low: int
    high: int | None
    hint: int


@dataclass
class Signature:
    """Inputs by parameter name, outputs by name, the named sizes they share, and constraints between sizes.

    ``constraints`` are texts such as ``sequence % 8 == 0``, for what ranges of single sizes cannot express.
    """

    inputs: dict[str, Input]
    parameters: dict[str, Structure]
    outputs: Structure
    sizes: dict[str, SizeRange] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()

    @property
    def output_names(self) -> list[str]:
        """Flat names of the outputs in order."""
        return list(leaf_names(self.outputs))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the value of each flat input, with defaults for those left out.

        Raises:
            UsageError: an input is unknown, missing, of another type or of a size the program does not accept.
        """
        by_name = dict(kwargs)
        names = list(self.parameters)
        if len(args) > len(names):
            raise UsageError(
                f"{len(args)} inputs given, but the program takes {len(names)}: {', '.join(names)}"
            )
        for name, value in zip(names, args, strict=False):
            if name in by_name:
                raise UsageError(f"input {name!r} is given twice, by position and by name")
            by_name[name] = value
        flat: dict[str, Any] = {}
        for name, value in by_name.items():
            if name not in self.parameters:
                raise UsageError(
                    f"the program takes no input {name!r}", hint=f"it takes {', '.join(names) or 'none'}"
                )
            if value is not None or "constant" in self.parameters[name]:
                flat.update(flatten(self.parameters[name], value, name))
        missing = [name for name, spec in self.inputs.items() if flat.get(name) is None and spec.fill is None]
        if missing:
            raise UsageError(
                f"missing input {', '.join(missing)}",
                hint=f"the program takes {', '.join(self.inputs)}",
            )
        self._check_sizes({n: v for n, v in flat.items() if v is not None})
        self._refuse_packed(flat)
        return {name: self._value(name, flat) for name in self.inputs}

    def _refuse_packed(self, flat: Mapping[str, Any]) -> None:
        """Refuse positions that restart where the model would treat them as packed sequences and no mask is given."""
        for name, spec in self.inputs.items():
            fill = spec.fill
            if not spec.filled_positions_only or fill is None or flat.get(name) is None:
                continue
            if any(flat.get(n) is not None for n in self.inputs if "mask" in n):
                continue
            positions = flat[name]
            if positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any()):
                raise UsageError(
                    f"{name} restarts or skips, which packs several sequences into one row; "
                    "this program was captured for one sequence a row",
                    hint="give attention_mask as well, or one sequence a row",
                )

    def _value(self, name: str, flat: dict[str, Any]) -> torch.Tensor:
        spec = self.inputs[name]
        value = flat.get(name)
        if value is None:
            assert spec.fill is not None
            value = make_fill(spec.fill, spec.dtype, self._value(spec.fill.like, flat))
            flat[name] = value
        assert isinstance(value, torch.Tensor)
        return value

    def _check_sizes(self, flat: Mapping[str, Any]) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for name, value in flat.items():
            spec = self.inputs[name]
            if not isinstance(value, torch.Tensor):
                raise UsageError(f"input {name!r} must be a tensor, not {type(value).__name__}")
            if value.dtype != spec.dtype:
                same_kind = value.dtype.is_floating_point == spec.dtype.is_floating_point
                if not (same_kind and value.dtype.is_floating_point):
                    raise UsageError(
                        f"input {name!r} is {value.dtype}, but the program takes {spec.dtype}",
                        hint=f"convert it with .to({spec.dtype})",
                    )
            if value.dim() != len(spec.shape):
                raise UsageError(
                    f"input {name!r} has {value.dim()} dimensions, but the program takes {len(spec.shape)}"
                )
            for dim, (size, expected) in enumerate(zip(value.shape, spec.shape, strict=True)):
                self._check_size(name, dim, int(size), expected, seen)
        self._check_expressions(flat, seen)
        sizes = {name: size for name, (size, _) in seen.items()}
        broken = self.broken_constraint(sizes)
        if broken is not None:
            values = ", ".join(f"{n} is {sizes[n]}" for n in sorted(sizes) if n in broken)
            raise UsageError(
                f"{values}: the program takes sizes with {broken} only",
                hint="the model branches on its sizes; capture it again with an example of these sizes",
            )

    def broken_constraint(self, sizes: Mapping[str, int]) -> str | None:
        """Return a constraint that the sizes violate, or None; constraints on other sizes are not considered."""
        names = frozenset(self.sizes)
        for text in self.constraints:
            relation = parse_relation(text, names)
            if relation.names <= set(sizes) and not relation.holds(sizes):
                return text
        return None

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether sizes are in their ranges and satisfy the constraints."""
        for name, size in sizes.items():
            limits = self.sizes[name]
            if size < limits.low or (limits.high is not None and size > limits.high):
                return False
        return self.broken_constraint(sizes) is None

    def nearest(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Return a value for each named size that the program accepts, near the wanted sizes.

        Sizes without a wanted value are those of the capture; so are all if no sizes near the wanted ones satisfy the
        constraints.
        """
        hints = {name: limits.hint for name, limits in self.sizes.items()}
        clamped = dict(hints)
        for name, limits in self.sizes.items():
            if name in wanted:
                high = wanted[name] if limits.high is None else limits.high
                clamped[name] = max(limits.low, min(wanted[name], high))
        if self.broken_constraint(clamped) is None:
            return clamped
        for name in self.sizes:
            for size in _around(clamped[name], hints[name]):
                if self.takes({**clamped, name: size}):
                    return {**clamped, name: size}
        # sizes that depend on each other are adjusted in turn
        adjusted = dict(hints)
        for name, size in clamped.items():
            for value in _around(size, hints[name]):
                if self.takes({**adjusted, name: value}):
                    adjusted[name] = value
                    break
        return adjusted

    def _check_size(
        self, name: str, dim: int, size: int, expected: int | str, seen: dict[str, tuple[int, str]]
    ) -> None:
        if isinstance(expected, int):
            if size != expected:
                raise UsageError(
                    f"input {name!r} has size {size} in dimension {dim}, "
                    f"but the program was captured for {expected} only",
                    hint="capture again with dynamic sizes to let it vary",
                )
            return
        if expected not in self.sizes:  # an expression of other sizes
            return
        limits = self.sizes[expected]
        again = "capture the model again with a larger or smaller example to let it vary further"
        if size < limits.low:
            raise UsageError(
                f"input {name!r}: {expected} is {size}, but the program takes {limits.low} or more",
                hint=again,
            )
        if limits.high is not None and size > limits.high:
            raise UsageError(
                f"input {name!r}: {expected} is {size}, but the program takes up to {limits.high}", hint=again
            )
        if expected in seen and seen[expected][0] != size:
            raise UsageError(
                f"{expected} is {size} in {name!r} and {seen[expected][0]} in {seen[expected][1]!r}"
            )
        seen[expected] = (size, name)

    def _check_expressions(self, flat: Mapping[str, Any], seen: Mapping[str, tuple[int, str]]) -> None:
        """Check the sizes that are computed from others, such as ``2*sequence``."""
        if all(isinstance(s, int) or s in self.sizes for name in flat for s in self.inputs[name].shape):
            return
        symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in self.sizes}
        values = {symbols[name]: size for name, (size, _) in seen.items()}
        for name, value in flat.items():
            for dim, (size, declared) in enumerate(zip(value.shape, self.inputs[name].shape, strict=True)):
                if isinstance(declared, int) or declared in self.sizes:
                    continue
                expected = parse_size(declared, symbols, f"input {name!r}").subs(values)
                if expected.is_Integer and int(expected) != int(size):
                    raise UsageError(
                        f"input {name!r} has size {int(size)} in dimension {dim}, "
                        f"which must be {declared} = {int(expected)}"
                    )

    def unflatten(self, values: Mapping[str, Any]) -> Any:
        """Return the outputs in the structure of the model's outputs."""
        return rebuild(self.outputs, values)


def _around(size: int, hint: int) -> list[int]:
    """Return sizes in the order they are tried: those near ``size``, then the one of the capture."""
    near = [size + step for distance in range(129) for step in (distance, -distance)]
    return [n for n in dict.fromkeys(near) if n > 0] + [hint]


def make_fill(fill: Fill, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return the default value of an input that was left out."""
    if fill.rule == "positions_from_mask":
        counted = like.long().cumsum(-1) - 1
        return counted.masked_fill(like == 0, 1).to(dtype)
    if fill.rule == "following":
        return torch.cat([like[:, 1:], torch.zeros_like(like[:, :1])], 1).to(dtype)
    shape, device = like.shape[:2], like.device
    if fill.rule == "ones":
        return torch.ones(shape, dtype=dtype, device=device)
    if fill.rule in ("zeros", "marks"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.arange(shape[-1], dtype=dtype, device=device).expand(shape).contiguous()
