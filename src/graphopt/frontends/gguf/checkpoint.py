"""Reading a GGUF file as a checkpoint, as if it were a Hugging Face folder of the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .architectures import Architecture, architecture_of, configuration, expected
from .header import Header
from .parts import read_headers
from .tensors import GGUFTensor, tensor_of
from .tokenizer import Vocabulary, read_tokenizer

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Return whether a path is meant as a GGUF file, by its suffix or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor], dict[str, bytes], str]:
    """Return the configuration, tensors, small files and a note of a GGUF file; no weights are read.

    Tensors have the names, shapes and values that the model's own library uses, in float32.

    Raises:
        CheckpointError: the file is damaged, contradicts itself, or is of an unsupported kind.
    """
    header = read_headers(path)
    prefix, kind = architecture_of(header)
    config = configuration(header, prefix, kind)
    tensors = _tensors(header, prefix, kind, config)
    rows = config["vocab_size"]
    vocabulary = read_tokenizer(header, prefix, rows)
    _special(config, vocabulary)
    files = dict(vocabulary.files)
    files["generation_config.json"] = _generation(vocabulary)
    kinds = sorted({stored.kind for stored in header.tensors.values()})
    return (
        config,
        tensors,
        files,
        f"read from GGUF ({', '.join(kinds)}); its weights are float32 from here on",
    )


def _tensors(
    header: Header, prefix: str, kind: Architecture, config: dict[str, Any]
) -> dict[str, GGUFTensor]:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise header.wrong("it has no matrix token_embd.weight, which every model has")
    vocabulary = embedding.shape[0]
    if header.count(f"{prefix}.vocab_size", vocabulary) != vocabulary:
        raise header.wrong(
            f"its entry {prefix}.vocab_size is {header.count(f'{prefix}.vocab_size')}, "
            f"and token_embd.weight has {vocabulary} rows"
        )
    config["vocab_size"] = vocabulary
    tensors: dict[str, GGUFTensor] = {}
    slots = expected(config, kind, vocabulary)
    for name, (slot, shape) in slots.items():
        stored = header.tensors.get(name)
        if stored is None:
            raise header.wrong(f"it has no tensor {name}, which {prefix} with its metadata has")
        if stored.shape != shape:
            raise header.wrong(
                f"{name} has shape {list(stored.shape)}, and {list(shape)} by the metadata of the file"
            )
        heads = {"": 0, "heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"]}
        tensors[slot.name] = tensor_of(header, stored, rotated=heads[slot.rotated], offset=slot.offset)
    for name in header.tensors:
        if name not in slots and name not in kind.tables:
            raise header.wrong(
                f"its tensor {name[:80]!r} is none of those of {prefix}, and may change the model",
                hint="give the model's Hugging Face folder, or report it",
            )
    return tensors


def _special(config: dict[str, Any], vocabulary: Vocabulary) -> None:
    for name in ("bos", "pad"):
        config[f"{name}_token_id"] = vocabulary.special.get(f"{name}_token")
    ends = vocabulary.ends
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None


def _generation(vocabulary: Vocabulary) -> bytes:
    config: dict[str, Any] = {}
    for name in ("bos", "pad"):
        if f"{name}_token" in vocabulary.special:
            config[f"{name}_token_id"] = vocabulary.special[f"{name}_token"]
    if vocabulary.ends:
        config["eos_token_id"] = vocabulary.ends[0] if len(vocabulary.ends) == 1 else vocabulary.ends
    return (json.dumps(config, indent=2) + "\n").encode()
