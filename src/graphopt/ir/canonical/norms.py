"""Recognition of written-out RMS norms and layer norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import fx

from ..infer import same_size
from ..rewriting.cleanup import replace_or_erase
from ..rewriting.match import Match, find
from ..rewriting.pattern import Either, Wild, call
from ..running.fold import depends_on_weights_alone
from ..schema import argument, arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten
_NARROW = (torch.float16, torch.bfloat16)


def _square(x: Any) -> Either:
    return Either((call("pow")(x, 2), call("square")(x), call("mul")(x, x)))


def _last(dims: Any) -> bool | str:
    return (isinstance(dims, (list, tuple)) and len(dims) == 1) or "normalised over several dimensions"


def _population(node: fx.Node) -> bool | str:
    args = arguments(node)
    is_population = args.get("unbiased") is False or args.get("correction") == 0
    return (
        is_population and args.get("keepdim") is True
    ) or "a variance of a sample, or without its dimension"


def _mean_square(square: Any) -> Any:
    return call("mean")(square, Wild("dims", _last), True)


def _scaled(wide: Any, variance: Any) -> Either:
    """Return the pattern of ``wide`` divided by the root of variance plus epsilon, in its usual spellings."""
    total = call("add")(variance, Wild("eps"))
    inverse = Either(
        (call("rsqrt")(total), call("pow")(total, -0.5), call("reciprocal")(call("sqrt")(total)))
    )
    return Either((call("mul")(wide, inverse), call("div")(wide, call("sqrt")(total))))


def _rms_pattern() -> Either:
    wide = Wild("wide")
    return _scaled(wide, _mean_square(_square(wide)))


def _layer_pattern() -> Either:
    wide = Wild("wide")
    mean = call("mean", shared=True)(wide, Wild("dims", _last), True)
    centred = call("sub", shared=True)(wide, mean)
    variance = call("var", loose=True, where=_population)(wide, Wild("dims", _last))
    return _scaled(centred, Either((_mean_square(_square(centred)), variance)))


def raise_norms(program: Program) -> None:
    """Replace written-out norms by ``graphopt.rms_norm`` and ``aten.layer_norm``."""
    for node in list(program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)):
        _fused(program, node)
    constant = depends_on_weights_alone(program)
    for match in find(program.graph, _layer_pattern()):
        _recognise(program, match, constant, centred=True)
    for match in find(program.graph, _rms_pattern()):
        _recognise(program, match, constant, centred=False)


def _fused(program: Program, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if len(node.args[1]) != 1:  # type: ignore[arg-type]
        return
    eps = argument(node, "eps")
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    with program.edit.before(node):
        new = program.edit.call(torch.ops.graphopt.rms_norm.default, x, argument(node, "weight"), eps)
    replace_or_erase(program, node, new)


def _recognise(program: Program, match: Match, constant: set[fx.Node], centred: bool) -> None:
    wide, eps = match["wide"], match["eps"]
    core = match.roots[0]
    dims = match["dims"]
    if not isinstance(wide, fx.Node) or not isinstance(eps, float):
        return
    if dims[0] not in (-1, wide.meta["val"].dim() - 1):
        return
    x, float32 = wide, False
    if is_operator(wide, "aten.to") and wide.meta["val"].dtype is torch.float32:
        source = wide.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype in _NARROW:
            x, float32 = source, True
    if not float32 and x.meta["val"].dtype not in _NARROW:
        float32 = True
    result, weight, bias, before_cast = _following(constant, core, x, centred)
    size = wide.meta["val"].shape[-1]
    with program.edit.before(result):
        if centred:
            shaped = _vector(program, weight, size), _vector(program, bias, size)
            new = program.edit.call(aten.layer_norm.default, x, program.size_nodes([size]), *shaped, eps)
        else:
            new = program.edit.call(
                torch.ops.graphopt.rms_norm.default,
                x,
                weight,
                eps,
                float32=float32,
                weight_before_cast=before_cast,
            )
    replace_or_erase(program, result, new)


def _vector(program: Program, weight: fx.Node | None, size: Any) -> fx.Node | None:
    if weight is None or weight.meta["val"].dim() == 1:
        return weight
    return program.edit.call(aten.reshape.default, weight, program.size_nodes([size]))


def _following(
    constant: set[fx.Node], core: fx.Node, x: fx.Node, centred: bool
) -> tuple[fx.Node, fx.Node | None, fx.Node | None, bool]:
    """Return the last node of a norm, its weight and bias, and whether the weight is applied before the cast."""
    result = core
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    cast_done = core.meta["val"].dtype == x.meta["val"].dtype
    before_cast = False
    size = core.meta["val"].shape[-1]

    def scale_of(other: Any) -> TypeGuard[fx.Node]:
        if not isinstance(other, fx.Node) or other not in constant:
            return False
        shape = other.meta["val"].shape
        return bool(shape) and same_size(shape[-1], size) and all(same_size(s, 1) for s in shape[:-1])

    while len(result.users) == 1:
        user = next(iter(result.users))
        operands = [a for a in user.args if a is not result]
        if is_operator(user, "aten.to") and not cast_done and user.meta["val"].dtype == x.meta["val"].dtype:
            cast_done = True
            before_cast = weight is not None
        elif (
            is_operator(user, "aten.mul") and weight is None and len(operands) == 1 and scale_of(operands[0])
        ):
            weight = operands[0]
        elif (
            is_operator(user, "aten.add")
            and centred
            and weight is not None
            and bias is None
            and not user.kwargs
            and len(operands) == 1
            and scale_of(operands[0])
        ):
            bias = operands[0]
        else:
            break
        result = user
    return result, weight, bias, before_cast
