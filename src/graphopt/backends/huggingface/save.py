"""Export of a program to a Hugging Face folder, which transformers reloads and compares before it takes its place."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...formats.registry import write_quantised
from ...formats.stored import Written
from ...ir.errors import LoweringError
from ...ir.export_blockers import export_blockers
from ...ir.facts import CheckpointChanges, RemovedLayers
from ...ir.program import Program
from ...ir.running.execute import memory_available
from ...ir.running.fold import computed
from ...ir.running.retype import widen
from ...ir.schema import argument, is_operator
from ...ir.storage.atomic import atomic_folder
from ...ir.storage.safetensors_file import write_file, writer
from ...ir.weights import TensorSource, numel
from .compare import LIMITS, Case, Reference, cases, differences, fixed_inputs, require_same_attention
from .config import renumbered, with_experts, with_widths
from .layers import Skeleton, without_layers

SHARD_BYTES = 5 << 30
SCRIPT = Path(__file__).with_name("reload.py")

# what transformers needs to load matrices of each method and to dequantise them; None: nothing has both
_LIBRARIES: dict[str, str | None] = {
    "compressed-tensors": "compressed_tensors", "torchao": "torchao", "bitsandbytes": "bitsandbytes", "fp8": "",
    "mxfp4": "", "modelopt": None, "gptq": None, "awq": None,
}  # fmt: skip


class _NotLoaded(LoweringError):
    """Transformers did not load a folder."""


Recapture = Callable[[Path], Program]


@dataclass
class FolderReport:
    """What was written, and the relative error of each output against the program.

    ``quantised`` are the matrices written as codes with scales, ``plain`` those that were quantised and are written as
    plain numbers, with the reasons. ``checked`` is how the folder was compared, "reload" or "streamed", and
    ``not_reloaded`` why transformers did not load a quantised one.
    """

    path: Path
    errors: dict[str, float] = field(default_factory=dict)
    checked: str = ""
    not_reloaded: str = ""
    files: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)


def save_pretrained(
    program: Program,
    path: str | os.PathLike[str],
    *,
    check: str = "auto",
    recapture: Recapture | None = None,
    skeleton: Skeleton | None = None,
    progress: Callable[[str, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FolderReport:
    """Write the program in the format of the checkpoint it came from.

    Args:
        program: captured from a Hugging Face checkpoint; passes since then must fit its architecture.
        path: the folder; appears whole or not at all, and replaces nothing but a folder that graphopt wrote.
        check: "reload" runs the folder with transformers in another process; "streamed" captures it again
            and runs both weight by weight, for models larger than memory; "auto" chooses by size, and a folder of quantised
            matrices is reloaded where the library of its method is installed and can load it. Both compare in float32 at
            least, padded on either side, beyond every window that takes no more than seconds to reach.
        recapture: how to capture a folder: for "streamed", and for windows that take longer.
        skeleton: how to name the tensors of a configuration's model.
        progress: called with the name and bytes of each tensor written.
        shard_bytes: size of a weight file.

    Raises:
        LoweringError: the architecture cannot express the program, or the reloaded folder differs from it.
        UsageError: the path holds something that graphopt did not write.
    """
    written, config = contents(program, skeleton)
    tensors = written.tensors
    with atomic_folder(path, may_replace=_is_graphopt_folder) as folder:
        _write_weights(folder, tensors, written.header, shard_bytes, progress)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, data in program.origin.assets.items():
            if name == "hf_quant_config.json":
                # written anew below where it is needed: what stays plain may have changed
                continue
            destination = folder / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(data)
        for name, contents_ in written.files.items():
            (folder / name).write_text(json.dumps(contents_, indent=2) + "\n", encoding="utf-8")
        report = FolderReport(
            Path(path),
            files=sorted(p.name for p in folder.iterdir()),
            quantised=written.kept,
            plain=written.plain,
        )
        total = sum(numel(s.shape) * max(s.dtype.itemsize, 4) for s in tensors.values())
        fits = total < memory_available() // 3
        if check == "auto":
            report.not_reloaded = not_reloaded(written)
            report.checked = "reload" if fits and not report.not_reloaded else "streamed"
        elif check in ("reload", "streamed"):
            report.checked = check
        else:
            raise LoweringError(f"there is no check {check!r}; choose reload, streamed or auto")
        try:
            report.errors = compare_again(program, folder, report.checked, recapture)
        except _NotLoaded as error:
            if check != "auto" or written.settings is None:
                raise
            report.checked, report.not_reloaded = "streamed", str(error)
            report.errors = compare_again(program, folder, "streamed", recapture)
    return report


def contents(program: Program, skeleton: Skeleton | None = None) -> tuple[Written, dict[str, Any]]:
    """Return the tensors to write, of which quantised matrices make several, and the configuration.

    Raises:
        LoweringError: the program did not come from a checkpoint, or a pass made it inexpressible in that format.
    """
    if program.origin.kind != "huggingface" or not program.checkpoint:
        raise LoweringError(
            "this program was not captured from a Hugging Face checkpoint",
            hint="use program.save, program.lower or program.exported_program",
        )
    require_expressible(program, "a Hugging Face folder")
    tensors = named_tensors(program)
    settings = program.origin.config.get("quantization_config")
    changes = program.facts.get(CheckpointChanges) or CheckpointChanges()
    written = write_quantised(settings, tensors, _tables(program, changes.removed_layers))
    config = dict(configuration(program, skeleton))
    config.pop("quantization_config", None)
    if written.settings is not None:
        config["quantization_config"] = written.settings
    return written, config


def require_expressible(program: Program, what: str) -> None:
    """Require that no pass made a program inexpressible in the architecture of its checkpoint.

    Raises:
        LoweringError: one did.
    """
    if blockers := export_blockers(program):
        reasons = "; ".join(f"{reason} ({by})" for by, texts in blockers.items() for reason in texts)
        raise LoweringError(
            f"{what} cannot hold this program: {reasons}",
            hint="use program.save or program.lower",
        )


def named_tensors(program: Program) -> dict[str, TensorSource]:
    """Return the values of a program's weights by the names of its checkpoint, layers numbered anew; nothing is read.

    Raises:
        LoweringError: two of them would have one name.
    """
    changes = program.facts.get(CheckpointChanges) or CheckpointChanges()
    removed = changes.removed_layers
    tensors: dict[str, TensorSource] = {}
    for old, node in program.checkpoint.items():
        name = renumbered(old, removed)
        if name in tensors:
            raise LoweringError(
                f"two tensors would be called {name}: one of a layer that was removed is still read",
                hint="use program.save or program.lower",
            )
        is_weight = node.op == "placeholder"
        tensors[name] = program.weights[node.name].source if is_weight else computed(program, node)[0]
    return tensors


def configuration(program: Program, skeleton: Skeleton | None = None) -> dict[str, Any]:
    """Return the configuration of a program's checkpoint, changed as its passes changed the model.

    Raises:
        LoweringError: the architecture cannot express a change.
    """
    changes = program.facts.get(CheckpointChanges) or CheckpointChanges()
    removed = changes.removed_layers
    config = with_widths(without_layers(program.origin.config, removed, skeleton), changes.ffn_widths)
    if changes.active_experts is not None:
        config = with_experts(config, *changes.active_experts, active=True)
    for before, after in changes.expert_counts:
        config = with_experts(config, before, after, active=False)
    return config


def not_reloaded(written: Written) -> str:
    """Return why transformers is not asked to load a folder, if it is quantised, here; empty if it is."""
    if written.settings is None:
        return ""
    method = str(written.settings.get("quant_method"))
    library = _LIBRARIES.get(method)
    if library is None:
        return f"transformers has no way to load {method} and compute with its plain values"
    if library and importlib.util.find_spec(library) is None:
        return f"the library {library} is not installed"
    return written.not_on_cpu


def _tables(program: Program, removed: Sequence[RemovedLayers]) -> set[str]:
    """Return the names of the tensors that are looked up, tied to a head or not."""
    looked_up = {argument(n, "weight") for n in program.nodes if is_operator(n, "aten.embedding")}
    return {renumbered(name, removed) for name, node in program.checkpoint.items() if node in looked_up}


def _is_graphopt_folder(path: Path) -> bool:
    """Return whether graphopt wrote a folder: a checkpoint that somebody else made or trained is not replaced."""
    files = path.glob("*.safetensors")
    return (path / "config.json").is_file() and any(writer(f) == METADATA["writer"] for f in files)


METADATA = {"format": "pt", "writer": "graphopt"}
"""Marker in the header of weight files, which tells which folders may be replaced."""


def _write_weights(
    folder: Path,
    tensors: dict[str, TensorSource],
    header: dict[str, str],
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
        write_file(folder / "model.safetensors", shards[0], metadata=METADATA | header, progress=progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, metadata=METADATA | header, progress=progress)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(numel(s.shape) * s.dtype.itemsize for s in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def compare_again(
    program: Program, folder: Path, check: str, recapture: Recapture | None
) -> dict[str, float]:
    """Return the largest relative error of each output over all inputs.

    Raises:
        LoweringError: the folder cannot be loaded, or its model computes something else.
    """
    reference = Reference(program)
    compared_cases, unreached = cases(program)
    again = None
    if check == "streamed" or unreached:
        if recapture is None:
            raise LoweringError(
                "this check needs a function that captures the folder again",
                hint="call program.save_pretrained",
            )
        again = recapture(folder)
    worst: dict[str, float] = {}
    reloaded = _reloaded(program, folder, compared_cases, reference.dtype) if check == "reload" else None
    for number, case in enumerate(compared_cases):
        result = reloaded[number] if reloaded is not None else _streamed(again, case, reference)
        errors = differences(program, case, reference(case.inputs), result)
        for name, error in errors.items():
            worst[name] = max(worst.get(name, 0.0), error)
        _require(errors, case, reference)
    if unreached and again is not None:
        require_same_attention(program, again)
    return worst


def _reloaded(
    program: Program, folder: Path, compared_cases: list[Case], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Run the folder in a process that imports transformers and not graphopt."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as directory:
        inputs_path, outputs_path = (
            Path(directory) / "inputs.safetensors",
            Path(directory) / "outputs.safetensors",
        )
        fixed = fixed_inputs(program)
        inputs = {
            f"{i}/{k}": v
            for i, case in enumerate(compared_cases)
            for k, v in {**case.inputs, **fixed}.items()
        }
        save_file(
            {k: widen(v, dtype).clone(memory_format=torch.contiguous_format) for k, v in inputs.items()},
            inputs_path,
        )
        name = program.origin.model_class.partition(":")[2]
        status, message = _child(
            [str(folder), name, str(inputs_path), str(outputs_path), str(dtype).removeprefix("torch.")]
        )
        if status != 0:
            last = message.strip().splitlines()[-1:] or ["no message"]
            raise _NotLoaded(
                f"transformers cannot load what was written: {last[0]}",
                hint="the architecture cannot express this program; use program.save or program.lower",
            )
        results: list[dict[str, torch.Tensor]] = [{} for _ in compared_cases]
        for label, value in load_file(outputs_path).items():
            number, _, output = label.partition("/")
            results[int(number)][output] = value
    return results


def _child(arguments: list[str]) -> tuple[int, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return process.returncode, process.stderr


def _streamed(again: Program | None, case: Case, reference: Reference) -> dict[str, Any]:
    assert again is not None
    accepted = {k: v for k, v in case.inputs.items() if k in again.signature.inputs}
    return Reference(again, reference.dtype)(again.bind((), accepted))


def _require(errors: dict[str, float], case: Case, reference: Reference) -> None:
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= LIMITS[reference.dtype]:
        return
    limit = reference.limit(case)
    if not errors[worst] <= limit:
        tokens = next((f" of {v.shape[1]} tokens" for v in case.inputs.values() if v.dim() == 2), "")
        raise LoweringError(
            f"the folder reloads, and its output {worst} differs from the program by {errors[worst]:.2g} "
            f"relative (limit {limit:.1g}) on inputs{tokens}{case.label}: this architecture computes something else",
            hint="a Hugging Face folder cannot hold this program; use program.save or program.lower",
        )


__all__ = [
    "FolderReport",
    "Recapture",
    "compare_again",
    "configuration",
    "contents",
    "named_tensors",
    "save_pretrained",
]
