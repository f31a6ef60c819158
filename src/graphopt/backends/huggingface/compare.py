"""Compare a written folder with its program: beyond every window, padded on both sides, in a wide type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.checking.comparison import relative_error
from ...ir.errors import LoweringError
from ...ir.operators.traits import has
from ...ir.program import Program
from ...ir.running.evaluate import needed_for
from ...ir.running.examples import example_inputs, marked_tokens
from ...ir.running.execute import interpret, memory_available
from ...ir.running.fold import EXACT, fold
from ...ir.running.retype import Widened, retyped, widen
from ...ir.schema import arguments, is_operator
from ...ir.structure import leaf_names, rebuild
from ...ir.weights import TensorSource, numel
from .layers import configurations, load

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest relative difference that reordering the same operations explains, by the type that both run in."""
_FLOPS = 3e11
_WINDOW = re.compile(r"window|chunk|local_attention|block_size|max_distance")
_ARITHMETIC = (
    "aten.sub", "aten.rsub", "aten.add", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.eq", "aten.ne",
    "aten.floor_divide", "aten.div", "aten.remainder", "aten.clamp", "aten.minimum",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One set of inputs to compare on; ``mask`` has the positions that count, by the size of the values."""

    label: str
    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None


def wide_type(program: Program) -> torch.dtype:
    """Return the type in which a folder is compared: weights stored in fewer bits are widened on both sides.

    In the stored type, rounding would hide errors.
    """
    outputs = (getattr(v, "meta", {}).get("val") for v in program.outputs.values())
    double = any(isinstance(v, torch.Tensor) and v.dtype is torch.float64 for v in outputs)
    return torch.float64 if double else torch.float32


def reach(program: Program) -> int:
    """Return the largest number that positions are compared with: a window, chunk or distance.

    The configuration counts too, so that a window that the program lost by mistake does not shorten the comparison.
    """
    reaches = [1]
    for _, config in configurations(load(program.origin.config)):
        numbers = ((k, v) for k, v in vars(config).items() if _WINDOW.search(k) and "layer" not in k)
        reaches.extend(v for _, v in numbers if type(v) is int and v < 2**20)
    for node in program.nodes:
        if is_operator(node, "graphopt.attention"):
            reaches.append(int(arguments(node)["window"] or 1))
    reaches.extend(n for node in program.nodes if _of_positions(node) for n in _numbers(program, node))
    return max(reaches)


def _of_positions(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype.is_floating_point
        or not is_operator(node, *_ARITHMETIC)
    ):
        return False
    # counts of tokens are compared with counts of tokens
    position_inputs = [
        str(n.meta["input"]) for n in needed_for([node], ()) if n.op == "placeholder" and "input" in n.meta
    ]
    return not any(name.endswith("input_ids") for name in position_inputs)


def _numbers(program: Program, node: fx.Node) -> Iterator[int]:
    numbers: list[Any] = [*node.args, *node.kwargs.values()]
    for other in node.all_input_nodes:
        if other.name in program.weights and not other.meta["val"].dim():
            numbers.append(program.weights[other.name].source.load().item())
    for number in numbers:
        if isinstance(number, (int, float)) and not isinstance(number, bool) and 1 < abs(number) < 2**20:
            yield math.ceil(abs(number))


def cases(program: Program) -> tuple[list[Case], int]:
    """Return inputs to compare on, and the number of tokens needed to reach past every window.

    If that many would take too long, the inputs are short.
    """
    target_length, length = reach(program) + 5, 9
    needed = max(
        (
            min(target_length, limits.high or target_length)
            for name, limits in program.signature.sizes.items()
            if _is_length(name)
        ),
        default=0,
    )
    if length < needed and _affordable(program, needed):
        length = needed
    hints = {n: limits.hint for n, limits in program.signature.sizes.items()}
    least = max((count for _, count in marked_tokens(program, hints).values()), default=0)
    length = max(length, least + 5) if least else length
    sizes = {n: length for n in program.signature.sizes if _is_length(n)}
    if length > 9:
        # two lengths, so that values of one are not mistaken for values of the other
        sizes |= {n: length - 1 for n in sizes if n.startswith("decoder")}
        sizes |= {n: 1 for n in program.signature.sizes if n.startswith("batch")} if length > 500 else {}
    else:
        sizes = {}
    return list(_padded(program, sizes)), needed if length < needed else 0


def fixed_inputs(program: Program) -> dict[str, torch.Tensor]:
    """Return the tensors whose values a program was captured for, which transformers takes as inputs."""
    structures = program.signature.parameters
    return {
        name: torch.tensor(rebuild(structure, {}))
        for name, structure in structures.items()
        if "list" in structure and not any(leaf_names(structure))
    }


def _is_length(name: str) -> bool:
    return "sequence" in name


def _padded(program: Program, sizes: dict[str, int]) -> Iterator[Case]:
    inputs = example_inputs(program, sizes, padding="none")
    masks = [n for n, v in inputs.items() if "mask" in n and v.dim() == 2 and not v.dtype.is_floating_point]
    if not masks:
        yield Case("", inputs, None)
        return
    for side in ("right", "left"):
        padded = dict(inputs)
        for name in masks:
            mask = inputs[name].clone()
            hidden = min(3, mask.shape[1] // 3)
            mask[0, mask.shape[1] - hidden :] = 0 if side == "right" else 1
            mask[0, :hidden] = 0 if side == "left" else 1
            padded[name] = mask
        yield Case(f" padded {side}", padded, padded.get("attention_mask"))


def _affordable(program: Program, length: int) -> bool:
    """Return whether inputs of this length run in seconds and in a small part of the memory."""
    weights = sum(numel(w.source.shape) for w in program.weights.values())
    attentions = [n for n in program.nodes if is_operator(n, "graphopt.attention")]
    heads = sum(int(arguments(n)["q"].meta["val"].shape[1]) for n in attentions)
    widest = max((int(arguments(n)["q"].meta["val"].shape[1]) for n in attentions), default=1)
    work = 2 * weights * length + 4 * heads * length**2 * 64
    memory = 4 * 5 * widest * length**2 + 16 * length * max(
        (int(s) for v in program.outputs.values() if isinstance(t := getattr(v, "meta", {}).get("val"), torch.Tensor)
         for s in t.shape[-1:] if isinstance(s, int)), default=1
    )  # fmt: skip
    return work < _FLOPS and memory < min(memory_available() // 6, 3 << 30)


class Reference:
    """The program's outputs, computed in a wide type from the weights as they are stored."""

    def __init__(self, program: Program, dtype: torch.dtype | None = None):
        self.program, self.dtype = program, dtype or wide_type(program)
        # folded first: stored weights are rounded before they are widened
        self._wide = retyped(fold(program), self.dtype, shapes=False)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the outputs; weights are loaded one at a time."""
        widened = {name: widen(value, self.dtype) for name, value in inputs.items()}
        values = interpret(self._wide, widened)
        return {name: values[name] for name in self.program.outputs}

    def limit(self, case: Case) -> float:
        """Return the largest relative difference that rounding explains, also of stored weights that are computed."""
        least = LIMITS[self.dtype]
        rounded = [
            n
            for n in self.program.checkpoint.values()
            if _arithmetic(n) and _unit(n.meta["val"].dtype) > 1e-6
        ]
        if not rounded:
            return least
        shaken = self._wide.copy()
        shaken.weights = {
            name: weight.with_source(_Perturbed(weight.source, number))
            if isinstance(weight.source, Widened) else weight
            for number, (name, weight) in enumerate(shaken.weights.items())
        }  # fmt: skip
        widened = {name: widen(value, self.dtype) for name, value in case.inputs.items()}
        errors = differences(self.program, case, self(case.inputs), interpret(shaken, widened))
        return max(least, 4 * max(errors.values()))


def _arithmetic(node: fx.Node) -> bool:
    return any(n.op == "call_function" and not has(n, EXACT) for n in needed_for([node], ()))


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


@dataclass(frozen=True)
class _Perturbed:
    """A source whose values are off by up to half a step of their stored type."""

    source: TensorSource
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        value = self.source.load()
        assert isinstance(self.source, Widened)
        step = _unit(self.source.source.dtype) / 2
        generator = torch.Generator().manual_seed(self.seed)
        return value * (1 + step * (2 * torch.rand(value.shape, generator=generator) - 1))


def differences(
    program: Program, case: Case, expected: dict[str, Any], actual: dict[str, Any]
) -> dict[str, float]:
    """Return the relative error of each output.

    Raises:
        LoweringError: the folder's model does not return an output of the program.
    """
    errors = {}
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            continue
        other = actual.get(name)
        if other is None:
            raise LoweringError(
                f"the program returns {name}, for which a folder of {program.origin.model_class.partition(':')[2]} "
                f"has no place: it returns {', '.join(sorted(actual))}",
                hint="remove that output before writing the folder, or use program.save or program.lower",
            )
        mask = case.mask
        if mask is not None and value.dim() >= 2 and value.shape[:2] == mask.shape == other.shape[:2]:
            value, other = value[mask.bool()], other[mask.bool()]
        errors[name] = relative_error(other, value)
    if not errors:
        raise LoweringError("the program returns no tensor, so that there is nothing to compare a folder by")
    return errors


def require_same_attention(program: Program, again: Program) -> None:
    """Compare what each attention sees, if inputs that reach past it would take too long.

    Raises:
        LoweringError: an attention of the folder's model sees other positions.
    """
    seen_before, seen_after = _visible_positions(program), _visible_positions(again)
    for number, (first, other) in enumerate(zip(seen_before, seen_after, strict=False)):
        if first != other:
            raise LoweringError(
                f"attention {number} of the folder's model sees {other}, the program's {first}: "
                "the configuration gives its layers other windows",
                hint="a Hugging Face folder cannot hold this program; use program.save or program.lower",
            )
    if len(seen_before) != len(seen_after):
        raise LoweringError(
            f"the folder's model has {len(seen_after)} attentions, the program has {len(seen_before)}"
        )


def _visible_positions(program: Program) -> list[tuple[Any, ...]]:
    visibilities = []
    for node in program.nodes:
        if is_operator(node, "graphopt.attention"):
            args = arguments(node)
            needed = needed_for([n for n in (args["bias"], args["visible"]) if n is not None], ())
            numbers = sorted(v for n in needed if _of_positions(n) for v in _numbers(program, n))
            visibilities.append((args["causal"], args["window"], *numbers))
    return visibilities


__all__ = [
    "LIMITS",
    "Case",
    "Reference",
    "cases",
    "differences",
    "reach",
    "require_same_attention",
    "wide_type",
]
