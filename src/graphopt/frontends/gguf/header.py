"""Reading the header of an untrusted GGUF file: metadata and the location of each tensor.

The library's own reader maps the file and trusts the counts and lengths in it, even past the end of the file. Here
nothing is read or allocated before the file is known to hold the bytes for it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from ...ir.errors import CheckpointError
from .library import block_of, require_gguf

VERSIONS = (2, 3)
# far above what real files have: the largest vocabularies take about 20 MB with their merges
_LARGEST_HEADER = 256 << 20
_LARGEST_COUNTS = {"metadata entries": 1 << 16, "tensors": 1 << 20, "strings of an array": 1 << 22}
_LONGEST_NAME = 1 << 12
_MOST_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """The location and type of a tensor in a file; ``shape`` is in row-major order.

    ``stamp`` shows whether the file is still the one whose header was read.
    """

    name: str
    shape: tuple[int, ...]
    code: int
    start: int
    bytes: int
    path: Path
    stamp: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Name of its type, such as Q4_1."""
        block = block_of(self.code)
        return block[0] if block else str(self.code)


@dataclass(frozen=True)
class Header:
    """The metadata and tensors of a file; arrays of numbers are numpy arrays, of strings lists."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def wrong(
        self, why: str, hint: str = "copy or download it again, or convert the model anew"
    ) -> CheckpointError:
        """Return the error for invalid contents of the file."""
        return CheckpointError(f"{self.path}: {why}", hint=hint)

    def has(self, key: str) -> bool:
        """Return whether the metadata has an entry."""
        return key in self.metadata

    def text(self, key: str, default: str | None = None) -> str:
        """Return an entry that must be a string.

        Raises:
            CheckpointError: it is missing where there is no default, or is something else.
        """
        value = self._entry(key, default)
        if not isinstance(value, str):
            raise self.wrong(f"its entry {key} must be a string, not {_shown(value)}")
        return value

    def count(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 31) -> int:
        """Return an entry that must be a whole number from ``low`` to below ``high``.

        Raises:
            CheckpointError: it is missing where there is no default, or is something else.
        """
        value = self._entry(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise self.wrong(f"its entry {key} must be a whole number of at least {low}, not {_shown(value)}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """Return an entry that must be a finite number above ``low``.

        Raises:
            CheckpointError: it is missing where there is no default, or is something else.
        """
        value = self._entry(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e38:
            raise self.wrong(f"its entry {key} must be a number above {low:g}, not {_shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return an entry that must be true or false."""
        value = self._entry(key, default)
        if not isinstance(value, bool):
            raise self.wrong(f"its entry {key} must be true or false, not {_shown(value)}")
        return value

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        """Return an entry that must be an array of strings.

        Raises:
            CheckpointError: it is missing where there is no default, or is something else.
        """
        value = self._entry(key, default)
        if not isinstance(value, list):
            raise self.wrong(f"its entry {key} must be an array of strings, not {_shown(value)}")
        return value

    def numbers(self, key: str) -> numpy.ndarray[Any, Any]:
        """Return an entry that must be an array of numbers.

        Raises:
            CheckpointError: it is missing or something else.
        """
        value = self._entry(key, None)
        if not isinstance(value, numpy.ndarray) or value.dtype == bool:
            raise self.wrong(f"its entry {key} must be an array of numbers, not {_shown(value)}")
        return value

    def _entry(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.wrong(f"its metadata has no entry {key}")
        return value


def _shown(value: Any) -> str:
    if isinstance(value, numpy.ndarray):
        return f"an array of {value.size} numbers"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    return repr(value)[:60]


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return a stamp that changes if the file changes."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class _Bytes:
    """Sequential reader of a file that checks that bytes exist before reading them."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.place = path, file, size, 0

    def wrong(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole GGUF file: {why}", hint="copy or download it again"
        )

    def take(self, length: int, what: str) -> bytes:
        if length > self.size - self.place:
            raise self.wrong(f"it ends within {what}, which claims {length} bytes at byte {self.place}")
        if self.place + length > _LARGEST_HEADER:
            raise self.wrong(f"{what} claims {length} bytes, more than any header has")
        raw = self.file.read(length)
        if len(raw) != length:
            raise self.wrong(f"it ends within {what}")
        self.place += length
        return raw

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def count(self, what: str, smallest: int) -> int:
        """Read a count of items of at least ``smallest`` bytes each."""
        count = int(self.scalar("Q", f"the number of {what}"))
        if count > _LARGEST_COUNTS[what] or count * smallest > self.size - self.place:
            raise self.wrong(f"it claims {count} {what}, and has {self.size - self.place} bytes left")
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        length = int(self.scalar("Q", f"the length of {what}"))
        if longest is not None and length > longest:
            raise self.wrong(f"{what} claims {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 ({error.reason})") from None

    def value(self, code: int, what: str) -> Any:
        if code in _SCALARS:
            value = self.scalar(_SCALARS[code], what)
            # the shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06
            return float(str(numpy.float32(value))) if code == _FLOAT32 else value
        if code == _BOOL:
            byte = self.take(1, what)[0]
            if byte > 1:
                raise self.wrong(f"{what} is true or false, and holds {byte}")
            return bool(byte)
        if code == _STRING:
            return self.string(what)
        if code == _ARRAY:
            return self.array(what)
        raise self.wrong(f"{what} has the unknown type {code}")

    def array(self, what: str) -> Any:
        code = int(self.scalar("I", what))
        if code == _STRING:
            return [self.string(what) for _ in range(self.count("strings of an array", 8))]
        form = "?" if code == _BOOL else _SCALARS.get(code)
        if form is None:
            raise self.wrong(f"{what} is an array of the unsupported type {code}")
        kind = numpy.dtype("<" + form) if form != "?" else numpy.dtype(bool)
        length = int(self.scalar("Q", what))
        return numpy.frombuffer(self.take(length * kind.itemsize, what), dtype=kind)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; no tensor is read.

    Raises:
        CheckpointError: the file is damaged, of another version or byte order, or has tensors of unknown types.
    """
    require_gguf()
    try:
        stamp = stamp_of(path)
        with path.open("rb") as file:
            return _read(_Bytes(path, file, stamp[0]), stamp)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read(file: _Bytes, stamp: tuple[int, ...]) -> Header:
    if file.take(4, "its first word") != b"GGUF":
        raise file.wrong("it does not begin with GGUF")
    version = int(file.scalar("I", "its version"))
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                f"{file.path} is a big-endian GGUF file, which is not supported",
                hint="convert it with gguf-convert-endian, which comes with the package gguf",
            )
        raise CheckpointError(
            f"{file.path} is a GGUF file of version {version}; versions 2 and 3 are supported",
            hint="convert the model anew with a current llama.cpp",
        )
    count = file.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(file.count("metadata entries", 13)):
        key = file.string("the name of a metadata entry", _LONGEST_NAME)
        if key in metadata:
            raise file.wrong(f"it has two metadata entries {key!r}")
        metadata[key] = file.value(int(file.scalar("I", key)), f"its entry {key!r}")
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise file.wrong(f"its alignment is {_shown(alignment)}")
    if alignment & (alignment - 1):
        raise file.wrong(f"its alignment is {alignment}, which is no power of two")
    entries = [_tensor(file) for _ in range(count)]
    start = -(-file.place // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, code, offset in entries:
        if name in tensors:
            raise file.wrong(f"it has two tensors {name!r}")
        if offset % alignment:
            raise file.wrong(f"{name!r} begins at byte {offset}, which is no multiple of {alignment}")
        size = _size(file, name, shape, code)
        tensors[name] = StoredTensor(name, shape, code, start + offset, size, file.path, stamp)
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.bytes)):
        if tensor.start < end:
            raise file.wrong(f"{tensor.name!r} overlaps another tensor")
        end = tensor.start + tensor.bytes
        if end > file.size:
            raise file.wrong(f"{tensor.name!r} ends at byte {end}, the file at {file.size}")
    return Header(file.path, metadata, tensors)


def _tensor(file: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    name = file.string("the name of a tensor", _LONGEST_NAME)
    label = f"the entry of {name[:80]!r}"
    dimensions = int(file.scalar("I", label))
    if dimensions > _MOST_DIMENSIONS:
        raise file.wrong(f"{name[:80]!r} claims {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", file.take(8 * dimensions, label))
    code, offset = file.scalar("I", label), file.scalar("Q", label)
    # the fastest dimension comes first in the file
    return name, tuple(int(s) for s in reversed(shape)), int(code), int(offset)


def _size(file: _Bytes, name: str, shape: tuple[int, ...], code: int) -> int:
    block = block_of(code)
    if block is None:
        raise CheckpointError(
            f"{file.path}: {name!r} has the type {code}, which the library gguf does not know",
            hint="use a newer gguf, or convert the model anew",
        )
    kind, values, size = block
    count = 1
    for length in shape:
        count *= length
    if not shape or count <= 0 or count >= 1 << 60:
        raise file.wrong(f"{name!r} has the shape {list(shape)}")
    if shape[-1] % values:
        raise file.wrong(f"{name!r} has rows of {shape[-1]} values, and {kind} comes in blocks of {values}")
    return count // values * size
