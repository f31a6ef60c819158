"""The user's cache folder: what takes long to make and can be made again, by a hash of all that it depends on.

It is ``graphopt`` in ``$XDG_CACHE_HOME``, by default ``~/.cache/graphopt``. The environment variable ``GRAPHOPT_CACHE``
names another folder, or ``off``. Entries are plain data; each begins with a hash of the rest, so that a damaged one is
recognised, removed and made again. They are written to a temporary name and renamed when whole. When all of them
take more than ``MOST_BYTES``, or are more than ``MOST_ENTRIES``, those that were not used for longest are removed.
A cache never fails: without a folder that can be written to, everything is made each time. This does not import torch.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 1 << 30
MOST_ENTRIES = 500
_ABANDONED = 86400.0  # seconds after which a temporary file belongs to no process any more
_OFF = {"off", "0", "no", "none", "false"}
_KEY = re.compile(r"[0-9a-f]{64}")

_allowed: contextvars.ContextVar[bool] = contextvars.ContextVar("cache_allowed", default=True)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Neither read nor write the cache inside the block."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def folder() -> Path | None:
    """Return the cache folder, which may not exist yet; None if the cache is switched off.

    A folder in the usual place that belongs to another user, or that every user can write to, is not used.
    """
    if not _allowed.get():
        return None
    given = os.environ.get("GRAPHOPT_CACHE", "").strip()
    if given.lower() in _OFF:
        return None
    try:
        if given:
            return Path(given).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")
        # relative paths are to be ignored, by the specification of that variable
        place = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "graphopt"
        return place if _own(place) else None
    except (OSError, RuntimeError):
        return None


def _own(place: Path) -> bool:
    if not place.exists():
        return True
    state = place.stat()
    return not state.st_mode & stat.S_IWOTH and (not hasattr(os, "geteuid") or state.st_uid == os.geteuid())


def key_of(*parts: str) -> str:
    """Return the key of an entry from the texts that it depends on; where one ends and the next begins matters."""
    seen = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        seen.update(f"{len(data)}\n".encode() + data)
    return seen.hexdigest()


def find(kind: str, key: str) -> bytes | None:
    """Return an entry and mark it as used, or None if there is none; a damaged one is removed.

    Args:
        kind: what is cached, such as ``captures``: a folder in the cache.
        key: from :func:`key_of`.
    """
    place = _place(kind, key)
    if place is None:
        return None
    try:
        data = place.read_bytes()
    except OSError:
        return None
    digest, _, content = data.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        discard(kind, key)
        return None
    with contextlib.suppress(OSError):
        os.utime(place)
    return content


def keep(kind: str, key: str, content: bytes) -> None:
    """Write an entry, replacing one of the same key, and remove those that have not been used for longest."""
    place = _place(kind, key)
    if place is None or len(content) > MOST_BYTES // 4:
        return
    temporary = place.with_name(f".{key}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    try:
        place.parents[1].mkdir(parents=True, exist_ok=True, mode=0o700)
        place.parent.mkdir(exist_ok=True, mode=0o700)
        try:
            with temporary.open("xb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        _make_room(place.parents[1], place)
    except OSError:
        # a full disk or a folder that cannot be written to: it is made again next time
        return


def discard(kind: str, key: str) -> None:
    """Remove an entry, such as one that cannot be read."""
    place = _place(kind, key)
    if place is not None:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)


def _place(kind: str, key: str) -> Path | None:
    root = folder()
    return root / kind / key if root is not None and _KEY.fullmatch(key) else None


def _make_room(root: Path, newest: Path) -> None:
    """Remove the entries beyond the limits, least recently used first, and temporary files that were left behind."""
    entries: list[tuple[float, int, Path]] = []
    now = time.time()
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):
            state = path.stat()
            if path.name.endswith(".partial"):
                if now - state.st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
            elif _KEY.fullmatch(path.name) and path != newest:
                entries.append((state.st_mtime, state.st_size, path))
    size, count = newest.stat().st_size, 1
    for _, bytes_, path in sorted(entries, reverse=True):
        size, count = size + bytes_, count + 1
        if size > MOST_BYTES or count > MOST_ENTRIES:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def sources() -> str:
    """Return a hash of all files of this package, which decide what is made; it takes milliseconds."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for kind in ("*.py", "*.json") for p in package.rglob(kind)):
        if path.name != "catalogue.json":
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
