"""The Program: one graph, its weights, its signature and its history."""

from __future__ import annotations

import copy
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import sympy
import torch
from torch import fx

from .compat import FakeTensorMode, add_symbol, fake_tensor, symint
from .editor import Editor
from .errors import UsageError, VerificationError
from .facts import Capture, Facts
from .inputs import settings_of
from .relocation import relocated
from .schema import operator_name
from .signature import Fill, Input, Signature, SizeRange
from .sizes import format_size, node_of_size, parse_size
from .structure import Structure
from .text import format_program, source_line
from .weights import Weight

if TYPE_CHECKING:
    from .anatomy import Anatomy, Block, Layer
    from .checking.report import Report


@dataclass
class Origin:
    """The origin of a program: what is needed to write it in its original format.

    ``config`` is the model's configuration as plain data, ``assets`` are small files that belong to the
    checkpoint (tokenizer, cards), by relative name. ``unused`` lists tensors of the checkpoint that the
    model does not read. ``recalled`` says so if the capture was found in the cache; it is not saved.
    """

    kind: str = "module"
    model_class: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    padding: str = ""
    recalled: str = ""


@dataclass(frozen=True)
class Dial:
    """A run-time setting: its default and range."""

    default: float
    low: float
    high: float
    help: str = ""


_NUMBERS = itertools.count()

METHODS: dict[str, Callable[..., Any]] = {}
"""Methods of programs that are defined in other modules, by name; each module registers its own.

Importing :mod:`graphopt.ir` registers those of the intermediate representation, :mod:`graphopt.api` those that export.
This module therefore imports nothing that imports programs.
"""

Model = torch.nn.Module | torch.export.ExportedProgram | str | os.PathLike[str]
"""What can be captured: see :func:`graphopt.capture`."""

Method = TypeVar("Method", bound=Callable[..., Any])


def program_method(name: str) -> Callable[[Method], Method]:
    """Register the decorated function as the implementation of the program method of this name."""

    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


class Program:
    """A model as a graph that passes can change. Copies share tensors, and the model itself is never changed."""

    def __init__(
        self, graph: fx.Graph, mode: FakeTensorMode, weights: dict[str, Weight], signature: Signature
    ):
        self.graph = graph
        self.mode = mode
        self.weights = weights
        self.signature = signature
        self.symbols: dict[sympy.Symbol, str] = {}
        self.facts = Facts()
        self.dials: dict[str, Dial] = {}
        self.history: list[dict[str, Any]] = []
        self.origin = Origin()
        self.checkpoint: dict[str, fx.Node] = {}
        """Weight mapping: each tensor of the checkpoint and the node that computes its current value."""
        self.report: Report | None = None
        self.number, self.version = next(_NUMBERS), 0
        """A number that identifies the program in this process, and how often it was changed."""
        self.edit = Editor(self)
        self._derived: dict[Hashable, tuple[int, Any]] = {}
        self._portable: dict[Hashable, Any] = {}
        """Analyses of this graph, or of the graph that it is an unmodified copy of."""

    # -- inspecting ---------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order."""
        return list(self.graph.nodes)

    @property
    def output_node(self) -> fx.Node:
        """The node that returns."""
        output: fx.Node = next(iter(self.graph.find_nodes(op="output")))
        return output

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """Output values by flat name."""
        return dict(zip(self.signature.output_names, self.output_node.args[0], strict=True))  # type: ignore[arg-type]

    @property
    def weight_nodes(self) -> list[fx.Node]:
        """Placeholders of tensors of the model."""
        return [n for n in self.graph.find_nodes(op="placeholder") if n.name in self.weights]

    @property
    def input_nodes(self) -> dict[str, fx.Node]:
        """Placeholders of inputs by name."""
        placeholders = (n for n in self.graph.find_nodes(op="placeholder") if n.name not in self.weights)
        return {str(n.meta["input"]): n for n in placeholders}

    @property
    def operators(self) -> Counter[str]:
        """How often each operator is called: ``{"aten.linear": 14, ...}``."""
        return Counter(operator_name(n.target) for n in self.graph.nodes if n.op == "call_function")

    @property
    def anatomy(self) -> Anatomy:
        """The structure of the model: residual streams, attention, FFNs, experts, norms, ..."""
        result: Anatomy = self.derived("anatomy", lambda: METHODS["anatomy"](self), portable=True)
        return result

    def weight_of(self, node: fx.Node) -> Weight:
        """Return the weight of a placeholder."""
        return self.weights[node.name]

    def weight_node(self, name: str) -> fx.Node:
        """Return the placeholder of the weight of this name."""
        for node in self.weight_nodes:
            if name in self.weights[node.name].all_names:
                return node
        raise UsageError(f"the program has no weight named {name!r}")

    def node(self, name: str) -> fx.Node:
        """Return the node of this name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(f"the program has no node named {name!r}", hint="program.text() lists them")

    def text(self, **options: Any) -> str:
        """Return the graph as readable text."""
        return format_program(self, **options)

    def source_line(self, node: fx.Node) -> str:
        """Return the line of the user's model that a node came from, or an empty string."""
        return source_line(node)

    def __repr__(self) -> str:
        calls = sum(self.operators.values())
        parameters = sum(torch.Size(w.source.shape).numel() for w in self.weights.values())
        return f"<Program of {calls} operators, {len(self.weights)} weights, {parameters:,} values>"

    def __str__(self) -> str:
        capture = self.facts.get(Capture) or Capture()
        notes = [
            *self.origin.notes,
            *([self.origin.recalled] if self.origin.recalled else []),
            *capture.fixed_sizes,
        ]
        return "\n  ".join([repr(self), *notes])

    # -- derived facts, recomputed when the graph has changed -----------------------------------------

    def changed(self) -> None:
        """Record that the graph was edited, which invalidates everything derived from it."""
        self.version += 1
        # some of it is large: weights that were loaded to run
        self._derived.clear()
        if self._portable:
            self._portable = {}

    def derived(self, key: Hashable, compute: Callable[[], Any], *, portable: bool = False) -> Any:
        """Return a value that depends on the graph, computed at most once per version of it.

        Args:
            key: identifies the value.
            compute: returns the value, without changing the graph.
            portable: the value is also valid for copies (:meth:`copy`): nodes and plain data, in containers and
                dataclasses.
        """
        cached = self._derived.get(key)
        if cached is None or cached[0] != self.version:
            if portable and key in self._portable:
                cached = (self.version, relocated(self._portable[key], {n.name: n for n in self.graph.nodes}))
            else:
                cached = (self.version, compute())
            self._derived[key] = cached
            if portable and self.version == cached[0]:
                self._portable[key] = cached[1]
        return cached[1]

    # -- sizes ----------------------------------------------------------------------------------------

    def fake(self, shape: Iterable[int | torch.SymInt], dtype: torch.dtype) -> torch.Tensor:
        """Return a fake tensor of this program's mode."""
        return fake_tensor(self.mode, tuple(shape), dtype)

    def add_size(self, name: str, limits: SizeRange) -> torch.SymInt:
        """Add a named size to the signature and return it as a symbolic integer."""
        # Inductor accepts only size symbols named like torch's own, s and a number;
        # the same name gives the same symbol, since copies share its range and example
        number = 1000 + zlib.crc32(name.encode()) % 10**6
        while self.symbols.get(sympy.Symbol(f"s{number}", integer=True, positive=True), name) != name:
            number += 1
        symbol = add_symbol(self.mode, f"s{number}", limits.low, limits.high, limits.hint)
        self.symbols[symbol] = name
        self.signature.sizes[name] = limits
        size = symint(self.mode, symbol, limits.hint)
        assert isinstance(size, torch.SymInt)
        return size

    def size_text(self, size: int | torch.SymInt) -> int | str:
        """Return a size as a number, or as text in terms of this program's named sizes."""
        return format_size(size, self.symbols)

    def parse_size(self, text: int | str, where: str = "") -> int | torch.SymInt:
        """Return a size from its text."""
        value = parse_size(text, {name: symbol for symbol, name in self.symbols.items()}, where)
        hints = {s: self.signature.sizes[n].hint for s, n in self.symbols.items()}
        return symint(self.mode, value, int(value.subs(hints)))

    def size_nodes(self, argument: Any) -> Any:
        """Replace symbolic sizes in an argument by nodes that read them from an input."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.size_nodes(item) for item in argument)
        if not isinstance(argument, (torch.SymInt, torch.SymFloat)):
            return argument
        return node_of_size(self, argument.node.expr)

    # -- copying --------------------------------------------------------------------------------------

    def copy(self, *, analysed: bool = False) -> Program:
        """Return a copy whose graph can be edited independently; tensors are shared.

        Args:
            analysed: keep the analyses of this graph until the copy is edited. All edits of such a copy must go
                through its editor, or be followed by :meth:`changed`.
        """
        graph = copy.deepcopy(self.graph)
        pairs = dict(zip(self.graph.nodes, graph.nodes, strict=True))
        for old, new in pairs.items():
            if old.name != new.name:
                raise VerificationError(f"copying renamed {old.name} to {new.name}")
            if "custom" in new.meta:
                new.meta["custom"] = copy.deepcopy(new.meta["custom"])
        other = Program(graph, self.mode, dict(self.weights), copy.deepcopy(self.signature))
        other.symbols = dict(self.symbols)
        other.facts = self.facts.copy()
        other.dials = dict(self.dials)
        other.history = copy.deepcopy(self.history)
        other.origin = self.origin
        other.checkpoint = {name: pairs[node] for name, node in self.checkpoint.items()}
        other.report = self.report
        if analysed:
            other._portable = dict(self._portable)
        return other

    # -- running --------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the arguments of the model; inputs that are optional for the model are optional here."""
        return self.signature.unflatten(METHODS["run"](self, self.bind(args, kwargs)))

    def bind(
        self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the value of each placeholder that is not a weight, by input name."""
        inputs = dict(kwargs or {})
        settings = settings_of(self, {n: inputs.pop(n) for n in self.dials if n in inputs})
        return self.signature.bind(args, inputs) | settings

    # -- editing --------------------------------------------------------------------------------------

    def replace(self, old: fx.Node, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        """Replace a value by ``function(*arguments)``; without arguments, the function gets the arguments of ``old``.

        Args:
            old: the node whose value is replaced.
            function: an ordinary function of tensors, run once on tensors without values; it must not branch on
                values or on sizes that vary, have side effects, or write to its arguments.
            arguments: nodes and plain values.

        Returns:
            The new node.

        Raises:
            UsageError: the function cannot be recorded.
            VerificationError: it returns another shape or type. After either error the program is unchanged.
        """
        self.edit.require_present(old, *(a for a in arguments if isinstance(a, fx.Node)))
        with self.edit.before(old):
            new = self.edit.stand_in(old, function, arguments or tuple(old.args))
        self.edit.replace(old, new)
        return new

    def insert_after(self, node: fx.Node, function: Callable[..., Any]) -> fx.Node:
        """Make all readers of ``node`` read ``function(node)`` instead, and return the new node.

        Raises:
            UsageError: the function cannot be recorded, see :meth:`replace`.
            VerificationError: it returns another shape or type.
        """
        users = list(node.users)
        with self.edit.after(node):
            new = self.edit.stand_in(node, function, (node,))
        for user in users:
            user.replace_input_with(node, new)
        self.changed()
        return new

    def bypass(self, value: fx.Node, with_: fx.Node) -> None:
        """Make all readers of ``value`` read ``with_``, and remove nodes that only ``value`` needed."""
        self.edit.replace(value, with_)

    def remove(self, block: Block | Layer) -> None:
        """Remove a block, or a layer, from the residual stream.

        A post-norm is removed with its block. Of several blocks that share an addition, only the given one is
        removed. A block that was obtained before other edits is looked up again.

        Raises:
            UsageError: it is not part of the program, or no longer.
        """
        METHODS["remove"](self, block)

    def part(self, name: str) -> Program:
        """Return a component of a composite model as a program of its own, for passes to rewrite.

        Args:
            name: encoder, decoder, vision, audio, text, projector, ...; ``anatomy.components`` has those of the program.
                What a part takes from another is an input of that one's name.

        Raises:
            UsageError: there is none of this name, or there are several.
        """
        part: Program = METHODS["part"](self, name)
        return part

    def with_part(self, name: str, part: Program, *, compare: bool = True) -> Program:
        """Return a copy of the program in which a rewritten part takes the place of a component.

        Args:
            name: of the component.
            part: takes and gives what :meth:`part` of that name does, in the same shapes and types.
            compare: run the copy on small inputs, and the part by itself on what it reads there, and compare.

        Raises:
            UsageError: there is no such component, or the part has run-time settings.
            VerificationError: the part takes or gives something else, has other values for a weight that the rest of the
                program reads as well, or computes something else within the program than by itself.
        """
        whole: Program = METHODS["with_part"](self, name, part, compare=compare)
        return whole

    def add_parameter(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add a trainable tensor and return its node."""
        return self.edit.add_weight(name, value)

    def add_output(self, name: str, node: fx.Node) -> None:
        """Add a value to the program's outputs, under this name."""
        self.edit.require_present(node)
        if "dict" not in self.signature.outputs:
            only = self.signature.outputs
            if "leaf" not in only:
                raise UsageError("outputs can only be added to programs whose outputs have names")
            self.signature.outputs = {"dict": {only["leaf"]: only}, "class": None}
        items: dict[str, Structure] = self.signature.outputs["dict"]
        if name in items:
            raise UsageError(f"the program already has an output {name!r}")
        values = [*self.outputs.values(), node]
        items[name] = {"leaf": name}
        self.signature.outputs["class"] = None
        self.edit.set_outputs(values)

    def add_dial(self, name: str, dial: Dial) -> fx.Node:
        """Add a run-time setting and return the node of its value, a float64 scalar."""
        if name in self.dials or name in self.signature.parameters:
            raise UsageError(f"the program already takes {name!r}")
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.target = node.name
        node.meta.update(val=self.fake((), torch.float64), input=name)
        self.dials[name] = dial
        self.changed()
        return node

    # -- exporting ------------------------------------------------------------------------------------

    def _export(self, how: str, *args: Any, **kwargs: Any) -> Any:
        if how not in METHODS:
            raise UsageError(f"no exporter for {how}() is loaded", hint="import graphopt.api first")
        return METHODS[how](self, *args, **kwargs)

    def save(self, path: Any, **options: Any) -> Any:
        """Write the program to a folder that ``graphopt.load`` reads."""
        return self._export("save", path, **options)

    def lower(self, to: str, path: Any, **options: Any) -> Any:
        """Write the program for another runtime: ``lower("onnx", "out.onnx")``."""
        return self._export("lower", to, path, **options)

    def module(self, **options: Any) -> torch.nn.Module:
        """Return an ``nn.Module``, one submodule per block, under the original parameter names."""
        module = self._export("module", **options)
        assert isinstance(module, torch.nn.Module)
        return module

    def exported_program(self, *, core_aten: bool = False) -> torch.export.ExportedProgram:
        """Return a ``torch.export.ExportedProgram``; with ``core_aten``, graphopt's operators are decomposed."""
        exported = self._export("exported_program", core_aten=core_aten)
        assert isinstance(exported, torch.export.ExportedProgram)
        return exported

    def save_pretrained(self, path: Any, **options: Any) -> Any:
        """Write a Hugging Face folder, after reloading it with transformers and comparing."""
        return self._export("save_pretrained", path, **options)

    def save_gguf(self, path: Any, *, type: str = "auto", **options: Any) -> Any:
        """Write a GGUF file, after reading it back and comparing; ``type`` is that of matrices, such as Q8_0."""
        return self._export("save_gguf", path, type=type, **options)


def as_program(model: Model | Program) -> Program:
    """Return a model as a program: a program is returned unchanged, anything else is captured.

    Raises:
        CaptureError: the model cannot be captured.
        CheckpointError: the model cannot be read.
    """
    if isinstance(model, Program):
        return model
    if "capture" not in METHODS:
        raise UsageError("no frontend that captures models is loaded", hint="import graphopt.api first")
    program: Program = METHODS["capture"](model)
    return program


__all__ = [
    "METHODS", "Dial", "Fill", "Input", "Model", "Origin", "Program", "Signature", "SizeRange", "as_program",
    "program_method",
]  # fmt: skip
