"""Safetensors files: headers are checked strictly, tensors are written one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..weights import SafetensorsEntry, TensorSource, numel

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_LARGEST_HEADER = 100 << 20


def inside(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a file that must be directly in the folder.

    Raises:
        CheckpointError: the name leads elsewhere, or there is no such file.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(
            f"{where} names the file {name!r}, which is not a plain file name in this folder"
        )
    return contained(folder, name, where)


def contained(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a file in the folder or below it; links out of the folder are refused.

    The Hugging Face cache is an exception: its snapshot folders have links into the folder ``blobs`` of the same model.

    Raises:
        CheckpointError: the name or a link leads elsewhere, or there is no such file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{where} names {name!r}, which lies outside the folder")
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{where} names {name[:100]!r}, which cannot be read: {error}") from None
    if not is_file:
        raise CheckpointError(f"{where} names {name!r}, which does not exist")
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in homes):
        raise CheckpointError(
            f"{path} is a link that leaves its folder, to {real}",
            hint="links out of a folder are not followed; copy the file into it, or make a hard link",
        )
    return path


@dataclass(frozen=True)
class _Unchanged(SafetensorsEntry):
    """A tensor of a file that must be unchanged since its header was read.

    Another program saved at the same path may have the same size, and its bytes would be read as this tensor.
    """

    stamp: tuple[int, ...] = ()

    def load(self) -> torch.Tensor:
        self._same_file()
        return super().load()

    def load_part(self, dim: int, start: int, end: int) -> torch.Tensor:
        self._same_file()
        return super().load_part(dim, start, end)

    def _same_file(self) -> None:
        try:
            now = _stamp(self.path)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.key!r} from {self.path}: {error}") from error
        if now != self.stamp:
            raise CheckpointError(
                f"{self.path} has changed since tensor {self.key!r} was found in it",
                hint="load the checkpoint or program again; to go on with this one, save it to another place",
            )


def _stamp(path: Path) -> tuple[int, ...]:
    """Return size and modification time of a file, to detect changes."""
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        raise ValueError("a name is used twice")
    return by_name


def read_header(path: Path) -> dict[str, SafetensorsEntry]:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated, or its sizes and offsets do not add up.
    """

    def wrong(why: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is not a complete safetensors file: {why}", hint="copy or download it again"
        )

    try:
        stamp = _stamp(path)
        size = path.stat().st_size
        if size < 8:
            raise wrong(f"it has {size} bytes")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER, size - 8):
                raise wrong(f"its header claims {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise wrong("its header is not an object")
    entries: dict[str, SafetensorsEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise wrong(f"the entry of {name!r} is incomplete") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name!r} has the type {str(dtype)[:40]!r}, which is not supported"
            )
        if (
            not isinstance(shape, list)
            or len(shape) > 64
            or not all(type(s) is int and 0 <= s < 2**40 for s in shape)
        ):
            raise wrong(f"the shape of {name!r} is {str(shape)[:80]}")
        if type(start) is not int or type(end) is not int or not 0 <= start <= end <= size:
            raise wrong(f"the position of {name!r} is {str(start)[:30]} to {str(end)[:30]}")
        if end - start != numel(shape) * DTYPES[dtype].itemsize:
            raise wrong(f"{name!r} has shape {shape} and {end - start} bytes")
        spans.append((start, end, name))
        entries[name] = _Unchanged(path, name, tuple(shape), DTYPES[dtype], 8 + length + start, stamp)
    spans.sort()
    position = 0
    for start, end, name in spans:
        if start != position:
            raise wrong(f"{name!r} overlaps another tensor or leaves a gap")
        position = end
    if 8 + length + position != size:
        raise wrong(f"its tensors end at byte {8 + length + position}, but the file at {size}")
    return entries


def writer(path: Path) -> object:
    """Return the writer recorded in a file's header; None if there is none, or the header is damaged."""
    return read_metadata(path).get("writer")


def read_metadata(path: Path) -> dict[str, object]:
    """Return the strings that a file's header has beside its tensors; none if the header is damaged."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size < min(path.stat().st_size, 1 << 27):
            return {}
        text = file.read(size)
    try:
        found = json.loads(text).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    offset = 0
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
            "data_offsets": [offset, offset + size],
        }
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for name in order:
            tensor = tensors[name].load()
            if tuple(tensor.shape) != tuple(tensors[name].shape) or tensor.dtype != tensors[name].dtype:
                raise CheckpointError(
                    f"{name} was declared as {tensors[name].shape} but loaded as {tuple(tensor.shape)}"
                )
            data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            if progress is not None:
                progress(name, data.nbytes)
            del tensor, data
