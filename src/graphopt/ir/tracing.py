"""Write rewrites as ordinary functions of tensors: torch calls on nodes become nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from .errors import UsageError
from .infer import infer
from .schema import arguments as bound_arguments

if TYPE_CHECKING:
    from .editor import Editor

_OPERATORS = {
    "__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__matmul__": "matmul",
    "__pow__": "pow", "__neg__": "neg", "__and__": "bitwise_and", "__or__": "bitwise_or",
    "__eq__": "eq", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
}  # fmt: skip
_REFLECTED = {"__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub"}
_RENAMED = {"truediv": "div", "concat": "cat", "concatenate": "cat", "view": "reshape", "absolute": "abs"}
_IGNORED = {"_stacklevel", "inplace", "out", "training"}


def packet_of(function: Any) -> OpOverloadPacket:
    """Return the ATen operator that a torch function, or a tensor's method by its name, stands for.

    Raises:
        UsageError: there is none of that name.
    """
    if isinstance(function, OpOverload):
        owner: OpOverloadPacket = function.overloadpacket
        return owner
    if isinstance(function, OpOverloadPacket):
        return function
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    name = _RENAMED.get(name.strip("_"), _OPERATORS.get(name, name))
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        raise UsageError(
            f"{name} has no ATen operator of that name",
            hint="write the pattern or replacement with torch functions such as torch.add or F.linear",
        )
    return packet


def clean_arguments(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop the arguments that exist in Python only, and name the rest as the operator does."""
    if inspect.isfunction(function) and function.__module__ == "torch.nn.functional":
        bound = inspect.signature(function).bind(*args, **kwargs)
        kwargs, args = dict(bound.arguments), ()
    kwargs = {k: v for k, v in kwargs.items() if k not in _IGNORED}
    if "input" in kwargs:
        if function is torch.nn.functional.embedding:
            kwargs["indices"] = kwargs.pop("input")
        elif not _takes(packet_of(function), "input"):
            kwargs["self"] = kwargs.pop("input")
    return args, kwargs


def _takes(packet: OpOverloadPacket, name: str) -> bool:
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())  # type: ignore[no-untyped-call]
    return any(argument.name == name for schema in schemas for argument in schema.arguments)


def _accepts(kind: str, value: Any) -> bool:
    if kind.endswith("?"):
        return value is None or _accepts(kind[:-1], value)
    if isinstance(value, (fx.Node, Value)):
        held = value.meta.get("val") if isinstance(value, fx.Node) else value.node.meta.get("val")
        if kind in ("int", "SymInt", "number"):
            return isinstance(held, (int, torch.SymInt))
        return kind == "Tensor" and isinstance(held, torch.Tensor)
    if kind == "Tensor":
        return False
    if kind in ("int", "SymInt"):
        return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, (int, float, complex))
    if kind == "float":
        return isinstance(value, (int, float))
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind.endswith("]"):
        inner = kind[: kind.index("[")]
        if isinstance(value, (int, torch.SymInt)) and kind[-2] != "[":
            return inner in ("int", "SymInt")
        return isinstance(value, (list, tuple)) and all(_accepts(inner, item) for item in value)
    return True


def _kind(argument: Any) -> str:
    text = str(argument.real_type)
    optional = text.startswith("Optional[")
    text = text.removeprefix("Optional[").removesuffix("]") if optional else text
    if text.startswith("List["):
        size = argument.N if argument.N is not None else ""
        text = text.removeprefix("List[").removesuffix("]") + f"[{size}]"
    return text + "?" if optional else text


def choose_overload(packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpOverload:
    """Return the first overload whose schema accepts the arguments."""
    for relaxed in (False, True):
        for name in packet.overloads():  # type: ignore[no-untyped-call]
            overload = getattr(packet, name)
            listed = overload._schema.arguments
            if "out" in name or overload._schema.is_mutable or name.endswith("_mode"):
                continue
            positional = [a for a in listed if not a.kwarg_only]
            if len(args) > len(positional) or any(k not in {a.name for a in listed} for k in kwargs):
                continue
            given = {a.name: v for a, v in zip(positional, args, strict=False)} | kwargs
            if any(a.name not in given and not a.has_default_value() for a in listed):
                continue
            kinds = {a.name: _kind(a) for a in listed}
            if all(
                _accepts(kinds[k], v) or (relaxed and kinds[k] == "Tensor" and isinstance(v, (int, float)))
                for k, v in given.items()
            ):
                assert isinstance(overload, OpOverload)
                return overload
    raise UsageError(f"no overload of {packet} takes these arguments: {args} {kwargs}")


class Value:
    """A node of the graph, usable like a tensor: operators, methods and torch functions insert nodes."""

    def __init__(self, editor: Editor, node: fx.Node):
        self.editor = editor
        self.node = node

    @property
    def shape(self) -> Any:
        """Sizes, known or symbolic."""
        return self.node.meta["val"].shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        dtype = self.node.meta["val"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def T(self) -> Value:
        """Transpose of a matrix."""
        result = apply(self.editor, torch.ops.aten.permute, (self, [1, 0]), {})
        assert isinstance(result, Value)
        return result

    @property
    def mT(self) -> Value:
        """The last two dimensions swapped."""
        result = apply(self.editor, torch.ops.aten.mT, (self,), {})
        assert isinstance(result, Value)
        return result

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """One size or all."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        editor = _find_editor(args) or _find_editor(tuple((kwargs or {}).values()))
        assert editor is not None
        args, kwargs = clean_arguments(function, args, kwargs or {})
        return apply(editor, packet_of(function), args, kwargs)

    def __getitem__(self, index: Any) -> Value:
        result: Value = self
        dim = 0
        for item in index if isinstance(index, tuple) else (index,):
            if item is Ellipsis:
                rest = sum(1 for i in index if i is not Ellipsis and i is not None)
                dim = result.dim() - rest
            elif item is None:
                result = apply(self.editor, torch.ops.aten.unsqueeze, (result, dim), {})
                dim += 1
            elif isinstance(item, slice):
                if item != slice(None):
                    stop = 2**63 - 1 if item.stop is None else item.stop
                    span = (result, dim, item.start or 0, stop, item.step or 1)
                    result = apply(self.editor, torch.ops.aten.slice, span, {})
                dim += 1
            else:
                result = apply(self.editor, torch.ops.aten.select, (result, dim, item), {})
        return result

    def __rtruediv__(self, other: float) -> Any:
        inverse = self.reciprocal()
        return inverse if other == 1 else inverse * other

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        packet = packet_of(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if (
                name in ("reshape", "view", "permute", "expand", "repeat", "flip")
                and args
                and not isinstance(args[0], (list, tuple))
            ):
                args = (list(args),)
            return apply(self.editor, packet, (self, *args), kwargs)

        return method


def _binary(name: str, reflected: bool) -> Callable[..., Any]:
    def operate(self: Value, *others: Any) -> Any:
        operands = (*others, self) if reflected else (self, *others)
        packet = getattr(torch.ops.aten, name)
        if reflected and not isinstance(others[0], Value):
            operands = (self, *others)
        return apply(self.editor, packet, operands, {})

    return operate


for _name, _operator in _OPERATORS.items():
    setattr(Value, _name, _binary(_operator, False))
for _name, _operator in _REFLECTED.items():
    setattr(Value, _name, _binary(_operator, True))
Value.__hash__ = object.__hash__  # type: ignore[method-assign]


def _find_editor(values: Any) -> Editor | None:
    for value in values:
        if isinstance(value, Value):
            return value.editor
        if isinstance(value, (list, tuple)):
            found = _find_editor(value)
            if found is not None:
                return found
    return None


def wrap(editor: Editor, argument: Any) -> Any:
    """Replace nodes by values."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(wrap(editor, item) for item in argument)
    return Value(editor, argument) if isinstance(argument, fx.Node) else argument


def unwrap(argument: Any) -> Any:
    """Replace values by nodes."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(unwrap(item) for item in argument)
    if isinstance(argument, Value):
        return argument.node
    return argument


SWAPS = {
    "aten.transpose": None,
    "aten.swapaxes": None,
    "aten.swapdims": None,
    "aten.t": (-2, -1),
    "aten.mT": (-2, -1),
}
SPLITS = ("aten.split", "aten.chunk")
# calls that canonicalisation takes out of every graph
NOTHING = ("aten.contiguous", "aten.clone", "aten.detach", "aten.alias")


def swapped(rank: int, first: int, second: int) -> list[int]:
    """Return the permutation that swaps two dimensions."""
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order


def _in_dialect(editor: Editor, overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return operator and arguments as canonicalisation spells them, or None where that is how they are."""
    name = str(overload.overloadpacket)
    if (name not in SWAPS and name not in SPLITS) or not args or not isinstance(args[0], fx.Node):
        return None
    given = dict(zip((a.name for a in overload._schema.arguments), args, strict=False)) | kwargs
    if name in SWAPS:
        values = list(given.values())
        rank = args[0].meta["val"].dim()
        first, second = SWAPS[name] or (int(values[1]), int(values[2]))
        return (torch.ops.aten.permute.default, args[0], swapped(rank, first, second)) if rank > 1 else None
    dim = given.get("dim", 0)
    sizes = [part.shape[dim] for part in infer(editor.program.mode, overload, args, kwargs)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return (torch.ops.aten.split_with_sizes.default, args[0], sizes, dim)


def apply(editor: Editor, packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Insert a call of the fitting overload; several results come back as a tuple of values."""
    args = tuple(unwrap(editor.program.size_nodes(a)) for a in args)
    kwargs = {k: unwrap(editor.program.size_nodes(v)) for k, v in kwargs.items()}
    if str(packet) == "aten.add" and len(args) == 2 and not isinstance(args[0], fx.Node):
        args = (args[1], args[0])
    if str(packet) in NOTHING and args and isinstance(args[0], fx.Node):
        return Value(editor, args[0])
    overload = choose_overload(packet, args, kwargs)
    respelled = _in_dialect(editor, overload, args, kwargs)
    node = editor.call(*respelled) if respelled else editor.call(overload, *args, **kwargs)
    result = node.meta["val"]
    if isinstance(result, (list, tuple)):
        import operator

        return tuple(Value(editor, editor.call(operator.getitem, node, i)) for i in range(len(result)))
    return Value(editor, node)


__all__ = [
    "Value",
    "apply",
    "bound_arguments",
    "choose_overload",
    "clean_arguments",
    "packet_of",
    "unwrap",
    "wrap",
]
