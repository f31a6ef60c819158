"""Read a program's folder strictly: every entry checked, nothing evaluated, no weight read yet."""

from __future__ import annotations

import hashlib
import os

from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..compat import new_fake_mode
from ..errors import CheckpointError, GraphoptError
from ..program import Dial, Origin, Program
from ..safetensors_file import read_header
from ..signature import Fill, Input, Signature, SizeRange
from ..structure import Structure
from ..weights import SafetensorsEntry, Weight
from .allowed import operator_of
from .documents import Entry, read_document
from .encode import decode, dtype_of
from .write import FORMAT, VERSION

_RULES = ("ones", "zeros", "positions", "positions_from_mask")


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
            f"{folder} has format version {manifest.get('version')!r}, this graphopt reads {VERSION}",
            hint="use the graphopt that wrote it",
        )
    files = manifest.table("files", str)
    text = _checked(folder, "program.json", files)
    document = read_document(folder / "program.json", text)
    try:
        program = _Reader(folder, document, files).program()
    except GraphoptError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'program.json'} is damaged: {type(error).__name__}: {error}") from error
    if check_hashes:
        for name in files:
            _checked(folder, name, files)
    return program


def _checked(folder: Path, name: str, files: dict[str, Any]) -> bytes:
    place = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not place.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / 'manifest.json'} names {name!r}, which lies outside the folder")
    try:
        data = place.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {place}: {error}") from error
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise CheckpointError(f"{place} is not what manifest.json says; it was changed or damaged")
    return data


class _Reader:
    def __init__(self, folder: Path, document: Entry, files: dict[str, Any]):
        self.folder = folder
        self.document = document
        self.files = files
        self.mode = new_fake_mode()
        self.values: dict[int, Any] = {}
        self.headers: dict[str, dict[str, SafetensorsEntry]] = {}

    def program(self) -> Program:
        document = self.document
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise CheckpointError(f"{self.folder / 'program.json'} is not a program of version {VERSION}")
        signature = Signature({}, document.table("parameters"), document.get("outputs"))
        _check_structure(signature.outputs)
        for structure in signature.parameters.values():
            _check_structure(structure)
        program = Program(fx.Graph(), self.mode, {}, signature)
        for name, limits in document.table("sizes", list).items():
            low, high, hint = limits
            if not name.isidentifier() or not all(isinstance(v, int) or v is None for v in limits) or low is None:
                raise CheckpointError(f"the size {name!r} has limits {limits!r}")
            program.add_size(name, SizeRange(low, high, hint))
        for entry in document.list("inputs"):
            signature.inputs[entry["name"]] = _input(entry)
        self.nodes(program)
        self.rest(program)
        return program

    def value(self, program: Program, number: Any) -> Any:
        table = self.document.list("values")
        if not isinstance(number, int) or not 0 <= number < len(table):
            raise CheckpointError(f"there is no value {number!r}")
        if number not in self.values:
            self.values[number] = self._value(program, table[number], f"value {number}")
        return self.values[number]

    def _value(self, program: Program, entry: Any, where: str) -> Any:
        if "dtype" in entry:
            shape = [program.parse_size(size, where) for size in entry["shape"]]
            if len(shape) > 32 or any(isinstance(s, int) and not 0 <= s < 2**40 for s in shape):
                raise CheckpointError(f"{where}: the shape {str(entry['shape'])[:80]} is absurd")
            return program.fake(shape, dtype_of(entry["dtype"], where))
        if "list" in entry:
            return [self._value(program, part, where) for part in entry["list"]]
        if "size" in entry:
            return program.parse_size(entry["size"], where)
        if isinstance(entry.get("number"), (bool, int, float)):
            return entry["number"]
        raise CheckpointError(f"{where}: {str(entry)[:60]!r} is not a value")

    def nodes(self, program: Program) -> None:
        known: dict[str, fx.Node] = {}
        graph = program.graph
        weights = self.document.table("weights", dict)
        for entry in self.document.list("nodes"):
            name, operator, args, kwargs, number, notes = entry
            if not isinstance(name, str) or not name.isidentifier() or name in known:
                raise CheckpointError(f"{str(name)[:60]!r} is not the name of a new node")
            if operator == "placeholder":
                node = graph.placeholder(name)
                node.target = node.name
            else:
                call = [decode(a, known, name) for a in args]
                options = {str(k): decode(v, known, name) for k, v in kwargs.items()}
                node = graph.create_node("call_function", operator_of(operator), tuple(call), options, name=name)
            if node.name != name:
                raise CheckpointError(f"{name!r} cannot be the name of a node")
            node.meta["val"] = self.value(program, number)
            if "weight" in notes and operator == "placeholder":
                program.weights[name] = self.weight(name, weights, node)
            elif "input" in notes and operator == "placeholder":
                node.meta["input"] = str(notes["input"])
            elif notes:
                node.meta["custom"] = {"graphopt": {str(k): str(v) for k, v in notes.items()}}
            known[name] = node
        results = [decode(r, known, "output") for r in self.document.list("results")]
        if not all(isinstance(r, fx.Node) for r in results):
            raise CheckpointError("an output is not a node")
        output = graph.output(tuple(results))
        output.meta["val"] = tuple(r.meta["val"] for r in results)
        for key, name in self.document.table("checkpoint", str).items():
            if name not in known:
                raise CheckpointError(f"the checkpoint's {key!r} leads to {name!r}, which does not exist")
            program.checkpoint[key] = known[name]

    def weight(self, name: str, weights: dict[str, Any], node: fx.Node) -> Weight:
        entry = weights.get(name)
        if entry is None or entry.get("kind") not in ("parameter", "buffer", "constant"):
            raise CheckpointError(f"the weight {name!r} is not described")
        file = entry["file"]
        if file not in self.files or not file.startswith("weights/") or Path(file).name != file.removeprefix("weights/"):
            raise CheckpointError(f"the weight {name!r} lies in {file!r}, which is not a file of this program")
        if file not in self.headers:
            place = self.folder / file
            if not place.is_file():
                raise CheckpointError(f"{place} does not exist")
            self.headers[file] = read_header(place)
        source = self.headers[file].get(name)
        if source is None:
            raise CheckpointError(f"{self.folder / file} has no tensor {name!r}")
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != source.shape or value.dtype != source.dtype:
            raise CheckpointError(f"the weight {name!r} is described as {value} and stored as {source.shape}")
        return Weight(
            str(entry["name"]), source, entry["kind"], tuple(map(str, entry["names"])),
            bool(entry["persistent"]), bool(entry["trainable"]),
        )  # fmt: skip

    def rest(self, program: Program) -> None:
        document = self.document
        program.facts = dict(document.table("facts"))
        program.history = list(document.list("history"))
        for name, (default, low, high, text) in document.table("dials", list).items():
            program.dials[name] = Dial(float(default), float(low), float(high), str(text))
        origin = document.table("origin")
        assets = {}
        for name in origin.get("assets", ()):
            assets[str(name)] = _checked(self.folder, f"assets/{name}", self.files)
        program.origin = Origin(
            str(origin["kind"]), str(origin["model_class"]), dict(origin["config"]), assets,
            tuple(origin["unused"]), tuple(origin["notes"]), str(origin["padding"]),
        )  # fmt: skip
        from ..verify import verify

        verify(program, ())


def _input(entry: Any) -> Input:
    where = f"input {entry['name']!r}"
    fill = entry["fill"]
    if fill is not None and fill[0] not in _RULES:
        raise CheckpointError(f"{where}: unknown rule {fill[0]!r}")
    shape = tuple(entry["shape"])
    if not all(isinstance(s, (int, str)) for s in shape):
        raise CheckpointError(f"{where}: shape {shape!r}")
    return Input(
        str(entry["name"]), dtype_of(entry["dtype"], where), shape,
        None if fill is None else Fill(fill[0], str(fill[1])), bool(entry["one_sequence_a_row"]),
    )  # fmt: skip


def _check_structure(structure: Structure, depth: int = 0) -> None:
    if not isinstance(structure, dict) or depth > 16:
        raise CheckpointError("the structure of inputs or outputs is damaged")
    for key in ("list", "tuple"):
        for part in structure.get(key, ()):
            _check_structure(part, depth + 1)
    for part in structure.get("dict", {}).values():
        _check_structure(part, depth + 1)



