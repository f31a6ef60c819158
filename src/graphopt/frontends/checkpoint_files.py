"""The tensors of a checkpoint folder, found without reading their values, and never unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import CheckpointError
from ..ir.safetensors_file import inside, read_header
from ..ir.weights import SafetensorsEntry, numel

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ASSETS = 64 << 20


@dataclass(frozen=True)
class CheckpointFiles:
    """A folder with its configuration, tensors by name, and the small files beside them."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, SafetensorsEntry]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(numel(t.shape) * t.dtype.itemsize for t in self.tensors.values())

    def assets(self) -> dict[str, bytes]:
        """Return the small files that belong to the checkpoint: tokenizer, cards, pooling."""
        found: dict[str, bytes] = {}
        total = 0
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            weights = path.suffix in (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".py", *_PICKLES)
            if weights or name.startswith(".") or "/." in name or name.endswith(".index.json"):
                continue
            if path.is_file() and name != "config.json" and len(path.relative_to(self.folder).parts) <= 2:
                size = path.stat().st_size
                if total + size <= _ASSETS:
                    found[name] = path.read_bytes()
                    total += size
        return found


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        CheckpointError: it is missing, not JSON or nested absurdly.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_folder(folder: Path) -> CheckpointFiles:
    """Open a Hugging Face folder; only headers are read.

    Raises:
        CheckpointError: a file is missing, truncated, contradicts itself, or holds pickles in place of tensors.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold an object")
    index = folder / "model.safetensors.index.json"
    tensors: dict[str, SafetensorsEntry] = {}
    if index.is_file():
        listed = read_json(index)
        weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        for name in sorted({str(v) for v in weight_map.values()}):
            path = inside(folder, name, index)
            tensors.update(read_header(path))
        missing = [key for key in weight_map if key not in tensors]
        if missing:
            raise CheckpointError(f"{index} lists {missing[0]!r} and {len(missing) - 1} more that no file holds")
    elif (folder / "model.safetensors").is_file():
        tensors = read_header(folder / "model.safetensors")
    else:
        pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
        if pickles:
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read",
                hint="convert it to safetensors where you trust it, for example with save_pretrained in transformers",
            )
        raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    return CheckpointFiles(folder, config, tensors)
