"""All private or unstable names of torch that graphopt depends on, in one place.

``tests/ir/test_compat.py`` fails when one of them changes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._export.verifier import load_verifier
from torch._guards import SLoc
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    ValueRangesSLoc,
    statically_known_true,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges
from torch.utils._traceback import CapturedTraceback

from .errors import GraphoptError, VerificationError
from .late_package import import_parts, run

__all__ = [
    "NEEDS_VALUES",
    "FakeTensor",
    "FakeTensorMode",
    "QuickDispatchMode",
    "Symbol",
    "add_symbol",
    "build_exported_program",
    "compile_package",
    "composite",
    "composite_kernels",
    "exporting",
    "fake_copy",
    "fake_tensor",
    "fresh",
    "guard_code",
    "import_tracer",
    "int4_packed",
    "int4_product",
    "is_plain_tensor",
    "is_recorded",
    "load_package",
    "new_fake_mode",
    "outside_tracing",
    "quick_onnx_export",
    "quiet_export",
    "quiet_failures",
    "recording",
    "recording_fixed_sizes",
    "refusing_guards",
    "size_guards",
    "sources_of",
    "surely_equal",
    "symbol_range",
    "symbolic_kernels",
    "symint",
    "undivided",
    "widen_symbol",
    "without_fake_cache",
    "without_guards",
]

Symbol = sympy.Symbol

NEEDS_VALUES: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)
"""Errors of a computation without memory whose result depends on values."""


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Compute with real tensors, whatever traces or fakes them around the context."""
    with _disable_current_modes():
        yield


def import_tracer() -> None:
    """Import what torch imports when it first makes a tensor without values: for a process that is graphopt's own.

    That asks for little of torch's compiler, all of which takes half as long as torch: the rest waits for who needs it.
    Kernels of tensors without values want to be left out of what is compiled, and without a compiler nothing is.
    """
    left_out: list[Any] = []

    def disable(
        function: Any = None, recursive: bool = True, *, wrapping: bool = True, **options: Any
    ) -> Any:
        # torch's own functions ask when they are first called, and keep what they are told where it can be taken back
        if wrapping or function is None:
            run(torch._dynamo)
            return vars(torch._dynamo)["disable"](function, recursive, wrapping=wrapping, **options)
        left_out.append(function)
        return function

    def ask_again() -> None:
        for function in left_out:
            vars(function).pop("__dynamo_disable", None)

    import_parts(
        "torch._dynamo",
        [f"torch._dynamo.{part}" for part in ("config", "exc", "utils")],
        ["torch.fx.experimental.validator"],
        {"disable": disable},
        ask_again,
    )


def new_fake_mode() -> FakeTensorMode:
    """Return a mode under which tensors have shapes and types, but no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    mode.cache_enabled = False  # ``infer`` remembers more cheaply
    return mode


def without_fake_cache() -> contextlib.AbstractContextManager[None]:
    """Return a context in which new fake modes do not cache fake values.

    With sizes that vary, caching a value costs more than computing it: without the cache, tracing two layers takes
    0.6 of the time, and 32 equal layers take the same time; only beyond that does the cache pay off.
    """
    from torch._dynamo import config

    patched: contextlib.AbstractContextManager[None] = config.patch(fake_tensor_cache_enabled=False)
    return patched


class QuickDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode whose handler is called directly: guarding it against compilation takes as long as a short one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@functools.lru_cache(maxsize=4096)
def composite(operator: Any) -> bool:
    """Tell whether an operator is defined by calls of others."""
    return isinstance(operator, torch._ops.OpOverload) and bool(operator._can_decompose())


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Hand operators that are defined by calls of others, such as linear, to dispatch modes as one call each.

    ``torch.inference_mode`` does so too, but its tensors refuse assignments to ``data``.
    """
    with torch._C._AutoDispatchBelowAutograd():
        yield


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Let code in the block believe that torch.export runs it: libraries then take the branches that are exported."""
    with _compiling_state_context():
        yield


def add_symbol(mode: FakeTensorMode, name: str, low: int, high: int | None, hint: int) -> sympy.Symbol:
    """Add a size symbol with its range and an example value to ``mode``; copies of a program share both."""
    env = mode.shape_env
    assert env is not None
    symbol = sympy.Symbol(name, integer=True, positive=True)
    if symbol in env.var_to_range:
        return symbol
    # older releases call the table of example values var_to_val
    (getattr(env, "add_backed_var_to_val", None) or env.add_var_to_val)(symbol, hint)
    upper = int_oo if high is None else high
    # torch specialises sizes of 0 and 1 while tracing; the traced graph runs at 1 nevertheless
    env.var_to_range[symbol] = ValueRanges(max(low, 2) if hint >= 2 else low, upper)
    # a guard can only narrow a range that has a source location
    location = SLoc("graphopt", None)
    env.var_to_range_sloc[symbol] = ValueRangesSLoc(location, location)
    # decompositions and ONNX export ask for the origin of a symbol
    env.var_to_stack[symbol] = CapturedTraceback.extract()  # type: ignore[no-untyped-call]
    return symbol


def symbol_range(mode: FakeTensorMode, symbol: sympy.Symbol) -> tuple[int, int | None, int]:
    """Return (lowest, highest or None, example value) of a size symbol."""
    env = mode.shape_env
    assert env is not None
    value_range = env.var_to_range[symbol]
    high = None if value_range.upper in (int_oo, sympy.oo) else int(value_range.upper)
    return (
        int(value_range.lower),
        high,
        int((getattr(env, "backed_var_to_val", None) or env.var_to_val)[symbol]),
    )


def size_guards(mode: FakeTensorMode) -> list[Any]:
    """Return the guards on sizes under ``mode``, as sympy relations between symbols that are still free."""
    env = mode.shape_env
    assert env is not None
    relations = []
    for guard in env.guards:
        relation = guard.expr
        for _ in range(len(env.replacements) + 1):
            replaced = relation.xreplace(env.replacements)
            if replaced == relation:
                break
            relation = replaced
        relations.append(relation)
    return relations


def guard_code(exported: ExportedProgram) -> list[str]:
    """Return the guards stored with an exported program that was read from a file, as torch's text."""
    return list(getattr(exported, "_guards_code", None) or [])


def widen_symbol(mode: FakeTensorMode, symbol: sympy.Symbol, low: int, high: int | None) -> None:
    """Widen the range of a size symbol that tracing narrowed; a range is never narrowed here."""
    env = mode.shape_env
    assert env is not None
    current = env.var_to_range[symbol]
    upper = int_oo if high is None else high
    # sizes of 0 and 1 stay special, as in add_symbol
    wide = ValueRanges(min(int(current.lower), max(low, 2)), max(current.upper, upper))
    if wide != current:
        env.var_to_range[symbol] = wide
        env._update_version_counter()


def is_recorded() -> bool:
    """Tell whether operators are currently being recorded in a graph."""
    return get_proxy_mode() is not None


def symbolic_kernels() -> contextlib.AbstractContextManager[None]:
    """Return a context that prefers implementations with symbolic sizes, as torch.export does while tracing."""
    return enable_python_dispatcher()


@contextlib.contextmanager
def recording_fixed_sizes() -> Iterator[dict[str, list[traceback.FrameSummary]]]:
    """Yield a table that gets, for each size that the tracer replaces by a number, the stack at that moment.

    Torch keeps one line for each, which often is its own.
    """
    stacks: dict[str, list[traceback.FrameSummary]] = {}
    replace = ShapeEnv._set_replacement

    def recording(env: ShapeEnv, symbol: sympy.Symbol, value: sympy.Expr, *args: Any, **kwargs: Any) -> None:
        if value.is_number:
            stacks.setdefault(str(symbol), list(traceback.extract_stack()))
        replace(env, symbol, value, *args, **kwargs)

    ShapeEnv._set_replacement = recording  # type: ignore[method-assign, assignment]
    try:
        yield stacks
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]


def sources_of(mode: FakeTensorMode) -> dict[str, list[str]]:
    """Return where each size symbol comes from, such as ``L['x'].size()[1]``."""
    env = mode.shape_env
    assert env is not None
    table = getattr(env, "var_to_sources", None) or getattr(env, "_var_to_sources", None) or {}
    return {
        str(symbol): [str(source.name() if callable(source.name) else source.name) for source in sources]
        for symbol, sources in table.items()
    }


@contextlib.contextmanager
def composite_kernels(kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Compute values of operators inside the block by other functions than torch's decompositions of them."""
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    before = {operator: dict(operator.py_kernels) for operator in kernels}
    try:
        for operator, kernel in kernels.items():
            operator.py_kernels.update(dict.fromkeys(keys, kernel))
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, table in before.items():
            operator.py_kernels.clear()
            operator.py_kernels.update(table)
            operator._dispatch_cache.clear()


@contextlib.contextmanager
def without_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Decide conditions on sizes by their example values inside the block, and discard the guards afterwards.

    The switch of the shape environment for that makes some operators return fixed sizes, so guards are removed
    afterwards instead.
    """
    env = mode.shape_env
    assert env is not None
    tables: list[Any] = [env.var_to_range, env.var_to_range_sloc, env.replacements, env.axioms, env.divisible]
    before = [table.copy() for table in tables]
    guards, unbacked = len(env.guards), len(env.pending_fresh_unbacked_symbols)
    refusing = vars(env).pop(_GUARDING, None)
    try:
        yield
    finally:
        if refusing is not None:
            vars(env)[_GUARDING] = refusing
        del env.pending_fresh_unbacked_symbols[unbacked:]
        if len(env.guards) != guards or tables != before:
            del env.guards[guards:]
            for table, old in zip(tables, before, strict=True):
                table.clear()
                table.update(old)
            _forget_answers(env)


def _forget_answers(env: ShapeEnv) -> None:
    """Clear cached decisions about sizes: by condition, by version and, since torch 2.13, on each size."""
    for function in vars(ShapeEnv).values():
        if isinstance(function, functools._lru_cache_wrapper):
            function.cache_clear()
    env._update_version_counter()
    env._version_counter += 1
    if hasattr(env, "_replacements_version_counter"):
        env._replacements_version_counter += 1


# the method that torch calls before it decides a condition on a varying size by its example value
_GUARDING = "_check_frozen"


@contextlib.contextmanager
def refusing_guards(
    mode: FakeTensorMode,
    error: type[GraphoptError] = VerificationError,
    names: Mapping[sympy.Symbol, str] | None = None,
) -> Iterator[None]:
    """Raise inside the block where code branches on a size that varies, instead of using the example's value.

    Inside :func:`without_guards`, where guards are discarded, this is allowed.

    Args:
        mode: the mode of the sizes.
        error: the exception class to raise.
        names: names of the sizes, for the message.
    """
    named = {symbol: sympy.Symbol(name) for symbol, name in (names or {}).items()}
    env = mode.shape_env
    assert env is not None
    before = vars(env).get(_GUARDING)

    def refuse(expression: sympy.Basic, answer: sympy.Basic) -> None:
        raise error(
            f"{expression.xreplace(named)} is not known: sizes in it vary (the example has {answer})",
            hint="do not branch on a size that varies; use -1 or a size read from a value",
        )

    vars(env)[_GUARDING] = refuse
    try:
        with _quiet("torch.fx.experimental.symbolic_shapes"):
            yield
    finally:
        if before is None:
            vars(env).pop(_GUARDING, None)
        else:
            vars(env)[_GUARDING] = before


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    import logging

    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Recorder(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls a function for each operator, before composite operators are decomposed.

    No other class of mode in torch's stack sees operators before decomposition.
    """

    def __init__(self, record: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]):
        super().__init__(None, "symbolic", pre_dispatch=True)  # type: ignore[arg-type]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(func, args, kwargs or {})

    def __sym_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


@contextlib.contextmanager
def recording(record: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Call ``record(operator, args, kwargs)`` instead of every operator that the block calls on tensors."""
    with torch.no_grad(), symbolic_kernels(), _Recorder(record):
        yield


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Suppress the traceback that torch prints for a call whose failure is expected and handled."""
    with _quiet("torch._subclasses.fake_tensor"):
        yield


def surely_equal(size: int | torch.SymInt, number: int) -> bool:
    """Tell whether a size equals a number for all values of its symbols, without adding a guard."""
    return bool(statically_known_true(size == number))


def symint(mode: FakeTensorMode, expression: sympy.Expr, hint: int) -> int | torch.SymInt:
    """Return ``expression`` as a size that fake tensors understand."""
    if expression.is_Integer:
        return int(expression)
    env = mode.shape_env
    assert env is not None
    return env.create_symintnode(expression, hint=hint)


def fake_tensor(
    mode: FakeTensorMode, shape: Sequence[int | torch.SymInt], dtype: torch.dtype, device: str = "cpu"
) -> FakeTensor:
    """Return a tensor of this shape and type without memory, belonging to ``mode``."""
    meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return FakeTensor(mode, meta, torch.device(device))


def fake_copy(mode: FakeTensorMode, value: torch.Tensor) -> FakeTensor:
    """Return a contiguous tensor of the shape and type of a model's tensor, a parameter if it is one.

    ``nn.Parameter`` would detach it, which takes ten times as long.
    """
    copied = fake_tensor(mode, value.shape, value.dtype)
    if isinstance(value, torch.nn.Parameter):
        copied._is_param = True
        copied.requires_grad_(value.requires_grad)
    return copied


def fresh(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """Return a new tensor object of the same shape, type and strides."""
    with mode:
        return value.detach()


def is_plain_tensor(value: object) -> bool:
    """Tell whether ``value`` holds data: not fake, functional or otherwise traced."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    # make_fx traces tensors that look like any other
    return plain and not is_recorded()


def build_exported_program(
    graph: fx.Graph,
    signature: ExportGraphSignature,
    state: dict[str, torch.Tensor],
    ranges: dict[sympy.Symbol, tuple[int, int | None]],
    example_kwargs: dict[str, Any],
    constants: dict[str, torch.Tensor],
    output_names: Sequence[str],
) -> ExportedProgram:
    """Wrap a lifted graph as a ``torch.export.ExportedProgram`` that takes keywords and returns a dict."""
    _, in_spec = tree_flatten(((), example_kwargs))
    _, out_spec = tree_flatten(dict.fromkeys(output_names, 0))
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    bounds = {s: ValueRanges(low, int_oo if high is None else high) for s, (low, high) in ranges.items()}
    return ExportedProgram(
        torch.nn.Module(),
        graph,
        signature,
        state,
        bounds,
        [ModuleCallEntry("", call)],
        ((), example_kwargs),
        {**constants},
        verifiers=[load_verifier("TRAINING")],
    )


@contextlib.contextmanager
def quiet_onnx_registration() -> Iterator[None]:
    """Suppress the exporter's messages about packages that are not needed here."""
    import logging

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


_ONNX_REGISTRIES: dict[Any, Any] = {}


@contextlib.contextmanager
def quick_onnx_export(mode: FakeTensorMode, symbols: Iterable[sympy.Symbol]) -> Iterator[None]:
    """Skip repeated work of the exporter inside the block, three quarters of the time for a few layers.

    Its table of translations is built once per process, since each build reads the source of some 500 functions. Its
    pass for type promotion no longer runs every operator for a value that the graph already has, except where two sizes
    have the same example, since running operators may show that they are one size.

    Args:
        mode: of the graph.
        symbols: of its sizes.
    """
    examples = [symbol_range(mode, symbol)[2] for symbol in symbols]
    apart = len(set(examples)) == len(examples)
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter: Any = type_promotion._TypePromotionInterpreter
    registry: Any = ONNXRegistry
    make, run_node = vars(registry)["from_torchlib"], interpreter.run_node

    def cached_registry(cls: Any, opset_version: int) -> Any:
        if (cls, opset_version) not in _ONNX_REGISTRIES:
            _ONNX_REGISTRIES[cls, opset_version] = make.__func__(cls, opset_version=opset_version)
        first = _ONNX_REGISTRIES[cls, opset_version]
        registry_copy = copy.copy(first)
        # each export adds its translations to these lists
        registry_copy.functions = {target: list(metas) for target, metas in first.functions.items()}
        return registry_copy

    def known_value(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta or not apart:
            return run_node(self, node)
        with self._set_current_node(node):
            rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    registry.from_torchlib, interpreter.run_node = classmethod(cached_registry), known_value
    try:
        yield
    finally:
        registry.from_torchlib, interpreter.run_node = make, run_node


def compile_package(exported: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Compile an exported program with AOTInductor, for the device that its tensors are on."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(exported, package_path=os.fspath(path))


def load_package(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Return a compiled package as a callable; its code is executed, so only load files that graphopt wrote."""
    from torch._inductor import aoti_load_package

    loaded: Callable[..., Any] = aoti_load_package(os.fspath(path))
    return loaded


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Suppress the output of torch.export, which prints an unfinished graph of hundreds of lines to standard error.

    The exception that it raises still describes the failure.
    """
    loggers = [
        logging.getLogger(name)
        for name in ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def int4_packed(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers in the order of :func:`int4_product`.

    Args:
        numbers: (outputs, inputs), int32 from 0 to 15; outputs a multiple of 16, inputs even.

    Returns:
        (outputs, inputs / 2), bytes whose order depends on the processor.
    """
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(numbers, 1)
    return packed


int4_product: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]
int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
