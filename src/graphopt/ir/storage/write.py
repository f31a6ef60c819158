"""Writing of a program as a folder: ``program.json``, ``weights/``, ``assets/``, ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import CheckpointError
from ..program import Program
from ..quantised.stored import Making
from ..running.fold import fold
from ..sizes import SizeTextError
from ..text import source_line
from ..weights import TensorSource, Weight
from .allowed import name_of
from .atomic import atomic_folder
from .encode import dtype_name, encode
from .facts import plain_facts
from .manifest import FORMAT, INFERRED, VERSION, file_hash, is_saved_program
from .names import asset_name, input_name, weight_name
from .quantised_weights import describe_codes
from .read import load_program
from .safetensors_file import write_file

SHARD_BYTES = 4 << 30


def save_program(
    program: Program,
    path: str | os.PathLike[str],
    *,
    fold_weights: bool = True,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """Write a program to a folder, which appears complete or not at all, and return its path.

    Args:
        program: weights are loaded, written and freed one at a time.
        path: the folder; an earlier saved program there is replaced.
        fold_weights: fold operators on weights alone, so that they need not be computed when loading.
        progress: called with the name and bytes of each tensor written.

    Raises:
        CheckpointError: the program holds an operator or argument that the format does not.
        WriteError: the disk is full or the path not writable; nothing is left.
    """
    require_savable(program)
    work = fold(program, to_store=True) if fold_weights else program
    document = describe_program(work)
    with atomic_folder(path, may_replace=is_saved_program) as folder:
        files: dict[str, str] = {}
        making = Making()
        (folder / "weights").mkdir()
        for number, shard in enumerate(_shards(work), start=1):
            name = f"weights/{number:05d}.safetensors"
            tensors: dict[str, TensorSource] = {}
            for node_name, weight in shard.items():
                codes = describe_codes(weight.source, making)
                if codes is None:
                    tensors[node_name] = weight.source
                else:
                    document["weights"][node_name]["quantised"] = codes[0]
                    tensors |= {f"{node_name}.{part}": source for part, source in codes[1].items()}
            write_file(folder / name, tensors, progress=progress)
            files[name] = file_hash(folder / name)
            for node_name in shard:
                document["weights"][node_name]["file"] = name
        for name, data in sorted(work.origin.assets.items()):
            asset_path = folder / "assets" / name
            asset_path.parent.mkdir(parents=True, exist_ok=True)
            asset_path.write_bytes(data)
            files[f"assets/{name}"] = hashlib.sha256(data).hexdigest()
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        (folder / "program.json").write_text(text, encoding="utf-8")
        files["program.json"] = hashlib.sha256(text.encode()).hexdigest()
        manifest = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _require_readable(folder)
    return Path(path)


def require_savable(program: Program) -> None:
    """Check that the format supports every call of a program, so that saving does not fail after long work.

    Raises:
        CheckpointError: names the unsupported operator, and the line of the model that calls it.
    """
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            name_of(node.target, node.name)
            encode([list(node.args), list(node.kwargs.values())], node.name)
        except CheckpointError as error:
            source = source_line(node) or None
            raise CheckpointError(error.message, node=node.name, source=source, hint=error.hint) from None


def _require_readable(folder: Path) -> None:
    """Check that a written folder can be read back, without reading weights."""
    try:
        load_program(folder)
    except CheckpointError as error:
        raise CheckpointError(f"this program cannot be saved: {error.message}", hint="report it") from error


def _shards(program: Program) -> list[dict[str, Weight]]:
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in _in_order(program):
        if size and size + weight.bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.bytes
    return [shard for shard in shards if shard]


def _in_order(program: Program) -> list[tuple[str, Weight]]:
    """Return weights in the order of the graph, so that writing a program again gives the same bytes."""
    return [(node.name, program.weights[node.name]) for node in program.weight_nodes]


def describe_program(program: Program) -> dict[str, Any]:
    """Return a program as plain data, without the values of its weights."""
    values: dict[str, int] = {}

    def value_number(value: Any) -> int:
        try:
            described = json.dumps(_value(program, value), separators=(",", ":"))
        except SizeTextError:
            described = json.dumps(INFERRED)
        return values.setdefault(described, len(values))

    nodes = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            nodes.append(
                [
                    node.name,
                    name_of(node.target, node.name),
                    [encode(a, node.name) for a in node.args],
                    {k: encode(v, node.name) for k, v in node.kwargs.items()},
                    value_number(node.meta["val"]),
                    _notes(node),
                ]
            )
        elif node.op == "placeholder":
            label = {"weight": node.name} if node.name in program.weights else {"input": node.meta["input"]}
            line = source_line(node)
            if line:
                label["source"] = line
            nodes.append([node.name, "placeholder", [], {}, value_number(node.meta["val"]), label])
    origin = program.origin
    return {
        "format": FORMAT,
        "version": VERSION,
        "sizes": {n: [r.low, r.high, r.hint] for n, r in program.signature.sizes.items()},
        "constraints": list(program.signature.constraints),
        "inputs": [_input(spec) for spec in program.signature.inputs.values()],
        "parameters": program.signature.parameters,
        "outputs": program.signature.outputs,
        "results": [encode(v, "output") for v in program.output_node.args[0]],  # type: ignore[union-attr]
        "weights": {
            name: {
                "name": weight_name(w.name, name),
                "names": [weight_name(n, name) for n in w.names],
                "kind": w.kind,
                "persistent": w.persistent,
                "trainable": w.trainable,
            }
            for name, w in _in_order(program)
        },
        "values": [json.loads(v) for v in values],
        "nodes": nodes,
        "checkpoint": {name: node.name for name, node in program.checkpoint.items()},
        "facts": plain_facts(program.facts),
        "dials": {
            input_name(n, "dials"): [*(encode(float(v), n) for v in (d.default, d.low, d.high)), d.help]
            for n, d in program.dials.items()
        },
        "history": _plain(program.history),
        "origin": {
            "kind": origin.kind,
            "model_class": origin.model_class,
            "config": _plain(origin.config),
            "unused": list(origin.unused),
            "notes": list(origin.notes),
            "padding": origin.padding,
            "assets": sorted(asset_name(name, "assets") for name in origin.assets),
        },
    }


def _input(spec: Any) -> dict[str, Any]:
    fill = None if spec.fill is None else [spec.fill.rule, spec.fill.like]
    return {
        "name": input_name(spec.name, "inputs"),
        "dtype": dtype_name(spec.dtype),
        "shape": list(spec.shape),
        "fill": fill,
        "one_sequence_a_row": spec.filled_positions_only,
    }


def _value(program: Program, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": dtype_name(value.dtype), "shape": [program.size_text(s) for s in value.shape]}
    if isinstance(value, (list, tuple)):
        return {"list": [_value(program, v) for v in value]}
    if isinstance(value, torch.SymInt):
        return {"size": program.size_text(value)}
    if isinstance(value, (bool, int, float)):
        return {"number": value}
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return INFERRED
    raise CheckpointError(f"a value of type {type(value).__name__} cannot be saved")


def _notes(node: fx.Node) -> dict[str, Any]:
    notes = dict(node.meta.get("custom", {}).get("graphopt", {}))
    line = source_line(node)
    if line:
        notes["source"] = line
    return {str(k): str(v) for k, v in notes.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
