"""Sharing weights between ONNX files: each tensor is stored once, however many graphs read it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...ir.errors import LoweringError

SHARED = "weights.data"
_ALIGNMENT = 4096
"""Tensors begin at multiples of this, so that runtimes can map them into memory."""


def share_weights(folder: Path) -> int:
    """Move the large tensors of all files in a folder to ``weights.data`` and return its size in bytes.

    Args:
        folder: with model files and their external data.

    Raises:
        LoweringError: a file reads other values than before.
    """
    import onnx

    offsets: dict[str, tuple[int, int]] = {}
    before: dict[Path, dict[str, str]] = {}
    end = 0
    with (folder / SHARED).open("wb") as shared:
        for path in sorted(folder.glob("*.onnx")):
            model = onnx.load(str(path), load_external_data=False)
            external = {
                t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
            }
            if not external or path.stem.endswith("_ctx"):
                continue
            before[path] = {}
            for name, tensor in external.items():
                data = _bytes(folder, tensor)
                mark = before[path][name] = hashlib.sha256(data).hexdigest()
                if mark not in offsets:
                    end += -end % _ALIGNMENT
                    shared.seek(end)
                    shared.write(data)
                    offsets[mark] = (end, len(data))
                    end += len(data)
                _refer(tensor, *offsets[mark])
            path.write_bytes(model.SerializeToString())
    for path, marks in before.items():
        (folder / f"{path.name}.data").unlink()
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            if (
                tensor.name in marks
                and hashlib.sha256(_bytes(folder, tensor)).hexdigest() != marks[tensor.name]
            ):
                raise LoweringError(f"{path.name} reads other values of {tensor.name} than were written")
    return end


def _bytes(folder: Path, tensor: Any) -> bytes:
    location = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / location["location"]).open("rb") as file:
        file.seek(int(location.get("offset", 0)))
        data: bytes = file.read(int(location["length"]))
    return data


def _refer(tensor: Any, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", SHARED), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
