"""Forged and damaged files, and canaries that tell whether a forgery was executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import calls


class Canary:
    """Pickles as a call that makes an empty file: it is there after the pickle was read by whoever runs it."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return open, (str(self.place), "w")


def canary_code(place: Path) -> str:
    """Return an expression that makes the file when it is evaluated."""
    return f"__import__('os').system('touch {place}')"


def forge(source: Path, target: Path, edit: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """Copy a saved program, change its program.json, and set the manifest right as a forger would."""
    if not target.exists():
        shutil.copytree(source, target)
    document = json.loads((source / "program.json").read_text())
    if edit is not None:
        edit(document)
    return write_program(target, json.dumps(document).encode())


def write_program(folder: Path, raw: bytes) -> Path:
    """Put other bytes in place of program.json, with the hash that belongs to them."""
    (folder / "program.json").write_bytes(raw)
    return list_file(folder, "program.json")


def list_file(folder: Path, name: str, listed: str = "") -> Path:
    """Enter a file with its true hash into the manifest, perhaps under another name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][listed or name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def first_call(document: dict[str, Any], operator: str) -> list[Any]:
    """Return the first node of program.json that calls an operator."""
    for node in document["nodes"]:
        if node[1].startswith(operator):
            found: list[Any] = node
            return found
    raise AssertionError(f"no {operator} to forge")


def safetensors_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """Write a safetensors file whose header is anything, and perhaps claims another length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def rewrite_archive(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Copy a .pt2 archive with its members changed; they stay uncompressed, as torch wants them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def pickled(value: Any) -> bytes:
    """Return what torch.save writes of a value."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def everything_in(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too."""
    return {
        os.path.relpath(os.path.join(at, name), folder): Path(at, name).read_bytes()
        for at, _, names in os.walk(folder)
        for name in names
    }


def refused(
    whole: Path, folder: Path, edit: Callable[[dict[str, Any]], Any], match: str | None = None
) -> None:
    """Check that a forged copy of a saved program is not read, promptly, and that no ``canary`` beside it was made."""
    import graphopt

    forged = forge(whole, folder, edit)
    with calls() as counted, pytest.raises(graphopt.CheckpointError, match=match):
        graphopt.load(forged)
    assert not (folder.parent / "canary").exists(), "reading a forged program ran code from it"
    assert counted.count < 2_000_000, "a forged program keeps the reader busy"
