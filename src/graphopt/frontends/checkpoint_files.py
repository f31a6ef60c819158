"""The tensors of a checkpoint folder, found without reading their values, and never unpickled."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import CheckpointError
from ..ir.weights import SafetensorsEntry, numel

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LARGEST_HEADER = 100 << 20
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


def inside(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a file that must lie in the folder.

    Raises:
        CheckpointError: the name leads elsewhere, or there is no such file.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{where} names the file {name!r}, which is not a plain file name in this folder")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{where} names {name!r}, which does not exist")
    return path


def read_header(path: Path) -> dict[str, SafetensorsEntry]:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated, or its sizes and offsets do not add up.
    """

    def wrong(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a whole safetensors file: {why}", hint="copy or download it again")

    size = path.stat().st_size
    if size < 8:
        raise wrong(f"it has {size} bytes")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_LARGEST_HEADER, size - 8):
            raise wrong(f"its header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise wrong("its header is not an object")
    found: dict[str, SafetensorsEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise wrong(f"the entry of {name!r} is incomplete") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name!r} has the type {dtype!r}, which is not supported")
        if not isinstance(shape, list) or not all(isinstance(s, int) and 0 <= s < 2**40 for s in shape):
            raise wrong(f"the shape of {name!r} is {str(shape)[:80]}")
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end:
            raise wrong(f"the place of {name!r} is {start} to {end}")
        if end - start != numel(shape) * DTYPES[dtype].itemsize:
            raise wrong(f"{name!r} has shape {shape} and {end - start} bytes")
        spans.append((start, end, name))
        found[name] = SafetensorsEntry(path, name, tuple(shape), DTYPES[dtype])
    spans.sort()
    place = 0
    for start, end, name in spans:
        if start != place:
            raise wrong(f"{name!r} overlaps another tensor or leaves a gap")
        place = end
    if 8 + length + place != size:
        raise wrong(f"its tensors end at byte {8 + length + place}, the file at {size}")
    return found
