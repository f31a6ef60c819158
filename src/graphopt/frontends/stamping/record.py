"""A record of one run of a model on tensors without values: what each of its repeated layers calls, on what."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from ...ir.compat import FakeTensor, TorchDispatchMode, exporting
from ...ir.errors import GraphoptError
from ...ir.schema import is_mutable
from ...ir.weights import digest

FEWEST_LAYERS = 3
"""Lists with fewer children are not worth recording."""

_OUTSIDE = -1
Origin = tuple[int, int, int]
"""Which call made a value: number of the layer or -1, number of the call there, number of the result."""


class CannotStamp(GraphoptError):
    """Why a model's layers must all be exported."""


@dataclass
class Layer:
    """One layer as it was called.

    ``key`` is equal for layers that do the same on their own weights. ``inputs`` and ``outputs`` are the flattened
    arguments and results of the call; ``weights`` names what it read.
    """

    number: int
    list_name: str
    name: str
    module: nn.Module
    calls: list[Any] = field(default_factory=list)
    weights: dict[str, None] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    input_structure: TreeSpec | None = None
    output_structure: TreeSpec | None = None
    key: Any = None


@dataclass
class Record:
    """The layers of a model in the order in which they were called, and who reads each value that crosses a border."""

    layers: list[Layer]
    readers: dict[Origin, set[int]]
    made_by: dict[int, Origin]
    kept: list[torch.Tensor]


def repeated_lists(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return the outermost lists of at least three children with parameters, as (name, child) by name of the list."""
    found: dict[str, list[tuple[str, nn.Module]]] = {}

    def look(module: nn.Module, name: str) -> None:
        children = [(f"{name}.{n}" if name else n, c) for n, c in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) >= FEWEST_LAYERS:
            distinct = len({id(c) for _, c in children}) == len(children)
            if distinct and all(any(True for _ in c.parameters()) for _, c in children):
                found[name] = children
                return
        for child_name, child in children:
            look(child, child_name)

    look(model, "")
    return found


def record(
    model: nn.Module, example: Mapping[str, Any], buffers: Mapping[str, torch.Tensor] | None = None
) -> Record:
    """Run a model once on tensors without values and record its repeated layers.

    Args:
        model: in evaluation mode; its tensors are replaced during the run and put back.
        example: inputs by parameter name; only shapes and types matter.
        buffers: values of the buffers, if the model's own have none.

    Raises:
        CannotStamp: the model has no repeated layers, or does not run without values.
    """
    lists = repeated_lists(model)
    if not lists:
        raise CannotStamp("it has no list of at least three layers")
    recorder = _Recorder(model, lists)
    hooks = recorder.hooks()
    try:
        with (
            _without_values(model, recorder, buffers or {}),
            torch.no_grad(),
            exporting(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            inputs = tree_map(recorder.input, dict(example))
            with _Data(recorder), _Calls(recorder):
                result = model(**inputs)
        recorder.read_by_caller(result)
    except CannotStamp:
        raise
    except Exception as error:  # whatever a model does that needs values
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CannotStamp(
            f"it does not run on tensors without values: {type(error).__name__}: {first}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.finished()


@contextlib.contextmanager
def _without_values(
    model: nn.Module, recorder: _Recorder, buffers: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Put all parameters and buffers on the meta device while the block runs.

    Whatever the run assigns to attributes of modules, such as tables that are kept for the next call, is undone.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    contents = [
        (v, copy.copy(v)) for _, values in before for v in values.values() if isinstance(v, (dict, list, set))
    ]
    replaced: dict[int, torch.Tensor] = {}
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for leaf, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    name = f"{path}.{leaf}" if path else leaf
                    # a module with two names has one table, which is seen twice
                    if id(tensor) not in recorder.stored:
                        if id(tensor) not in replaced:
                            bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                            replaced[id(tensor)] = (
                                nn.Parameter(bare, requires_grad=False)
                                if isinstance(tensor, nn.Parameter)
                                else bare
                            )
                        table[leaf] = replaced[id(tensor)]
                        recorder.weight(name, table[leaf], buffers.get(name, tensor))
                    else:
                        recorder.weight(name, tensor, recorder.stored[id(tensor)])
        yield
    finally:
        for module, values in before:
            vars(module).clear()
            vars(module).update(values)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


class _Recorder:
    def __init__(self, model: nn.Module, lists: Mapping[str, list[tuple[str, nn.Module]]]):
        self.lists = lists
        self.layers: list[Layer] = []
        self.current: Layer | None = None
        self.outside_calls = 0
        self.origins: dict[int, Origin] = {}
        self.names: dict[int, list[str]] = {}
        self.stored: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, str] = {}
        self.readers: dict[Origin, set[int]] = {}
        self.forms: dict[Any, Any] = {}
        # ids stay unique while their tensors live
        self.kept: list[Any] = []

    # -- borders of layers --------------------------------------------------------------------------------

    def hooks(self) -> list[Any]:
        handles = []
        for list_name, children in self.lists.items():
            for name, child in children:
                handles += [
                    child.register_forward_pre_hook(
                        self.entering(list_name, name), with_kwargs=True, prepend=True
                    ),
                    child.register_forward_hook(self.leaving, with_kwargs=True),
                ]
        return handles

    def entering(self, list_name: str, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.current is not None:
                raise CannotStamp(f"{name} is called within {self.current.name}")
            self.current = Layer(len(self.layers), list_name, name, module)
            self.layers.append(self.current)
            self.current.inputs, self.current.input_structure = tree_flatten((args, kwargs))
            self.kept.append(self.current.inputs)

        return enter

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        layer = self.current
        assert layer is not None
        layer.outputs, layer.output_structure = tree_flatten(result)
        self.kept.append(layer.outputs)
        self.current = None

    # -- tensors ------------------------------------------------------------------------------------------

    def weight(self, name: str, bare: torch.Tensor, stored: torch.Tensor) -> None:
        self.names.setdefault(id(bare), []).append(name)
        self.stored[id(bare)] = stored
        self.kept.append(bare)

    def input(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        bare = torch.empty(value.shape, dtype=value.dtype, device="meta")
        self.made(bare, 0)
        self.outside_calls += 1
        return bare

    def made(self, value: torch.Tensor, result: int) -> None:
        layer = self.current
        number = _OUTSIDE if layer is None else layer.number
        call = self.outside_calls if layer is None else len(layer.calls)
        self.origins[id(value)] = (number, call, result)
        self.kept.append(value)

    def reference(self, value: torch.Tensor) -> Any:
        layer = self.current
        names = self.names.get(id(value))
        if names is not None:
            return self._weight_reference(value, names)
        origin = self.origins.get(id(value))
        if origin is None:
            return self._unregistered(value)
        number = _OUTSIDE if layer is None else layer.number
        if origin[0] == number and layer is not None:
            return ("own", origin[1], origin[2])
        self.readers.setdefault(origin, set()).add(number)
        return ("from", origin)

    def _unregistered(self, value: torch.Tensor) -> Any:
        """Return what a tensor is that no operator made and that is no weight."""
        if not value.is_meta:
            return ("constant", self._hash(value))
        # a list as index becomes a tensor that no operator shows; its numbers were recorded before
        layer = self.current
        if layer is not None and not (layer.calls and layer.calls[-1][0] == "data"):
            raise CannotStamp(f"{layer.name} reads a value that nothing made")
        return ("data", tuple(value.shape), value.dtype)

    def _weight_reference(self, value: torch.Tensor, names: list[str]) -> Any:
        layer = self.current
        prefix = f"{layer.name}." if layer is not None else ""
        own = next((n for n in names if prefix and n.startswith(prefix)), None)
        stored = self.stored[id(value)]
        unknown = isinstance(stored, nn.Parameter) or stored.is_meta or isinstance(stored, FakeTensor)
        values = "" if unknown else self._hash(stored)
        kind = (tuple(stored.shape), stored.dtype, stored.requires_grad, values)
        if layer is None:
            return ("weight", names[0], *kind)
        if own is not None:
            if not all(n.startswith(prefix) for n in names):
                raise CannotStamp(f"{own} is also {next(n for n in names if not n.startswith(prefix))}")
            layer.weights[own] = None
            return ("own weight", own.removeprefix(prefix), *kind)
        return ("weight", names[0], *kind)

    def _hash(self, value: torch.Tensor) -> str:
        if id(value) not in self.hashes:
            self.hashes[id(value)] = digest(value)
            self.kept.append(value)
        return self.hashes[id(value)]

    # -- calls --------------------------------------------------------------------------------------------

    def argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.reference(value)
        if isinstance(value, (list, tuple)):
            return tuple(self.argument(item) for item in value)
        # True == 1 == 1.0, but they are different arguments; NaN differs from itself
        return (type(value), repr(value) if isinstance(value, float) else value)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.current
        operands = (
            function,
            self.argument(args),
            *((k, self.argument(v)) for k, v in sorted(kwargs.items())),
        )
        if is_mutable(function):
            bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
            result = function(*bare_args, **bare_kwargs)
            for value in _written(function, bare_args, bare_kwargs):
                origin = self.origins.get(id(value), (_OUTSIDE, 0, 0))
                if layer is not None and origin[0] != layer.number:
                    raise CannotStamp(f"{layer.name} writes to a value from outside")
        else:
            result = self.inferred(function, args, kwargs)
        for number, value in enumerate(tree_flatten(result)[0]):
            if isinstance(value, torch.Tensor):
                self.made(value, number)
        if layer is None:
            self.outside_calls += 1
        else:
            layer.calls.append(operands)
        return result

    def inferred(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the results without values; those of equal layers are inferred once, which is most of a run's time."""
        key = (function, _form(args), tuple((n, _form(v)) for n, v in kwargs.items()))
        known = self.forms.get(key)
        if known is None:
            bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
            result = function(*bare_args, **bare_kwargs)
            if all(isinstance(v, torch.Tensor) or v is None for v in tree_flatten(result)[0]):
                self.forms[key] = _form(result)
            return result
        return _formed(known)

    def data(self, values: Any) -> None:
        """Record numbers that become a tensor: without values, the tensor does not show them."""
        if self.current is not None:
            self.current.calls.append(("data", repr(values)))

    # -- the end ------------------------------------------------------------------------------------------

    def read_by_caller(self, result: Any) -> None:
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and id(value) in self.origins:
                self.readers.setdefault(self.origins[id(value)], set()).add(_OUTSIDE)

    def finished(self) -> Record:
        calls: dict[str, list[str]] = {}
        for layer in self.layers:
            calls.setdefault(layer.list_name, []).append(layer.name)
        unusual = [n for n, called in calls.items() if called != [name for name, _ in self.lists[n]]]
        if unusual:
            raise CannotStamp(f"the children of {unusual[0]} are not called once each and in order")
        names = [layer.list_name for layer in self.layers]
        if len(list(groupby(names))) != len(set(names)):
            raise CannotStamp("the layers of several lists are called in turn")
        if not self.layers:
            raise CannotStamp("no list of layers is called")
        record = Record(self.layers, self.readers, self.origins, self.kept)
        for layer in self.layers:
            layer.key = _key(record, layer)
        _settle_first(record)
        return record


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a call writes to."""
    written = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [v for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]
    return written


def _form(value: Any) -> Any:
    """Return sizes, type and strides in place of tensors; plain values are themselves, with their types."""
    if isinstance(value, torch.Tensor):
        return (torch.Tensor, tuple(value.shape), value.dtype, value.stride())
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_form(item) for item in value))
    return (type(value), repr(value) if isinstance(value, float) else value)


def _formed(form: Any) -> Any:
    if form[0] is torch.Tensor:
        return torch.empty_strided(form[1], form[3], dtype=form[2], device="meta")
    if issubclass(form[0], (list, tuple)):
        return form[0](_formed(item) for item in form[1])
    return form[1]


def _bare(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_like(value, device="meta")
    return value


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operator to a recorder."""

    def __init__(self, recorder: _Recorder):
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.call(func, args, kwargs or {})


_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class _Data(TorchFunctionMode):
    """Tells a recorder the numbers of which a model makes tensors."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MAKERS:
            given = args[0] if args else (kwargs or {}).get("data")
            if not isinstance(given, torch.Tensor):
                self.recorder.data(given)
        elif func in _INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = [part for part in index if isinstance(part, (list, np.ndarray))]
            if lists:
                self.recorder.data(lists)
        return func(*args, **(kwargs or {}))


# -- keys -------------------------------------------------------------------------------------------------


def _key(record: Record, layer: Layer) -> Any:
    """Return what a layer does: its calls, the values it takes from outside, and those that others take from it."""
    streams: dict[Origin, int] = {}

    def settled(value: Any) -> Any:
        if isinstance(value, tuple):
            if len(value) == 2 and value[0] == "from":
                origin = value[1]
                # the stream comes from the layer before and goes to this one alone
                before = layer.number - 1
                if origin[0] >= 0 and origin[0] == before and record.readers[origin] == {layer.number}:
                    return ("stream", streams.setdefault(origin, len(streams)))
                return ("from", origin)
            return tuple(settled(item) for item in value)
        return value

    taken = sorted(origin[1:] for origin in record.readers if origin[0] == layer.number)
    return (layer.list_name, tuple(settled(call) for call in layer.calls), tuple(taken))


def _settle_first(record: Record) -> None:
    """Give the first layer of each list the key of a later one if only the origin of the stream differs."""
    previous = ""
    for layer in record.layers:
        if layer.list_name != previous:
            for other in record.layers:
                if other.list_name == layer.list_name and other is not layer:
                    streams: dict[Any, Any] = {}
                    if other.key != layer.key and _same_but_stream(
                        record, layer, layer.key, other.key, streams
                    ):
                        layer.key = other.key
                        break
        previous = layer.list_name


def _same_but_stream(record: Record, layer: Layer, one: Any, other: Any, streams: dict[Any, Any]) -> bool:
    if isinstance(other, tuple) and len(other) == 2 and other[0] == "stream":
        if not (isinstance(one, tuple) and len(one) == 2 and one[0] == "from"):
            return bool(one == other)
        alone = record.readers[one[1]] <= {layer.number}
        return alone and streams.setdefault(other, one) == one and len(set(streams.values())) == len(streams)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(
            _same_but_stream(record, layer, a, b, streams) for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)
