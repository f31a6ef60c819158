"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import GraphoptError, UsageError


class WriteError(GraphoptError):
    """Nothing was written: the disk is full, or the place cannot be written to."""

    exit_code = 1


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``path`` when the block ends without an error.

    Args:
        path: the folder to make.
        may_replace: tells whether an existing folder is one of ours.

    Raises:
        UsageError: something else is already there.
        WriteError: the disk is full or not writable; nothing is left.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    try:
        require_free(target, may_replace)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _fresh(target)
        temporary.mkdir()
    except OSError as error:
        raise WriteError(f"cannot write to {target}: {error}") from error
    try:
        yield temporary
        _settle(temporary)
        _take_place(temporary, target, may_replace)
    except OSError as error:
        raise WriteError(
            f"cannot write {target}: {error}", hint="nothing was written; free space, or choose another place"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file that takes the place of ``path`` when the block ends without an error."""
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{target} is a folder", hint="give the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot write to {target}: {error}") from error
    temporary = _fresh(target)
    try:
        yield temporary
        _settle(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise WriteError(f"cannot write {target}: {error}", hint="nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


def _fresh(target: Path) -> Path:
    """Return a hidden name beside the target, so that renaming stays on one disk."""
    return target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.partial"


def require_free(target: Path, may_replace: Callable[[Path], bool]) -> None:
    """Check that a folder can be made at a place.

    Raises:
        UsageError: something is there that would not be replaced.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or may_replace(target))):
        raise UsageError(
            f"{target} exists and is not what would be replaced", hint="choose another place, or remove it"
        )


def _take_place(temporary: Path, target: Path, may_replace: Callable[[Path], bool]) -> None:
    """Put a folder where another may be; if that fails or is interrupted, the older one comes back."""
    require_free(target, may_replace)
    if not target.exists():
        os.rename(temporary, target)
        return
    old = _fresh(target)
    try:
        os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _settle(place: Path) -> None:
    """Have the system write files out, so that a rename never outlives their contents."""
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
