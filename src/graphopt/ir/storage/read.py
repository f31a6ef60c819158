"""Reading of saved programs: every entry is checked, nothing is evaluated, and no weight is read yet."""

from __future__ import annotations

import hashlib
import operator as operator_module
import os
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..checking.verify import verify
from ..compat import new_fake_mode
from ..constraints import parse_relation
from ..errors import CheckpointError
from ..infer import infer, same_size
from ..program import Dial, Origin, Program
from ..signature import Fill, Input, Signature, SizeRange
from ..structure import Structure, leaf_names
from ..weights import SafetensorsEntry, TensorSource, Weight
from .allowed import check_call, operator_of
from .documents import Entry, read_document
from .encode import decode, dtype_of
from .facts import typed_facts
from .manifest import FORMAT, INFERRED, VERSION, file_hash
from .names import asset_name, input_name, weight_name
from .quantised_weights import saved_codes
from .safetensors_file import contained, read_header

_FILL_RULES = ("ones", "zeros", "positions", "positions_from_mask", "following", "marks")
_MOST_CONSTRAINTS = 1000


def load_program(path: str | os.PathLike[str], *, check_hashes: bool = False) -> Program:
    """Return a saved program; weights stay on disk until they are needed.

    Args:
        path: a folder written by :func:`save_program`.
        check_hashes: also hash the weight files and compare with the manifest.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of another version, or not what it claims.
    """
    folder = Path(path)
    manifest = read_document(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a saved program")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has format version {manifest.get('version')!r}, but this graphopt reads {VERSION}",
            hint="use the version of graphopt that wrote it",
        )
    files = manifest.table("files", str)
    text = _read_checked(folder, "program.json", files)
    document = read_document(folder / "program.json", text)
    try:
        program = Reader(folder, document, files).program()
    except CheckpointError:
        raise
    except Exception as error:
        # damaged or forged files can raise any error in the libraries below
        raise CheckpointError(
            f"{folder / 'program.json'} is damaged: {type(error).__name__}: {error}"
        ) from error
    if check_hashes:
        for name in files:
            _require_hash(folder, name, files)
    return program


def _contained_path(folder: Path, name: str) -> Path:
    return contained(folder, name, folder / "manifest.json")


def _require_sizes(target: Any, call: list[Any], name: str) -> None:
    """Check that a function of sizes is called on sizes, and that a power is small enough to compute."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in call]
    numbers = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
    if not all(isinstance(v, numbers) for v in values):
        raise CheckpointError(f"{name!r} calls a function of sizes on something that is not a size")
    if target is operator_module.pow and len(values) == 2:
        base, exponent = values
        if (
            not isinstance(exponent, (int, float))
            or abs(exponent) > 64
            or (isinstance(base, (int, float)) and abs(base) >= 2**40)
        ):
            raise CheckpointError(f"{name!r} is an unreasonable power of a size")


def _read_checked(folder: Path, name: str, files: dict[str, Any]) -> bytes:
    path = _contained_path(folder, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise _changed_file_error(path)
    return data


def _require_hash(folder: Path, name: str, files: dict[str, Any]) -> None:
    """Check the hash of a file of any size, which is read piece by piece."""
    path = _contained_path(folder, name)
    try:
        actual_hash = file_hash(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if actual_hash != files.get(name):
        raise _changed_file_error(path)


def _changed_file_error(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} does not match manifest.json; it was changed or damaged")


class Reader:
    """Makes a program of its document; every entry is checked."""

    def __init__(self, folder: Path, document: Entry, files: dict[str, Any]):
        self.folder = folder
        self.document = document
        self.files = files
        self.mode = new_fake_mode()
        self.values: dict[int, Any] = {}
        self.headers: dict[str, dict[str, SafetensorsEntry]] = {}

    def program(self) -> Program:
        """Return the program."""
        document = self.document
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise CheckpointError(f"{self.folder / 'program.json'} is not a program of version {VERSION}")
        signature = Signature({}, document.table("parameters"), document.get("outputs"))
        program = Program(fx.Graph(), self.mode, {}, signature)
        for name, limits in document.table("sizes", list).items():
            low, high, hint = limits
            if not name.isidentifier() or not all(
                _is_size(v) for v in (low, hint, *([] if high is None else [high]))
            ):
                raise CheckpointError(f"the size {name!r} has limits {str(limits)[:80]}")
            program.add_size(name, SizeRange(low, high, hint))
        # folders written by earlier releases have none
        constraints = document.list("constraints") if "constraints" in document.data else []
        if len(constraints) > _MOST_CONSTRAINTS or not all(isinstance(c, str) for c in constraints):
            raise CheckpointError("the constraints of sizes are damaged")
        for text in constraints:
            parse_relation(text, frozenset(signature.sizes), "constraints")
        signature.constraints = tuple(constraints)
        for entry in document.list("inputs"):
            spec = _input(entry)
            if spec.name in signature.inputs:
                raise CheckpointError(f"the input {spec.name!r} is listed twice")
            signature.inputs[spec.name] = spec
        _check_signature(signature)
        self.nodes(program)
        self.metadata(program)
        _check_inputs(program)
        return program

    def value(self, program: Program, number: Any) -> Any:
        """Return a value of the document's table by its number: a tensor without values, a size or a number."""
        table = self.document.list("values")
        if not isinstance(number, int) or not 0 <= number < len(table):
            raise CheckpointError(f"there is no value {number!r}")
        if number not in self.values:
            self.values[number] = self._value(program, table[number], f"value {number}")
        return self.values[number]

    def inferred(self, number: Any) -> bool:
        """Return whether a value is not described and must be inferred."""
        table = self.document.list("values")
        return isinstance(number, int) and 0 <= number < len(table) and table[number] == INFERRED

    def _value(self, program: Program, entry: Any, where: str) -> Any:
        if "dtype" in entry:
            shape = [program.parse_size(size, where) for size in entry["shape"]]
            if len(shape) > 32 or any(isinstance(s, int) and not 0 <= s < 2**40 for s in shape):
                raise CheckpointError(f"{where}: the shape {str(entry['shape'])[:80]} is unreasonable")
            return program.fake(shape, dtype_of(entry["dtype"], where))
        if "list" in entry:
            return [self._value(program, part, where) for part in entry["list"]]
        if "size" in entry:
            return program.parse_size(entry["size"], where)
        if isinstance(entry.get("number"), (bool, int, float)):
            return entry["number"]
        raise CheckpointError(f"{where}: {str(entry)[:60]!r} is not a value")

    def nodes(self, program: Program) -> None:
        """Make the graph and its weights."""
        nodes_by_name: dict[str, fx.Node] = {}
        graph = program.graph
        weights = self.document.table("weights", dict)
        for entry in self.document.list("nodes"):
            name, operator, args, kwargs, number, notes = entry
            if not isinstance(name, str) or not name.isidentifier() or name in nodes_by_name:
                raise CheckpointError(f"{str(name)[:60]!r} is not the name of a new node")
            if operator == "placeholder":
                node = graph.placeholder(name)
                node.target = node.name
            else:
                call = [decode(a, nodes_by_name, name) for a in args]
                options = {str(k): decode(v, nodes_by_name, name) for k, v in kwargs.items()}
                target = operator_of(operator)
                check_call(target, tuple(call), options, name)
                if str(operator).startswith("size."):
                    _require_sizes(target, call, name)
                node = graph.create_node("call_function", target, tuple(call), options, name=name)
            if node.name != name:
                raise CheckpointError(f"{name!r} cannot be the name of a node")
            node.meta["val"] = (
                infer(self.mode, target, tuple(call), options)
                if operator != "placeholder" and self.inferred(number)
                else self.value(program, number)
            )
            remarks = {str(k): str(v) for k, v in notes.items()}
            if operator == "placeholder":
                remarks = {k: v for k, v in remarks.items() if k not in ("weight", "input")}
            if remarks:
                node.meta["custom"] = {"graphopt": remarks}
            if "weight" in notes and operator == "placeholder":
                program.weights[name] = self.weight(name, weights, node)
            elif "input" in notes and operator == "placeholder":
                node.meta["input"] = input_name(notes["input"], name)
            nodes_by_name[name] = node
        results = [decode(r, nodes_by_name, "output") for r in self.document.list("results")]
        if not all(isinstance(r, fx.Node) for r in results):
            raise CheckpointError("an output is not a node")
        output = graph.output(tuple(results))
        output.meta["val"] = tuple(r.meta["val"] for r in results)
        for key, name in self.document.table("checkpoint", str).items():
            if name not in nodes_by_name:
                raise CheckpointError(f"the checkpoint's {key!r} is mapped to {name!r}, which does not exist")
            program.checkpoint[key] = nodes_by_name[name]

    def weight(self, name: str, weights: dict[str, Any], node: fx.Node) -> Weight:
        """Return the weight of a placeholder."""
        entry = weights.get(name)
        if entry is None or entry.get("kind") not in ("parameter", "buffer", "constant"):
            raise CheckpointError(f"the weight {name!r} is not described")
        source = self.source(name, entry)
        value = node.meta["val"]
        fixed_shape = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
        if not fixed_shape or tuple(value.shape) != source.shape or value.dtype != source.dtype:
            raise CheckpointError(f"the weight {name!r} is described as {value} and stored as {source.shape}")
        names = [weight_name(n, name) for n in entry["names"]]
        return Weight(
            weight_name(entry["name"], name), source, entry["kind"], tuple(names),
            bool(entry["persistent"]), bool(entry["trainable"]),
        )  # fmt: skip

    def source(self, name: str, entry: dict[str, Any]) -> TensorSource:
        """Return where the values of a weight are, by its entry in the document."""
        file = entry["file"]
        if (
            file not in self.files
            or not file.startswith("weights/")
            or Path(file).name != file.removeprefix("weights/")
        ):
            raise CheckpointError(
                f"the weight {name!r} is stored in {file!r}, which is not a file of this program"
            )
        if file not in self.headers:
            self.headers[file] = read_header(_contained_path(self.folder, file))
        if "quantised" in entry:
            return saved_codes(name, entry["quantised"], self.headers[file])
        source = self.headers[file].get(name)
        if source is None:
            raise CheckpointError(f"{self.folder / file} has no tensor {name!r}")
        return source

    def metadata(self, program: Program) -> None:
        """Read everything beside the graph, and verify the program."""
        document = self.document
        program.facts = typed_facts(document.table("facts"))
        program.history = list(document.list("history"))
        if not all(isinstance(entry, dict) for entry in program.history):
            raise CheckpointError("the history is damaged")
        for name, (default, low, high, text) in document.table("dials", list).items():
            limits = [
                float(decode(value, {}, f"run-time setting {name!r}")) for value in (default, low, high)
            ]
            program.dials[input_name(name, "dials")] = Dial(limits[0], limits[1], limits[2], str(text))
        origin = document.table("origin")
        assets = {}
        for listed in origin.get("assets", ()):
            name = asset_name(listed, "assets")
            assets[name] = _read_checked(self.folder, f"assets/{name}", self.files)
        program.origin = Origin(
            str(origin["kind"]), str(origin["model_class"]), dict(origin["config"]), assets,
            tuple(origin["unused"]), tuple(origin["notes"]), str(origin["padding"]),
        )  # fmt: skip
        verify(program, ())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _input(entry: Any) -> Input:
    name = input_name(entry["name"], "inputs")
    where = f"input {name!r}"
    fill = entry["fill"]
    if fill is not None and fill[0] not in _FILL_RULES:
        raise CheckpointError(f"{where}: unknown rule {fill[0]!r}")
    shape = tuple(entry["shape"])
    if not all(_is_size(s) or isinstance(s, str) for s in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:80]}")
    return Input(
        name, dtype_of(entry["dtype"], where), shape,
        None if fill is None else Fill(fill[0], str(fill[1])), bool(entry["one_sequence_a_row"]),
    )  # fmt: skip


def _check_signature(signature: Signature) -> None:
    """Check that one parameter leads to each input, fills lead to given inputs, and output names are unique."""
    leaves: list[str] = []
    for structure in signature.parameters.values():
        _check_structure(structure)
        leaves.extend(leaf_names(structure))
    if sorted(leaves) != sorted(signature.inputs):
        raise CheckpointError(
            f"the parameters lead to {sorted(leaves)}, the inputs are {sorted(signature.inputs)}"
        )
    for spec in signature.inputs.values():
        passed = {spec.name}
        current = spec
        while current.fill is not None:
            if current.fill.like in passed or current.fill.like not in signature.inputs:
                raise CheckpointError(
                    f"input {spec.name!r} is filled from {current.fill.like!r}, which is circular or does not exist"
                )
            passed.add(current.fill.like)
            current = signature.inputs[current.fill.like]
    _check_structure(signature.outputs)
    names = signature.output_names
    if len(set(names)) != len(names):
        raise CheckpointError("two outputs have the same name")


def _check_structure(structure: Structure, depth: int = 0) -> None:
    damaged = CheckpointError("the structure of inputs or outputs is damaged")
    if not isinstance(structure, dict) or depth > 16:
        raise damaged
    kinds = set(structure) - {"class"}
    if len(kinds) != 1:
        raise damaged
    (kind,) = kinds
    content = structure[kind]
    if kind == "leaf":
        if not isinstance(content, str):
            raise damaged
    elif kind == "constant":
        if not (content is None or isinstance(content, (bool, int, float, str))):
            raise damaged
    elif kind in ("list", "tuple"):
        if not isinstance(content, list):
            raise damaged
        for part in content:
            _check_structure(part, depth + 1)
    elif (
        kind == "dict" and isinstance(content, dict) and isinstance(structure.get("class"), (str, type(None)))
    ):
        for part in content.values():
            _check_structure(part, depth + 1)
    else:
        raise damaged


def _check_inputs(program: Program) -> None:
    """Check that the signature and the graph agree on every input."""
    for name, spec in program.signature.inputs.items():
        value = program.input_nodes[name].meta["val"]
        sizes = [program.parse_size(size, f"input {name!r}") for size in spec.shape]
        same = isinstance(value, torch.Tensor) and value.dtype == spec.dtype and len(sizes) == value.dim()
        if not same or not all(same_size(a, b) for a, b in zip(sizes, value.shape, strict=True)):
            raise CheckpointError(f"the input {name!r} is described as {list(spec.shape)} but is {value}")
