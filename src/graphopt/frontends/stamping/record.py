"""A record of one run of a model on tensors without values: what each of its repeated layers calls, on what."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from ...ir.compat import FakeTensor, QuickDispatchMode, composite, exporting, undivided
from ...ir.errors import GraphoptError
from ...ir.schema import is_mutable
from ...ir.weights import digest
from .untouched import put_back

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
    arguments and results of the call; ``weights`` names what it read, ``crossing`` which calls read values of others.
    """

    number: int
    list_name: str
    name: str
    module: nn.Module
    calls: list[Any] = field(default_factory=list)
    crossing: list[int] = field(default_factory=list)
    weights: dict[str, None] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    input_structure: TreeSpec | None = None
    output_structure: TreeSpec | None = None
    key: Any = None


@dataclass
class Record:
    """The layers of a model in the order in which they were called, and who reads each value that crosses a border.

    ``outside`` are the calls between the layers, ``results`` what the model returned, ``foreign`` the names of weights
    of layers that something else reads too, and ``forms`` the results that calls had, by sizes and types of their operands.
    """

    layers: list[Layer]
    readers: dict[Origin, set[int]]
    made_by: dict[int, Origin]
    kept: list[torch.Tensor]
    outside: list[Any]
    results: list[Any]
    foreign: set[str]
    forms: dict[Any, Any]


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
    model: nn.Module,
    example: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor] | None = None,
    lists: Mapping[str, list[tuple[str, nn.Module]]] | None = None,
    forms: dict[Any, Any] | None = None,
) -> Record:
    """Run a model once on tensors without values and record its repeated layers.

    Args:
        model: in evaluation mode; its tensors are replaced during the run and put back.
        example: inputs by parameter name; only shapes and types matter.
        buffers: values of the buffers, if the model's own have none.
        lists: the layers, as :func:`repeated_lists` returns them, which finds them if None.
        forms: what an earlier record of the model inferred.

    Raises:
        CannotStamp: the model has no repeated layers, or does not run without values.
    """
    lists = repeated_lists(model) if lists is None else lists
    if not lists:
        raise CannotStamp("it has no list of at least three layers")
    recorder = _Recorder(lists, {} if forms is None else forms)
    hooks = recorder.hooks()
    try:
        with (
            _without_values(model, recorder, buffers or {}),
            torch.no_grad(),
            undivided(),
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

    Whatever the run assigns, such as tables that are kept for the next call, is undone.
    """
    replaced: dict[int, torch.Tensor] = {}
    with put_back(model):
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
                        kept = leaf not in module._non_persistent_buffers_set
                        recorder.weight(name, table[leaf], buffers.get(name, tensor), kept)
                    else:
                        recorder.weight(name, tensor, recorder.stored[id(tensor)])
        yield


class _Recorder:
    def __init__(self, lists: Mapping[str, list[tuple[str, nn.Module]]], forms: dict[Any, Any]):
        self.lists = lists
        self.forms = forms
        self.layers: list[Layer] = []
        self.current: Layer | None = None
        self.outside: list[Any] = []
        self.results: list[Any] = []
        self.foreign: set[str] = set()
        self.types: tuple[Any, ...] = ()
        # views share the memory of another value: its id, who made it, and how often it was written to between layers
        self.roots: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.writes: dict[int, int] = {}
        self.persistent: dict[int, bool] = {}
        self.origins: dict[int, Origin] = {}
        self.names: dict[int, list[str]] = {}
        self.stored: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, str] = {}
        self.readers: dict[Origin, set[int]] = {}
        self.crosses = False
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
            self.types = ()

        return enter

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        layer = self.current
        assert layer is not None
        layer.outputs, layer.output_structure = tree_flatten(result)
        self.kept.append(layer.outputs)
        self.current, self.types = None, ()

    # -- tensors ------------------------------------------------------------------------------------------

    def weight(self, name: str, bare: torch.Tensor, stored: torch.Tensor, persistent: bool = True) -> None:
        self.names.setdefault(id(bare), []).append(name)
        self.persistent.setdefault(id(bare), persistent)
        self.stored[id(bare)] = stored
        self.kept.append(bare)

    def input(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        bare = torch.empty(value.shape, dtype=value.dtype, device="meta")
        self.made(bare, 0)
        self.outside.append(("input", tuple(value.shape), value.dtype))
        return bare

    def made(self, value: torch.Tensor, result: int) -> None:
        layer = self.current
        number = _OUTSIDE if layer is None else layer.number
        call = len(self.outside if layer is None else layer.calls)
        self.origins[id(value)] = (number, call, result)
        self.kept.append(value)

    def reference(self, value: torch.Tensor) -> Any:
        layer = self.current
        names = self.names.get(id(value))
        if names is not None:
            return (*self._weight_reference(value, names), self.writes.get(self.root(value), 0))
        origin = self.origins.get(id(value))
        if origin is None:
            return self._unregistered(value)
        number = _OUTSIDE if layer is None else layer.number
        if origin[0] == number and layer is not None:
            return ("own", origin[1], origin[2])
        self.readers.setdefault(origin, set()).add(number)
        self.crosses = True
        written = self.writes.get(self.root(value), 0)
        return ("from", origin) if not written else ("from", origin, written)

    def root(self, value: torch.Tensor) -> int:
        """Return the identity of what owns the memory of a value."""
        return self.roots.get(id(value), id(value))

    def place(self, value: torch.Tensor, viewed: list[torch.Tensor]) -> None:
        """Note whose memory the result of a call is in: that of what it is a view of, or its own."""
        if viewed:
            if viewed[0] is not value:
                self.roots[id(value)] = self.root(viewed[0])
                self.kept.append(viewed[0])
        else:
            self.owners[id(value)] = _OUTSIDE if self.current is None else self.current.number

    def written(self, value: torch.Tensor) -> None:
        """Note that a call writes to a value: what shares its memory is another value from then on."""
        root, layer = self.root(value), self.current
        self.kept.append(value)
        if layer is None:
            self.writes[root] = self.writes.get(root, 0) + 1
        elif self.owners.get(root, _OUTSIDE) != layer.number:
            raise CannotStamp(f"{layer.name} writes to a value from outside")

    def _unregistered(self, value: torch.Tensor) -> Any:
        """Return what a tensor is that no operator made and that is no weight."""
        if not value.is_meta:
            return ("constant", self._hash(value), self.writes.get(self.root(value), 0))
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
        kind = (tuple(stored.shape), stored.dtype, stored.requires_grad, self.persistent[id(value)], values)
        if own is not None and layer is not None:
            if not all(n.startswith(prefix) for n in names):
                raise CannotStamp(f"{own} is also {next(n for n in names if not n.startswith(prefix))}")
            layer.weights[own] = None
            return ("own weight", own.removeprefix(prefix), *kind)
        self.foreign.update(names)
        return ("weight", names[0], *kind)

    def _hash(self, value: torch.Tensor) -> str:
        if id(value) not in self.hashes:
            self.hashes[id(value)] = digest(value)
            self.kept.append(value)
        return self.hashes[id(value)]

    # -- calls --------------------------------------------------------------------------------------------

    def argument(self, value: Any) -> tuple[Any, Any]:
        """Return what an argument refers to and its form, see :func:`_form`."""
        if isinstance(value, torch.Tensor):
            return self.reference(value), (torch.Tensor, value.shape, value.dtype, value.stride())
        if isinstance(value, (list, tuple)):
            if all(type(item) is int for item in value):
                return (int, tuple(value)), (type(value), tuple(value))
            items = [self.argument(item) for item in value]
            return tuple(item[0] for item in items), (type(value), tuple(item[1] for item in items))
        # True == 1 == 1.0, but they are different arguments; NaN differs from itself
        plain = (type(value), repr(value) if isinstance(value, float) else value)
        return plain, plain

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.current
        calls = self.outside if layer is None else layer.calls
        self.crosses = False
        arguments = [self.argument(value) for value in args]
        named = [(name, *self.argument(value)) for name, value in sorted(kwargs.items())]
        operands = (function, tuple(a[0] for a in arguments), *((name, value) for name, value, _ in named))
        if layer is not None and self.crosses:
            layer.crossing.append(len(calls))
        if is_mutable(function):
            bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
            result, viewed = function(*bare_args, **bare_kwargs), _viewed(function, args, kwargs)
            for value in _written(function, args, kwargs):
                self.written(value)
            own: list[torch.Tensor] = []
        else:
            form = (
                function,
                torch.get_default_dtype(),
                *(a[1] for a in arguments),
                *((n, f) for n, _, f in named),
            )
            result, viewed = self.inferred(form, function, args, kwargs)
            own = viewed
        results = []
        for number, value in enumerate(
            (result,) if isinstance(result, torch.Tensor) else tree_leaves(result)
        ):
            if isinstance(value, torch.Tensor):
                # what returns its operand, such as a cast to the type that it has, makes no value
                if not any(value is operand for operand in own):
                    self.made(value, number)
                    self.place(value, viewed)
                results.append((value.shape, value.dtype))
        calls.append((operands, tuple(results)))
        return result

    def inferred(
        self, form: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[torch.Tensor]]:
        """Return the results without values, and the tensors whose memory they are in.

        Those of equal layers are inferred once, which is most of a run's time.
        """
        known = self.forms.get(form)
        if known is None:
            bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
            result = function(*bare_args, **bare_kwargs)
            leaves = tree_leaves(result)
            operands, viewed = _viewed(function, bare_args, bare_kwargs), _viewed(function, args, kwargs)
            # an operator that may return a view may copy, or return its operand
            itself = next((n for n, o in enumerate(operands) if result is o), None)
            shares = any(_share_memory(leaf, o) for leaf in leaves for o in operands[:1])
            if itself is not None:
                result = viewed[itself]
            if all(isinstance(leaf, torch.Tensor) or leaf is None for leaf in leaves):
                self.forms[form] = (None if itself is not None else _form(result), itself, shares)
            return result, viewed if shares or itself is not None else []
        made, itself, shares = known
        viewed = _viewed(function, args, kwargs) if shares or itself is not None else []
        return (viewed[itself] if itself is not None else _formed(made)), viewed

    def data(self, values: Any) -> None:
        """Record numbers that become a tensor: without values, the tensor does not show them."""
        calls = self.outside if self.current is None else self.current.calls
        calls.append(("data", repr(values)))

    def computing(self, types: tuple[Any, ...]) -> None:
        """Record in which types torch computes from now on."""
        if types != self.types:
            calls = self.outside if self.current is None else self.current.calls
            calls.append(("autocast", types))
            self.types = types

    # -- the end ------------------------------------------------------------------------------------------

    def read_by_caller(self, result: Any) -> None:
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.results.append(self.reference(value))
            elif value is None or isinstance(value, (bool, int, float, str)):
                self.results.append((type(value), repr(value)))

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
        record = Record(
            self.layers,
            self.readers,
            self.origins,
            self.kept,
            self.outside,
            self.results,
            self.foreign,
            self.forms,
        )
        taken: dict[int, list[tuple[int, int]]] = {}
        for number, call, result in record.readers:
            taken.setdefault(number, []).append((call, result))
        same: dict[Any, Any] = {}
        for layer in self.layers:
            key = _key(record, layer, taken.get(layer.number, []))
            # equal keys are one object, which compares quickly
            layer.key = same.setdefault(key, key)
        _settle_first(record)
        return record


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a call writes to."""
    return _tensors_at(_aliased(function)[0], args, kwargs)


def _viewed(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors whose memory the results of a call are in."""
    return _tensors_at(_aliased(function)[1], args, kwargs)


_Places = tuple[tuple[int, str], ...]


@lru_cache(maxsize=4096)
def _aliased(function: Any) -> tuple[_Places, _Places]:
    """Return which arguments an operator writes to, and which its results may be views of, as (place, name)."""
    schema = function._schema
    marked = [(n, a.name, a.alias_info) for n, a in enumerate(schema.arguments) if a.alias_info is not None]
    written = tuple((n, name) for n, name, info in marked if info.is_write)
    views = any(result.alias_info is not None for result in schema.returns)
    return written, tuple((n, name) for n, name, _ in marked) if views else ()


def _tensors_at(places: _Places, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    if not places:
        return []
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in places]
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def _share_memory(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.untyped_storage() is other.untyped_storage()


def _autocast() -> tuple[Any, ...]:
    """Return the types in which torch computes at present; it casts no values on the meta device."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


def _form(value: Any) -> Any:
    """Return sizes, type and strides in place of tensors of a result, from which :func:`_formed` makes others."""
    if isinstance(value, torch.Tensor):
        return (torch.Tensor, value.shape, value.dtype, value.stride())
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_form(item) for item in value))
    return (type(value), value)


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


# write to no value, but are marked so; what makes tensors of numbers calls the first
_OF_GRADIENTS = {torch.ops.aten.detach_.default, torch.ops.aten.requires_grad_.default}


class _Calls(QuickDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operator to a recorder."""

    def __init__(self, recorder: _Recorder):
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_GRADIENTS:
            return args[0]
        if composite(func) and any(
            isinstance(v, torch.Tensor) and not v.is_meta for v in (*args, *kwargs.values())
        ):
            # what it does to a tensor with values, such as a move to where that is, it may not do to one without
            with self:
                return func.decompose(*args, **kwargs)
        return self.recorder.call(func, args, kwargs)


_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class _Data(TorchFunctionMode):
    """Tells a recorder the numbers of which a model makes tensors, and the types in which torch computes."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.recorder.computing(_autocast())
        if func in _MAKERS:
            given = args[0] if args else (kwargs or {}).get("data")
            if not isinstance(given, torch.Tensor):
                self.recorder.data(given)
        elif func in _INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = [part for part in index if isinstance(part, (list, tuple, range, np.ndarray))]
            if lists:
                self.recorder.data(lists)
        return func(*args, **(kwargs or {}))


# -- keys -------------------------------------------------------------------------------------------------


def _key(record: Record, layer: Layer, taken: list[tuple[int, int]]) -> Any:
    """Return what a layer does: its calls, the values it takes from outside, and those that others take from it."""
    streams: dict[Origin, int] = {}

    def settled(value: Any) -> Any:
        if isinstance(value, tuple):
            if value[:1] == ("from",):
                origin = value[1]
                # the stream comes from the layer before and goes to this one alone
                before = layer.number - 1
                if (
                    len(value) == 2
                    and origin[0] >= 0
                    and origin[0] == before
                    and record.readers[origin] == {layer.number}
                ):
                    return ("stream", streams.setdefault(origin, len(streams)))
                return value
            return tuple(settled(item) for item in value)
        return value

    calls = list(layer.calls)
    for place in layer.crossing:
        calls[place] = settled(calls[place])
    return (layer.list_name, tuple(calls), tuple(sorted(taken)))


def _settle_first(record: Record) -> None:
    """Give the first layer of each list the key of a later one if only the origin of the stream differs."""
    previous = None
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
        if not (isinstance(one, tuple) and one[:1] == ("from",)):
            return bool(one == other)
        alone = record.readers[one[1]] <= {layer.number}
        return alone and streams.setdefault(other, one) == one and len(set(streams.values())) == len(streams)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(
            _same_but_stream(record, layer, a, b, streams) for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)
