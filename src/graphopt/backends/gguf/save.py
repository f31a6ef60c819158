"""Export of a program to a GGUF file, which is read back and compared before it takes its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.storage.atomic import atomic_file
from ...ir.weights import TensorSource
from ..huggingface.layers import Skeleton, load
from ..huggingface.save import (
    Recapture,
    compare_again,
    configuration,
    named_tensors,
    require_expressible,
)
from .parameters import architecture_of, require_gguf, tables, write_parameters
from .tensors import Entry, entry
from .tokenizer import PreTokenizers, require_same_tokens, write_tokenizer

# relative to the size of a matrix: far above what a type's rounding costs, far below what another order of rows does
_LIMITS = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.03, "Q4_0": 0.3, "Q4_1": 0.3}


@dataclass
class GgufReport:
    """What was written.

    ``kinds`` tell how many tensors have each type, ``copied`` how many are as they were in another GGUF file, ``codes`` how
    many are integers that were there before, ``rounded`` which were rounded to their type, with their relative error.
    ``errors`` are those of the program's outputs, computed from the values that the file has.
    """

    path: Path
    kinds: dict[str, int] = field(default_factory=dict)
    copied: int = 0
    codes: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def save_gguf(
    program: Program,
    path: str | os.PathLike[str],
    *,
    type: str = "auto",
    recapture: Recapture,
    skeleton: Skeleton | None = None,
    pre_tokenizers: PreTokenizers,
    progress: Callable[[str, int], None] | None = None,
) -> GgufReport:
    """Write the program as a GGUF file of the architecture that it came from.

    Args:
        program: captured from a Hugging Face checkpoint or a GGUF file; passes since then must fit its architecture.
        path: the file; appears whole or not at all.
        type: of matrices: F32, F16, BF16, Q8_0, Q4_0, Q4_1, or auto: blocks that came from a GGUF file as they are, codes
            of quantised matrices where a type holds them exactly, and others in their own floating type. Vectors are
            float32. Rows that are no multiple of 32 are not quantised, and written as F16.
        recapture: how to capture the file again.
        skeleton: how to name the tensors of a configuration's model.
        pre_tokenizers: ways of splitting texts that files have names for.
        progress: called with the name and bytes of each tensor written.

    Raises:
        LoweringError: the format cannot express the program, or what is read back differs.
    """
    gguf = require_gguf()
    if program.origin.kind != "huggingface" or not program.checkpoint:
        raise LoweringError(
            "this program was not captured from a Hugging Face checkpoint or a GGUF file",
            hint="use program.save, program.lower or program.exported_program",
        )
    require_expressible(program, "a GGUF file")
    config = load(configuration(program, skeleton))
    architecture = architecture_of(config)
    sources = named_tensors(program)
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        write_parameters(writer, architecture, config)
        write_tokenizer(writer, program.origin.assets, config, config.vocab_size, pre_tokenizers)
        entries = list(_entries(architecture, config, sources, type))
        if any(e.kind.startswith(("Q", "IQ", "TQ")) for e in entries):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write(gguf, writer, entries, progress)
        report = GgufReport(Path(path))
        for item in entries:
            report.kinds[item.kind] = report.kinds.get(item.kind, 0) + 1
        report.copied = sum(e.how == "copied" for e in entries)
        report.codes = sum(e.how == "codes" for e in entries)
        again = recapture(temporary)
        report.rounded = _require_values(sources, named_tensors(again), entries, architecture, config)
        report.errors = compare_again(_with_values_of(program, again), temporary, "streamed", lambda _: again)
        before = program.origin.assets.get("tokenizer.json")
        if before is not None:
            require_same_tokens(before, again.origin.assets["tokenizer.json"])
    return report


def _stored_names(
    architecture: str, config: Any, sources: dict[str, TensorSource]
) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors, in the model and in the file.

    Raises:
        LoweringError: the file has no place for one.
    """
    gguf = require_gguf()
    (kind,) = [k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for key in sources:
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise LoweringError(f"a GGUF file of {architecture} has no place for {key}")
        yield key, stored


def _entries(
    architecture: str, config: Any, sources: dict[str, TensorSource], wanted: str
) -> Iterator[Entry]:
    for key, stored in _stored_names(architecture, config, sources):
        heads = 0
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        offset = 1.0 if architecture.startswith("gemma") and key.endswith("norm.weight") else 0.0
        yield entry(stored, sources[key], wanted, heads=heads, offset=offset)
    for name, table in tables(architecture, config).items():
        yield Entry(name, "F32", tuple(table.shape), "exact", table.numpy)


def _write(gguf: Any, writer: Any, entries: list[Entry], progress: Callable[[str, int], None] | None) -> None:
    """Write a file, one tensor at a time."""
    numpy_types = {"F32": "float32", "F16": "float16"}
    for item in entries:
        kind = gguf.GGMLQuantizationType[item.kind]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        count = 1
        for length in item.shape:
            count *= length
        # of types with blocks, the library is told the bytes of rows
        stored = torch.empty(0, dtype=getattr(torch, numpy_types.get(item.kind, "uint8"))).numpy().dtype
        shape = (
            item.shape if item.kind in numpy_types else (*item.shape[:-1], item.shape[-1] // values * size)
        )
        writer.add_tensor_info(item.name, shape, stored, count // values * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for item in entries:
        data = item.load()
        writer.write_tensor_data(data)
        if progress is not None:
            progress(item.name, data.nbytes)
        del data
    writer.close()


def _require_values(
    sources: dict[str, TensorSource],
    again: dict[str, TensorSource],
    entries: list[Entry],
    architecture: str,
    config: Any,
) -> dict[str, float]:
    """Return the relative errors of tensors that were rounded; require that the others have the values they had.

    Raises:
        LoweringError: a tensor is another one.
    """
    written = {e.name: e for e in entries}
    errors: dict[str, float] = {}
    for key, stored in _stored_names(architecture, config, sources):
        if key not in again:
            raise LoweringError(f"the file is read back without {key}")
        item = written[stored]
        before, after = sources[key].load().to(torch.float32), again[key].load().to(torch.float32)
        if before.shape != after.shape:
            raise LoweringError(f"{key} is read back with the shape {list(after.shape)}")
        error = float((after - before).norm() / before.norm().clamp(min=1e-30))
        # codes have the values that the scale's own type gives them: wider than the program's, which are rounded
        limit = (
            0.0 if item.how == "copied" else _LIMITS.get(item.kind, 1e-6) if item.how == "rounded" else 5e-3
        )
        if item.how == "exact":
            limit = 1e-6
        if not error <= limit:
            raise LoweringError(f"{key} is read back from {item.kind} with a relative error of {error:.2g}")
        if item.how == "rounded":
            errors[key] = error
    return errors


def _with_values_of(program: Program, again: Program) -> Program:
    """Return the program with the weights that a file has: what is left to compare is what is computed with them."""
    found = program.copy()
    stored = named_tensors(again)
    for node, key in zip(program.checkpoint.values(), named_tensors(program), strict=True):
        if node.op == "placeholder" and key in stored:
            found.weights[node.name] = found.weights[node.name].with_source(stored[key])
    return found


__all__ = ["GgufReport", "save_gguf"]
