"""Recognition of attention masks by running the nodes that compute them on small inputs.

Models compute masks in many different ways, but a mask that depends only on sizes and a padding mask is a function of
positions. It is compared with causal masks, windows and padding on several inputs, so no particular way has to be
known.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..infer import same_size
from ..operators.attention import visible_keys
from ..running.examples import rows_of
from ..running.execute import interpret
from ..schema import arguments, is_operator
from ..sizes import expression, parse_size
from .constants import constant, depends_on
from .windows import HIDDEN, Run, candidate_windows, shortened

if TYPE_CHECKING:
    from ..program import Program

_SHORT, _LONGEST, _LONGEST_TABLE, _CONFIRMED = 64, 1500, 4200, 5000
_WALK = 4000


@dataclass(frozen=True)
class MaskMeaning:
    """A mask as arguments of attention; ``key_mask`` is the name of the padding mask input, if there is one."""

    causal: bool
    window: int | None
    key_mask: str | None


@dataclass
class _Case:
    inputs: dict[str, torch.Tensor]
    padding: torch.Tensor | None
    batch: int
    length: int


def mask_meaning(program: Program, mask: fx.Node) -> MaskMeaning | None:
    """Return the meaning of a mask, or None if it is not recognised or depends on more than padding.

    Args:
        program: the program the mask is computed in.
        mask: boolean (true where seen) or added to scores, broadcastable to (batch, heads, queries, keys).
    """
    sources = depends_on(mask)
    if any(n.name in program.weights and program.weights[n.name].trainable for n in sources):
        return None
    inputs = {str(n.meta["input"]): n for n in sources if n.name not in program.weights}
    paddings = [None, *(name for name, n in inputs.items() if _is_padding(n))]
    windows = candidate_windows(program, mask)

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = interpret(program, values, record=[mask], stop=True)[mask.name]
        return value

    reach = _table_length(program, sources)
    if reach is not None and reach > _LONGEST_TABLE:
        return None
    longest = max(windows, default=0)
    short = shortened(program, mask, _SHORT) if longest > _SHORT and reach is None else None
    if short is None:
        # recognising a window takes an input longer than the window
        if longest + 3 > _LONGEST:
            return None
        return _search(program, mask, run, inputs, paddings, windows, reach)
    run_short, candidates, stands_for = short
    meaning = _search(program, mask, run_short, inputs, paddings, candidates, None)
    if meaning is None:
        return None
    if meaning.window is not None:
        near = [s for s in stands_for if abs(meaning.window - s) <= 1]
        if near:
            meaning = replace(meaning, window=stands_for[near[0]] + meaning.window - near[0])
    return meaning if _confirmed(program, mask, run, inputs, meaning) else None


def _confirmed(
    program: Program, mask: fx.Node, run: Run, inputs: dict[str, fx.Node], meaning: MaskMeaning
) -> bool:
    """Tell whether the original mask agrees with the meaning found for short windows: on few tokens and past its window."""
    few = _evaluate(program, mask, run, inputs, meaning.key_mask, 9)
    if not few or not all(_agrees(meaning, case, value) for case, value in few):
        return False
    if meaning.window is None or meaning.window > _CONFIRMED:
        return True
    cases = _cases(program, inputs, meaning.key_mask, meaning.window + 4)[-1:]
    return all(_agrees(meaning, case, value) for case, value in _run_cases(run, cases))


def _search(
    program: Program,
    mask: fx.Node,
    run: Run,
    inputs: dict[str, fx.Node],
    paddings: list[str | None],
    windows: list[int],
    reach: int | None,
) -> MaskMeaning | None:
    for key_mask in reversed(paddings):
        cases = _evaluate(program, mask, run, inputs, key_mask, 9)
        if not cases:
            continue
        if reach is not None:
            # a window in a table may show only at the end of the table
            table_cases = _evaluate(program, mask, run, inputs, key_mask, reach, few=True)
            windows = sorted({*windows, *(w for w in (_widest(v) for _, v in table_cases) if 0 < w < reach)})
            cases = cases + table_cases
        for causal, window in itertools.product((True, False), [None, *windows]):
            meaning = MaskMeaning(causal, window, key_mask)
            if all(_agrees(meaning, case, value) for case, value in cases):
                if not windows or (reach is not None and reach > max(windows)):
                    return meaning
                # on a short input, a long window looks like none, as does a window with some always visible first keys
                longer = _evaluate(program, mask, run, inputs, key_mask, 2 * max(windows) + 5)
                if all(_agrees(meaning, case, value) for case, value in longer):
                    return meaning
    for key_mask, length in itertools.product(reversed(paddings), sorted({2 * w + 5 for w in windows})):
        cases = _evaluate(program, mask, run, inputs, key_mask, length)
        for causal, window in itertools.product((True, False), windows):
            meaning = MaskMeaning(causal, window, key_mask)
            if cases and length > window and all(_agrees(meaning, c, v) for c, v in cases):
                return meaning
    return None


def _is_padding(node: fx.Node) -> bool:
    value = node.meta["val"]
    return value.dim() == 2 and not value.dtype.is_floating_point


def _table_length(program: Program, sources: set[fx.Node]) -> int | None:
    """Return the length of the tables that a mask is sliced from, or None where there is none."""
    shapes = [program.weights[n.name].source.shape for n in sources if n.name in program.weights]
    return max((s[-1] for s in shapes if len(s) >= 2 and s[-1] == s[-2] > 1), default=None)


def _widest(value: torch.Tensor) -> int:
    """Return the largest number of keys that a query sees."""
    seen = value if value.dtype is torch.bool else value > HIDDEN
    return int(seen.sum(-1).max()) if seen.dim() and seen.numel() else 0


def _evaluate(
    program: Program,
    mask: fx.Node,
    run: Run,
    inputs: dict[str, fx.Node],
    key_mask: str | None,
    length: int,
    *,
    few: bool = False,
) -> list[tuple[_Case, torch.Tensor]]:
    span = _span(program, mask, length)
    results = _run_cases(run, _cases(program, inputs, key_mask, span)[: 1 if few else None])
    unequal_case = _unequal_case(program, mask, inputs, key_mask, length)
    if unequal_case is not None:
        unequal_results = _run_cases(run, [unequal_case])
        return [*results, *unequal_results] if unequal_results else []
    return results


def _span(program: Program, mask: fx.Node, length: int) -> int:
    """Return a length of inputs at which a mask has at least so many keys: convolutions may make few of many."""
    keys = mask.meta["val"].shape[-1] if mask.meta["val"].dim() else length
    if not isinstance(keys, torch.SymInt) or expression(keys).is_symbol:
        return length
    return next(
        (n for n in range(length, _WALK) if _value(program, keys, n - 2) >= length),
        length,
    )


def _value(program: Program, size: torch.SymInt, number: int) -> int:
    return int(expression(size).subs(dict.fromkeys(program.symbols, number)))


def _run_cases(run: Run, cases: list[_Case]) -> list[tuple[_Case, torch.Tensor]]:
    results = []
    for case in cases:
        try:
            value = run(case.inputs)
        except (RuntimeError, IndexError, ValueError):
            # a table of fixed size, or sizes that this graph does not accept
            continue
        results.append((case, value))
    return results


def _unequal_case(
    program: Program, mask: fx.Node, inputs: dict[str, fx.Node], key_mask: str | None, length: int
) -> _Case | None:
    """Return a case with different numbers of queries and keys, if these sizes are independent."""
    shape = mask.meta["val"].shape
    varying = [size for size in shape[-2:] if isinstance(size, torch.SymInt)]
    if len(shape) < 2 or not varying or any(isinstance(s, int) and s == 1 for s in shape[-2:]):
        return None
    if same_size(shape[-2], shape[-1]):
        return None
    symbols = {name: symbol for symbol, name in program.symbols.items()}
    values = {symbol: length + 2 * i for i, symbol in enumerate(sorted(symbols.values(), key=str))}
    for name in inputs:
        first = program.signature.inputs[name].shape[:1]
        values.update(dict.fromkeys(parse_size(first[0], symbols).free_symbols, 2) if first else {})
    case_inputs, padding = {}, None
    generator = torch.Generator().manual_seed(1)
    for name in inputs:
        spec = program.signature.inputs[name]
        size = [int(parse_size(s, symbols, name).subs(values)) for s in spec.shape]
        if name == key_mask:
            padding = torch.rand(size, generator=generator) > 0.3
            case_inputs[name] = padding.to(spec.dtype)
        elif "position" in name:
            case_inputs[name] = torch.arange(size[-1], dtype=spec.dtype).expand(size).contiguous()
        else:
            case_inputs[name] = torch.ones(size, dtype=spec.dtype)
    queries = int(expression(shape[-2]).subs(values))
    return _Case(case_inputs, padding, 2, queries)


def _cases(program: Program, inputs: dict[str, fx.Node], key_mask: str | None, length: int) -> list[_Case]:
    cases = []
    generator = torch.Generator().manual_seed(0)
    dynamic = program.signature.sizes
    for batch, span in ((2, length), (1, max(2, length - 2))):
        paddings: list[torch.Tensor | None] = [None]
        if key_mask is not None:
            full = torch.ones(batch, span, dtype=torch.bool)
            left, right, holes = full.clone(), full.clone(), full.clone()
            left[0, : span // 3] = False
            right[0, -(span // 3 or 1) :] = False
            holes[-1] = torch.rand(span, generator=generator) > 0.4
            holes[-1, 0] = True
            paddings = [full, left, right, holes]
        for padding in paddings:
            values = {}
            shape = None
            for name, node in inputs.items():
                spec = program.signature.inputs[name]
                shape = [
                    s if isinstance(s, int) else (batch if i == 0 else span) for i, s in enumerate(spec.shape)
                ]
                fixed = all(isinstance(s, int) for s in spec.shape)
                if name == key_mask:
                    assert padding is not None
                    if fixed and list(shape) != [batch, span]:
                        return _fixed_cases(program, inputs, key_mask)
                    # token ids are not only zeros and ones
                    drawn = torch.randint(1, rows_of(program, node), padding.shape, generator=generator)
                    values[name] = (padding * drawn).to(spec.dtype)
                elif (spec.fill is not None and spec.fill.rule.startswith("positions")) or "position" in name:
                    values[name] = torch.arange(shape[-1], dtype=spec.dtype).expand(shape).contiguous()
                elif spec.dtype.is_floating_point:
                    values[name] = torch.randn(shape, generator=generator).to(spec.dtype)
                else:
                    values[name] = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
            if inputs and not dynamic and shape is not None and len(shape) >= 2:
                cases.append(
                    _Case(values, None if padding is None else padding[:, : shape[1]], shape[0], shape[1])
                )
            else:
                cases.append(_Case(values, padding, batch, span))
        if not dynamic:
            break
    return cases


def _fixed_cases(program: Program, inputs: dict[str, fx.Node], key_mask: str) -> list[_Case]:
    """Return cases with different paddings at the only size that a program without dynamic sizes accepts."""
    shape = [int(s) for s in program.signature.inputs[key_mask].shape]
    cases = []
    for hide in (
        slice(0, 0),
        slice(0, max(1, shape[1] // 3)),
        slice(shape[1] - max(1, shape[1] // 3), shape[1]),
    ):
        padding = torch.ones(shape, dtype=torch.bool)
        padding[0, hide] = False
        values = {}
        for name in inputs:
            spec = program.signature.inputs[name]
            size = [int(s) for s in spec.shape]
            if name == key_mask:
                values[name] = padding.to(spec.dtype)
            elif "position" in name:
                values[name] = torch.arange(size[-1], dtype=spec.dtype).expand(size).contiguous()
            else:
                values[name] = torch.ones(size, dtype=spec.dtype)
        cases.append(_Case(values, padding, shape[0], shape[1]))
    return cases


def _agrees(meaning: MaskMeaning, case: _Case, value: torch.Tensor) -> bool:
    if value.dim() < 2 or (value.shape[-2] not in (1, case.length) and value.shape[-2] != value.shape[-1]):
        return False
    queries, keys = (value.shape[-2] if value.shape[-2] != 1 else value.shape[-1]), value.shape[-1]
    seen = value if value.dtype is torch.bool else value > HIDDEN
    if value.dtype is not torch.bool and bool((value[seen] != 0).any()):
        return False
    padding = case.padding if meaning.key_mask is not None else None
    if padding is not None and padding.shape[1] != keys:
        return False
    expected = visible_keys(queries, keys, padding, None, meaning.causal, meaning.window, value.device)
    if expected is None:
        expected = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    while seen.dim() < 4:
        seen = seen.unsqueeze(0)
    try:
        both = torch.broadcast_tensors(seen, expected, torch.ones(queries, keys))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    seen, expected, _ = both
    same = (seen == expected).all(-1)
    if (
        case.padding is not None
        and queries == case.padding.shape[1]
        and seen.shape[0] == case.padding.shape[0]
    ):
        # padded positions may see no keys or all keys; their results never reach valid positions
        idle = ~case.padding[:, None, :] & (seen.all(-1) | ~seen.any(-1))
        same = same | idle
    return bool(same.all())


def split_mask(program: Program, mask: fx.Node) -> tuple[MaskMeaning | None, list[Any]]:
    """Return the meaning of the part of a mask that hides positions, and the terms that are added to scores.

    ``a + b``, ``where(seen, bias, hidden)`` and ``bias.masked_fill(...)`` are split; a mask that is not
    recognised is returned as a term.
    """
    meaning = mask_meaning(program, mask)
    if meaning is not None:
        return meaning, []
    if is_operator(mask, "aten.add") and not mask.kwargs and len(mask.args) == 2:
        for pure, bias in (mask.args, mask.args[::-1]):
            if isinstance(pure, fx.Node) and isinstance(bias, fx.Node):
                meaning = mask_meaning(program, pure)
                if meaning is not None:
                    return meaning, [bias]
    seen, bias = _where(program, mask)
    if isinstance(seen, fx.Node) and isinstance(bias, fx.Node):
        meaning = mask_meaning(program, seen)
        if meaning is not None:
            return meaning, [bias]
    return None, [mask]


def _where(program: Program, mask: fx.Node) -> tuple[Any, Any]:
    """Return condition and bias of a ``where`` or ``masked_fill`` with a number that hides; (None, None) otherwise."""
    if not is_operator(mask, "aten.where", "aten.masked_fill"):
        return None, None
    args = arguments(mask)
    filled = is_operator(mask, "aten.masked_fill")
    low = constant(program, args["value"] if filled else args["other"])
    if low is None or low > HIDDEN:
        return None, None
    if not filled:
        return args["condition"], args["self"]
    with program.edit.before(mask):
        return program.edit.call(torch.ops.aten.bitwise_not.default, args["mask"]), args["self"]
