"""Checks of names in a saved program, some of which become source code when a graph is compiled, others paths."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from ..errors import CheckpointError

_INPUT = re.compile(r"[\w.\-/ ]{1,200}")
# torch.fx writes the parts of an attribute's name between quotes, unescaped
_QUOTES = frozenset("\"'\\`")
_LONGEST = 1000
_ASSETS_NEVER = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy",
    ".py", ".pyc", ".so", ".index.json",
)  # fmt: skip


def input_name(name: Any, where: str) -> str:
    """Return the name of an input or run-time setting, which may become a parameter of a generated function.

    Raises:
        CheckpointError: it holds more than letters, digits and ``_ . - /``.
    """
    if not isinstance(name, str) or not _INPUT.fullmatch(name):
        raise CheckpointError(f"{where}: {_short_repr(name)} cannot be the name of an input")
    return name


def weight_name(name: Any, where: str) -> str:
    """Return the name of a weight, which may become an attribute of a generated module.

    Raises:
        CheckpointError: it is empty, too long, or holds quotes or characters that cannot be printed.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= _LONGEST
        or not name.isprintable()
        or _QUOTES & set(name)
    ):
        raise CheckpointError(f"{where}: {_short_repr(name)} cannot be the name of a weight")
    return name


def asset_name(name: Any, where: str) -> str:
    """Return the relative name of a small file beside the weights.

    Raises:
        CheckpointError: it leads out of its folder, or is of a kind that is never saved with a program.
    """
    if not isinstance(name, str) or not is_asset(name):
        raise CheckpointError(
            f"{where}: {_short_repr(name)} is not the name of a file that may be saved with a program"
        )
    return name


def is_asset(name: str) -> bool:
    """Tell whether a file may be saved with a program, by relative name: no weights, code, pickles, hidden files."""
    path = PurePosixPath(name)
    # one spelling only: no absolute path, no "..", no "//", no drive
    plain = str(path) == name and not path.is_absolute() and not set(name) & set("\\:")
    if not plain or not name.isprintable() or len(name) > _LONGEST or name == "config.json":
        return False
    if any(part.startswith(".") for part in path.parts) or not path.parts:
        return False
    return not path.name.lower().endswith(_ASSETS_NEVER)


def _short_repr(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."
