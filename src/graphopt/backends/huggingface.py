"""A Program as a Hugging Face folder, reloaded by transformers alone and compared before it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir.atomic import atomic_folder
from ..ir.comparison import relative_error
from ..ir.errors import LoweringError
from ..ir.examples import example_inputs
from ..ir.execute import memory_available, run
from ..ir.export_blockers import export_blockers
from ..ir.fold import computed
from ..ir.program import Program
from ..ir.safetensors_file import write_file
from ..ir.weights import TensorSource, numel
from .huggingface_config import renumbered, with_experts, with_widths, without_layers

SHARD_BYTES = 5 << 30
SCRIPT = Path(__file__).with_name("huggingface_reload.py")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Recapture = Callable[[Path], Program]


@dataclass
class FolderReport:
    """What was written and how it compares: relative error of each output against the program."""

    path: Path
    errors: dict[str, float] = field(default_factory=dict)
    checked: str = ""
    files: list[str] = field(default_factory=list)


def save_pretrained(
    program: Program,
    path: str | os.PathLike[str],
    *,
    check: str = "auto",
    recapture: Recapture | None = None,
    progress: Callable[[str, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FolderReport:
    """Write the program in the format of the checkpoint it came from.

    Args:
        program: captured from a Hugging Face checkpoint; passes since then must fit its architecture.
        path: the folder; appears whole or not at all.
        check: "reload" runs the folder with transformers in another process; "streamed" captures it again
            and runs both weight by weight, for models larger than memory; "auto" chooses by size.
        recapture: how to capture a folder, for "streamed".
        progress: called with the name and bytes of each tensor written.
        shard_bytes: size of a weight file.

    Raises:
        LoweringError: the architecture cannot express the program, or the reloaded folder differs from it.
    """
    tensors, config = contents(program)
    with atomic_folder(path, may_replace=_is_folder_of_ours) as folder:
        _write_weights(folder, tensors, shard_bytes, progress)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, data in program.origin.assets.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        report = FolderReport(Path(path), files=sorted(p.name for p in folder.iterdir()))
        total = sum(numel(s.shape) * s.dtype.itemsize for s in tensors.values())
        if check == "auto":
            check = "reload" if total < memory_available() // 3 else "streamed"
        report.checked = check
        if check == "reload":
            report.errors = _reload(program, folder)
        elif check == "streamed":
            if recapture is None:
                raise LoweringError(
                    "a streamed check needs a way to capture the folder", hint="call program.save_pretrained"
                )
            report.errors = _streamed(program, recapture(folder))
        else:
            raise LoweringError(f"there is no check {check!r}; choose reload, streamed or auto")
        _require(program, report.errors)
    return report


def contents(program: Program) -> tuple[dict[str, TensorSource], dict[str, Any]]:
    """Return the tensors and configuration of the folder.

    Raises:
        LoweringError: the program did not come from a checkpoint, or a pass left its format.
    """
    if program.origin.kind != "huggingface" or not program.checkpoint:
        raise LoweringError(
            "this program was not captured from a Hugging Face checkpoint",
            hint="use program.save, program.lower or program.exported_program",
        )
    if blockers := export_blockers(program):
        reasons = "; ".join(f"{reason} ({by})" for by, told in blockers.items() for reason in told)
        raise LoweringError(
            f"a Hugging Face folder cannot hold this program: {reasons}",
            hint="use program.save or program.lower",
        )
    removed = list(program.facts.get("renumbered", ()))
    tensors: dict[str, TensorSource] = {}
    for name, node in program.checkpoint.items():
        if node.op == "placeholder":
            tensors[renumbered(name, removed)] = program.weights[node.name].source
        else:
            tensors[renumbered(name, removed)] = computed(program, node)[0]
    widths = [(int(a), int(b)) for a, b in program.facts.get("ffn_widths", [])]
    config = with_widths(without_layers(program.origin.config, removed), widths)
    if "fixed_experts" in program.facts:
        config = with_experts(config, *map(int, program.facts["fixed_experts"]), active=True)
    for before, after in program.facts.get("expert_counts", []):
        config = with_experts(config, int(before), int(after), active=False)
    return tensors, config


def _is_folder_of_ours(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


METADATA = {"format": "pt", "writer": "graphopt"}
"""In the header of weight files; the command line knows by it which folders it may replace."""


def _write_weights(
    folder: Path,
    tensors: dict[str, TensorSource],
    shard_bytes: int,
    progress: Callable[[str, int], None] | None,
) -> None:
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name, source in tensors.items():
        bytes_ = numel(source.shape) * source.dtype.itemsize
        if size and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += bytes_
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], metadata=METADATA, progress=progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, metadata=METADATA, progress=progress)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(numel(s.shape) * s.dtype.itemsize for s in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _reload(program: Program, folder: Path) -> dict[str, float]:
    """Run the folder in a process that knows transformers and not graphopt, and compare."""
    inputs = example_inputs(program)
    expected = run(program, inputs)
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "inputs.safetensors", Path(place) / "outputs.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({k: v.contiguous() for k, v in inputs.items()}, given)
        name = program.origin.model_class.partition(":")[2]
        status, said = _child([str(folder), name, str(given), str(made), _dtype(program)])
        if status != 0:
            last = said.strip().splitlines()[-1:] or ["no message"]
            raise LoweringError(
                f"transformers cannot load what was written: {last[0]}",
                hint="the architecture cannot express this program; use program.save or program.lower",
            )
        found = load_file(made)
    return _errors(program, inputs, expected, found)


def _child(arguments: list[str]) -> tuple[int, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stderr


def _streamed(program: Program, again: Program) -> dict[str, float]:
    inputs = example_inputs(program)
    expected = run(program, inputs, streamed=True)
    found = run(
        again, again.bind((), {k: v for k, v in inputs.items() if k in again.signature.inputs}), streamed=True
    )
    return _errors(program, inputs, expected, found)


def _errors(
    program: Program, inputs: dict[str, torch.Tensor], expected: dict[str, Any], found: dict[str, Any]
) -> dict[str, float]:
    errors = {}
    mask = inputs.get("attention_mask")
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor) or name not in found:
            continue
        other = found[name]
        if (
            mask is not None
            and value.dim() >= 2
            and value.shape[:2] == mask.shape
            and other.shape == value.shape
        ):
            value, other = value[mask.bool()], other[mask.bool()]
        errors[name] = relative_error(other, value)
    if not errors:
        raise LoweringError(f"the reloaded model returns none of {', '.join(expected)}")
    return errors


def _dtype(program: Program) -> str:
    counts: dict[torch.dtype, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            counts[value.dtype] = counts.get(value.dtype, 0) + 1
    return str(max(counts, key=lambda d: counts[d], default=torch.float32)).removeprefix("torch.")


def _require(program: Program, errors: dict[str, float]) -> None:
    limit = TOLERANCE.get(getattr(torch, _dtype(program)), 1e-2)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= limit:
        raise LoweringError(
            f"the folder reloads, and its output {worst} differs from the program by {errors[worst]:.2g} "
            f"relative (limit {limit:.0e}): this architecture computes something else",
            hint="a Hugging Face folder cannot hold this program; use program.save or program.lower",
        )


__all__ = ["FolderReport", "contents", "save_pretrained"]
