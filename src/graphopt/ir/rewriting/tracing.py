"""Recording of functions of tensors as graphs: each is run once on fake tensors.

Calls are recorded from torch's dispatcher, so overloads, methods, indexing and composite operators resolve as in
torch. Functions that cannot be recorded are refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..compat import FakeTensor, fresh, recording, refusing_guards
from ..errors import CaptureError, GraphoptError, UsageError, VerificationError
from ..infer import describe_value, infer, same_size, same_value
from ..program import Program
from ..schema import is_mutable, is_operator, operator_name
from ..signature import Signature
from ..sizes import expression
from ..weights import InMemory, Weight
from .cleanup import clean
from .functionalise import functionalise

_DATA_DEPENDENT = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
)
_COUNTED = ("aten.unbind", "aten.split", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk")
_ON_VALUES = (
    "which depends on values of tensors, and a graph holds only what is the same for all values",
    "choose between values with torch.where, and hide them with masks",
)


class _Piece(Program):
    """The graph of one function. Sizes that vary and constants are placeholders, like the operands."""

    def __init__(self, program: Program):
        super().__init__(fx.Graph(), program.mode, {}, Signature({}, {}, {"constant": None}))
        self.program = program
        self.symbols = program.symbols
        self.operands: list[fx.Node] = []
        self.sizes: dict[sympy.Expr, fx.Node] = {}
        self.constants: dict[int, tuple[fx.Node, torch.Tensor]] = {}

    def entry(self, name: str, value: Any) -> fx.Node:
        """Add a placeholder before all other nodes."""
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def size(self, value: torch.SymInt | torch.SymFloat) -> fx.Node:
        """Return the placeholder of a size that varies, or of a number computed from such sizes."""
        key = value.node.expr
        if key not in self.sizes:
            self.sizes[key] = self.entry("size", value)
        return self.sizes[key]

    def size_nodes(self, argument: Any) -> Any:
        """Replace symbolic sizes in an argument by placeholders."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.size_nodes(item) for item in argument)
        if isinstance(argument, torch.SymInt) and expression(argument).is_Integer:
            return int(expression(argument))
        return self.size(argument) if isinstance(argument, (torch.SymInt, torch.SymFloat)) else argument

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """Return the placeholder of a tensor that is not an argument of the function."""
        if id(tensor) not in self.constants:
            node = self.entry("constant", self.fake(tensor.shape, tensor.dtype))
            self.constants[id(tensor)] = node, tensor
            self.weights[node.name] = Weight(node.name, InMemory(tensor.detach()), kind="constant")
        return self.constants[id(tensor)][0]


class Trace:
    """A recorded function: its results, and the nodes that compute them from its operands."""

    def __init__(self, piece: _Piece, several: bool):
        self.piece = piece
        self.several = several
        self.placed: dict[fx.Node, fx.Node] = {}

    @property
    def results(self) -> list[fx.Node]:
        """Nodes of the recorded graph that are returned."""
        return list(self.piece.output_node.args[0])  # type: ignore[arg-type]

    def require(self, program: Program, replaced: Sequence[fx.Node], wanted: str) -> None:
        """Check that the results can replace these nodes.

        Raises:
            UsageError: there are more or fewer results.
            VerificationError: they differ in shape or type.
        """
        if len(self.results) != len(replaced):
            raise UsageError(f"the replacement returns {len(self.results)} values, {wanted}")
        for old, new in zip(replaced, self.results, strict=True):
            if not same_value(old.meta.get("val"), new.meta["val"]):
                raise VerificationError(
                    f"the replacement returns {describe_value(new.meta['val'])}, which cannot stand for "
                    f"{old.name} ({describe_value(old.meta.get('val'))})",
                    node=old.name,
                    source=program.source_line(old),
                    hint="return a tensor of the same shape and type, with .to(dtype) or reshape",
                )


class _Recording:
    """The nodes of the tensors that a function has seen so far, by identity."""

    def __init__(self, piece: _Piece):
        self.piece = piece
        self.node_by_tensor: dict[int, fx.Node] = {}
        self.alive: list[torch.Tensor] = []
        self.symbols = set(piece.symbols)

    def follow(self, node: fx.Node) -> torch.Tensor:
        """Return a new tensor object for a node: equal calls share one value, but tensors are mapped by identity."""
        tensor = fresh(self.piece.mode, node.meta["val"])
        self.alive.append(tensor)
        self.node_by_tensor[id(tensor)] = node
        return tensor

    def operand(self, argument: Any) -> Any:
        """Return the value that the function is called with for an argument."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.operand(item) for item in argument)
        if not isinstance(argument, fx.Node):
            return argument
        value = argument.meta["val"]
        if not isinstance(value, torch.Tensor):
            return value
        self.symbols.update(_symbols(value))
        node = self.piece.entry("operand", value)
        self.piece.operands.append(node)
        return self.follow(node)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a tensor; a tensor that was not recorded is a constant."""
        node = self.node_by_tensor.get(id(tensor))
        if node is not None:
            return node
        if isinstance(tensor, FakeTensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UsageError(
                f"the origin of a tensor of class {type(tensor).__name__} is not recorded",
                hint="do not use .data or tensors kept from an earlier call",
            )
        self.alive.append(tensor)
        return self.piece.constant(tensor)

    def literal(self, value: torch.Tensor) -> Any:
        """Return the number that torch wrapped as a tensor, or the tensor itself if it is not such a number."""
        node = self.node_of(value)
        while is_operator(node, "aten.lift_fresh") and not any(
            is_mutable(user.target) for user in node.users
        ):
            node = node.args[0]  # type: ignore[assignment]
        scalars = [
            tensor
            for placeholder, tensor in self.piece.constants.values()
            if placeholder is node and not tensor.dim()
        ]
        return scalars[0].item() if scalars and weight_of(self.piece.program, scalars[0]) is None else value

    def nodes(self, argument: Any) -> Any:
        """Replace tensors and varying sizes in an argument by nodes."""
        if isinstance(argument, torch.Tensor):
            return self.node_of(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.nodes(item) for item in argument)
        if isinstance(argument, torch.SymBool):
            raise UsageError(
                f"{argument} is not known: sizes in it vary",
                hint="decide nothing by a size that varies",
            )
        return self.piece.size_nodes(argument)

    def record(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append a call and return its value."""
        if target.namespace == "prim" or target is torch.ops.aten.promote_types.default:
            return target(*args, **kwargs)
        if target is torch.ops.aten.detach_.default:
            return args[0]
        _admit(target, args, kwargs)
        if target is torch.ops.aten.fill_.Tensor:
            # what y[0] = 1.0 writes; a number needs no tensor in the model
            target, args = torch.ops.aten.fill_.Scalar, (args[0], self.literal(args[1]))
            target = torch.ops.aten.fill_.Tensor if isinstance(args[1], torch.Tensor) else target
        node_arguments = self.nodes(args), {name: self.nodes(value) for name, value in kwargs.items()}
        counted = operator_name(target) in _COUNTED
        if counted:
            _require_count(self.piece, target, _bound_arguments(target, args, kwargs), None)
        try:
            value = infer(self.piece.mode, target, *node_arguments)
        except VerificationError as error:
            if type(error.__cause__).__name__ in _DATA_DEPENDENT:
                raise _value_dependent(target) from error
            raise
        if counted:
            _require_count(self.piece, target, _bound_arguments(target, args, kwargs), value)
        if isinstance(value, (int, torch.SymInt)) and operator_name(target).startswith("aten.sym_"):
            return value
        node = self.piece.graph.call_function(target, *node_arguments)
        node.meta["val"] = value
        if is_mutable(target):
            return args[0] if args else None
        return self.wrapped(target, node)

    def wrapped(self, target: Any, node: fx.Node) -> Any:
        """Return the tensors of a call's results."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            if not _symbols(value) <= self.symbols:
                raise _value_dependent(target)
            return self.follow(node)
        if isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value):
            parts = []
            for index, item in enumerate(value):
                part = self.piece.graph.call_function(operator.getitem, (node, index))
                part.meta["val"] = item
                parts.append(self.wrapped(target, part))
            return type(value)(parts) if type(value) in (list, tuple) else tuple(parts)
        raise _value_dependent(target)


def _require_count(piece: _Piece, target: Any, bound: dict[str, Any], parts: Sequence[Any] | None) -> None:
    """Refuse a split whose number of parts would follow from the example's size; checked before and after the call."""
    size, dim = bound["self"].shape[bound["dim"]], bound["dim"]
    if isinstance(size, int) or bound.get("chunks", 3) <= 2:
        return
    by_size = "chunks" in bound or "split_size" in bound
    if by_size and (parts is None or same_size(size, parts[0].shape[dim] * len(parts))):
        return
    raise UsageError(
        f"{operator_name(target)} of a dimension of size {piece.size_text(size)} returns a number of parts that "
        "depends on that size, which varies",
        hint="compute on the whole dimension, or split it into parts of known sizes: torch.split(x, [first, second])",
    )


def _symbols(value: torch.Tensor) -> set[Any]:
    return {
        s for size in value.shape if isinstance(size, torch.SymInt) for s in expression(size).free_symbols
    }


def _admit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse operators whose results cannot be recorded."""
    name = operator_name(target)
    if torch.Tag.data_dependent_output in target.tags or name in ("aten.item", "aten.is_nonzero"):
        raise _value_dependent(target)
    if torch.Tag.inplace_view in target.tags:
        raise UsageError(
            f"{name} changes the shape of a tensor in place",
            hint=f"use {name.removesuffix('_')}, which returns it",
        )
    if torch.Tag.nondeterministic_seeded in target.tags:
        bound = _bound_arguments(target, args, kwargs)
        off = bound.get("train", bound.get("training", True)) is False
        if not off and bound.get("p", bound.get("dropout_p", 1.0)) != 0.0:
            raise UsageError(
                f"{name} draws random numbers, and equal calls are recorded once",
                hint="draw before, and let the function read the tensor drawn",
            )


def _bound_arguments(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    listed = target._schema.arguments
    defaults = {a.name: a.default_value for a in listed if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in listed), args, strict=False)), **kwargs}


def _value_dependent(target: Any) -> UsageError:
    return UsageError(f"the function calls {operator_name(target)}, {_ON_VALUES[0]}", hint=_ON_VALUES[1])


def trace(program: Program, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Trace:
    """Record a function of tensors on the shapes and types of its arguments; the program is not changed.

    Args:
        program: the program that the arguments belong to.
        function: of as many arguments; called once, so it must have no side effects.
        arguments: nodes, plain values, and lists of them.

    Raises:
        UsageError: it branches on values or on sizes that vary, writes to an operand, draws random numbers, or
            returns anything but tensors.
        VerificationError: an operator in it does not accept its arguments.
    """
    piece = _Piece(program)
    recorder = _Recording(piece)
    operands = [recorder.operand(argument) for argument in arguments]
    name = getattr(function, "__name__", type(function).__name__)
    try:
        with refusing_guards(program.mode, UsageError, program.symbols), recording(recorder.record):
            returned = function(*operands)
    except GraphoptError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{name} cannot be recorded: {type(error).__name__}: {first}",
            hint="a replacement is an ordinary function of torch on tensors; it runs on tensors without values",
        ) from error
    several = isinstance(returned, (list, tuple))
    results = list(returned) if several else [returned]
    for result in results:
        if not isinstance(result, torch.Tensor):
            raise UsageError(
                f"{name} returns {type(result).__name__ if result is not None else 'None'}, "
                "and a replacement must return tensors",
                hint="end the function with return and the tensor",
            )
    nodes = tuple(recorder.node_of(result) for result in results)
    piece.graph.output(nodes).meta["val"] = tuple(node.meta["val"] for node in nodes)
    _simplify(piece, name)
    return Trace(piece, several)


def _simplify(piece: _Piece, name: str) -> None:
    try:
        functionalise(piece)
    except CaptureError as error:
        if "writes to a weight" in error.message or "writes to an input" in error.message:
            raise UsageError(
                f"{name} writes to one of its arguments: {error.message.split(' in place')[0]}",
                hint="write to a clone() of it, or use the operator without the underscore",
            ) from error
        raise UsageError(f"{name}: {error.message}", hint="compute a new tensor instead") from error
    clean(piece)


def weight_of(program: Program, tensor: torch.Tensor) -> fx.Node | None:
    """Return the weight that shares its memory with a tensor, if there is one."""
    for node in program.weight_nodes:
        source = program.weights[node.name].source
        if not isinstance(source, InMemory):
            continue
        stored = source.tensor
        same = (
            stored.dtype == tensor.dtype
            and stored.shape == tensor.shape
            and stored.stride() == tensor.stride()
        )
        if same and tensor.numel() and stored.data_ptr() == tensor.data_ptr():
            return node
    return None
