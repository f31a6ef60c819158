"""Safetensors files: headers read with suspicion, tensors written one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .errors import CheckpointError
from .weights import SafetensorsEntry, TensorSource, numel

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LARGEST_HEADER = 100 << 20


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
        found[name] = SafetensorsEntry(path, name, tuple(shape), DTYPES[dtype], 8 + length + start)
    spans.sort()
    place = 0
    for start, end, name in spans:
        if start != place:
            raise wrong(f"{name!r} overlaps another tensor or leaves a gap")
        place = end
    if 8 + length + place != size:
        raise wrong(f"its tensors end at byte {8 + length + place}, the file at {size}")
    return found


def write_file(
    path: Path,
    tensors: Mapping[str, TensorSource],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write tensors to a safetensors file; each is loaded, written and freed before the next.

    Args:
        path: the file.
        tensors: by name; shapes and types are known beforehand.
        metadata: strings for the header.
        progress: called with the name and bytes of each tensor written.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    # wide types first, as the format's own writer does, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        source = tensors[name]
        size = numel(source.shape) * source.dtype.itemsize
        if source.dtype not in codes:
            raise CheckpointError(f"{name} has the type {source.dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": codes[source.dtype],
            "shape": [int(s) for s in source.shape],
            "data_offsets": [place, place + size],
        }
        place += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for name in order:
            tensor = tensors[name].load()
            if tuple(tensor.shape) != tuple(tensors[name].shape) or tensor.dtype != tensors[name].dtype:
                raise CheckpointError(f"{name} was announced as {tensors[name].shape} and came as {tuple(tensor.shape)}")
            data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(data))
            if progress is not None:
                progress(name, data.nbytes)
            del tensor, data
