"""Atomic writing of files and folders: they appear complete or not at all."""

from __future__ import annotations

import contextlib
import contextvars
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import GraphoptError, UsageError


class WriteError(GraphoptError):
    """Nothing was written: the disk is full, or the path cannot be written to."""

    exit_code = 1


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block ends without an error.

    Args:
        path: the folder to make.
        may_replace: tells whether an existing folder may be replaced.

    Raises:
        UsageError: something else is already there.
        WriteError: the disk is full or not writable; nothing is left.
    """
    with _beside(path, lambda target: require_free(target, may_replace)) as (target, temporary):
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        _take_place(temporary, target, may_replace)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block ends without an error.

    Raises:
        UsageError: a folder or a device is there, or the path is protected (:func:`keeping`).
        WriteError: the disk is full or not writable; nothing is left.
    """
    with _beside(path, _require_file_place) as (target, temporary):
        yield temporary
        _settle(temporary)
        _require_file_place(target)
        os.replace(temporary, target)


_kept: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("kept", default=frozenset())


@contextlib.contextmanager
def keeping(path: str | os.PathLike[str]) -> Iterator[None]:
    """Protect a path inside the block: nothing that exists there is replaced, even if it was created meanwhile."""
    token = _kept.set(_kept.get() | {Path(path).resolve()})
    try:
        yield
    finally:
        _kept.reset(token)


@contextlib.contextmanager
def set_aside(path: str | os.PathLike[str]) -> Iterator[None]:
    """Move a file or folder aside inside the block: afterwards it is removed, or restored if nothing replaced it.

    If the process is killed inside the block, the older one stays in the same folder, under a hidden name.
    """
    target = Path(path).resolve()
    old = _fresh(target)
    os.rename(target, old)
    try:
        yield
    finally:
        if target.exists():
            _remove(old)
        else:
            os.rename(old, target)


@contextlib.contextmanager
def _beside(path: str | os.PathLike[str], check: Callable[[Path], None]) -> Iterator[tuple[Path, Path]]:
    """Yield the resolved path and a temporary one in the same folder, which is always removed afterwards."""
    target = Path(path)
    new_folders: list[Path] = []
    temporary = None
    try:
        # replace the target of a link, not the link
        target = target.resolve() if target.is_symlink() else target
        check(target)
        new_folders = _make_folders(target.parent)
        temporary = _fresh(target)
        yield target, temporary
        new_folders = []
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error}", hint="nothing was written; free space, or choose another path"
        ) from error
    finally:
        if temporary is not None:
            _remove(temporary)
        for folder in reversed(new_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its missing parents; return the new ones, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _require_file_place(target: Path) -> None:
    if target.is_dir():
        raise UsageError(f"{target} is a folder", hint="give the name of a file")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is a device or a pipe", hint="give the name of a file")
    _require_not_kept(target)


def _require_not_kept(target: Path) -> None:
    empty = target.is_dir() and not any(target.iterdir())
    if target in _kept.get() and target.exists() and not empty:
        raise UsageError(f"{target} exists already", hint="choose another path, or remove it")


def _fresh(target: Path) -> Path:
    """Return a hidden path in the target's folder, so that renaming stays on one disk."""
    return target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.partial"


def require_free(target: Path, may_replace: Callable[[Path], bool]) -> None:
    """Check that a folder can be made at a path.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or may_replace(target))):
        raise UsageError(
            f"{target} exists and must not be replaced", hint="choose another path, or remove it"
        )
    _require_not_kept(target.resolve())


def _take_place(temporary: Path, target: Path, may_replace: Callable[[Path], bool]) -> None:
    """Move a folder to a path where another may be; if that fails or is interrupted, the older one is restored."""
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


def _settle(root: Path) -> None:
    """Flush files to disk, so that a rename is never persisted before their contents."""
    for path in [root, *root.rglob("*")]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
