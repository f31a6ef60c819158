"""The tensors of a checkpoint, found without reading their values, and never unpickled."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..ir.errors import CheckpointError
from ..ir.storage.names import is_asset
from ..ir.storage.safetensors_file import contained, inside, read_header
from ..ir.weights import SafetensorsEntry, TensorSource, numel

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ASSETS = 64 << 20


class FileTensor(TensorSource, Protocol):
    """A tensor of a file, by its name in the file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def key(self) -> str:
        """Its name in the file."""
        ...


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint with its configuration, tensors by name, and the small files beside them.

    ``folder`` is the path of a file if a single one holds everything; ``given`` are then the small files derived from it,
    and ``note`` describes how it was read. ``quantised`` says that matrices were stored in few bits: ``tensors`` has them
    by the names and with the values of plain ones.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, FileTensor]
    given: Mapping[str, builtins.bytes] | None = None
    note: str = ""
    quantised: bool = False

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(numel(t.shape) * t.dtype.itemsize for t in self.tensors.values())

    def assets(self) -> dict[str, builtins.bytes]:
        """Return the small files that belong to the checkpoint: tokenizer, cards, pooling."""
        if self.given is not None:
            return dict(self.given)
        contents: dict[str, bytes] = {}
        total = 0
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if is_asset(name) and path.is_file() and len(path.relative_to(self.folder).parts) <= 2:
                # these files are written out again, perhaps for others to see
                contained(self.folder, name, self.folder)
                size = path.stat().st_size
                if total + size <= _ASSETS:
                    contents[name] = path.read_bytes()
                    total += size
        return contents


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


def read_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's processor of images or audio; empty if it has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            if not isinstance(found, dict):
                raise CheckpointError(f"{folder / name} must hold an object")
            for part in (found, *(found.get(n) for n in ("image_processor", "feature_extractor"))):
                settings |= part if isinstance(part, dict) else {}
    return settings


def read_folder(folder: Path) -> CheckpointFiles:
    """Open a Hugging Face folder; only headers are read.

    Raises:
        CheckpointError: a file is missing, truncated, contradicts itself, or holds pickles in place of tensors.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold an object")
    kind, names = config.get("model_type"), config.get("architectures") or []
    if (
        not isinstance(kind, (str, type(None)))
        or not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
    ):
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type must be a word, architectures a list of words"
        )
    index = folder / "model.safetensors.index.json"
    tensors: dict[str, SafetensorsEntry] = {}
    if index.is_file():
        tensors = _indexed(folder, index)
    elif (folder / "model.safetensors").is_file():
        tensors = read_header(inside(folder, "model.safetensors", folder))
    elif (named := _old_gptq(folder)) is not None:
        tensors = read_header(inside(folder, named, folder / "quantize_config.json"))
    else:
        pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
        if pickles:
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read",
                hint="convert it to safetensors where you trust it, for example with save_pretrained in transformers",
            )
        raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    return CheckpointFiles(folder, config, tensors)


def _old_gptq(folder: Path) -> str | None:
    """Return the name of the weight file in a folder as AutoGPTQ wrote it, before it kept to transformers' names."""
    settings = folder / "quantize_config.json"
    if not settings.is_file():
        return None
    found = read_json(settings)
    named = found.get("model_file_base_name") if isinstance(found, dict) else None
    if isinstance(named, str) and (folder / f"{named}.safetensors").is_file():
        return f"{named}.safetensors"
    files = [path.name for path in folder.glob("*.safetensors")]
    return files[0] if len(files) == 1 else None


def _indexed(folder: Path, index: Path) -> dict[str, SafetensorsEntry]:
    """Return the tensors of the files that an index lists; the index decides if a tensor is in two files."""
    index_table = read_json(index)
    weight_map = index_table.get("weight_map") if isinstance(index_table, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map")
    headers = {name: read_header(inside(folder, name, index)) for name in sorted(set(weight_map.values()))}
    missing = [key for key, file in weight_map.items() if key not in headers[file]]
    if missing:
        raise CheckpointError(
            f"{index} lists {missing[0]!r} and {len(missing) - 1} more that their files do not hold"
        )
    tensors: dict[str, SafetensorsEntry] = {}
    for header in headers.values():
        tensors.update(header)
    tensors.update({key: headers[file][key] for key, file in weight_map.items()})
    return tensors
