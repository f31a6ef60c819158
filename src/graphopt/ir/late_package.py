"""Parts of a package at once; the package itself, with all that it imports, when something else of it is asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def import_parts(
    package: str,
    parts: Iterable[str],
    others: Iterable[str] = (),
    meanwhile: Mapping[str, Any] | None = None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Import parts of a package without running its ``__init__``, which runs when something else of it is asked for.

    For a process of one's own only: until then a module stands for the package in which its names are still missing.

    Args:
        package: its full name.
        parts: full names of its submodules that can be imported by themselves.
        others: modules elsewhere that need no more of the package than that.
        meanwhile: names that the package has until its own are there.
        then: called when they are.
    """
    if package not in sys.modules:
        # with another release, a part may need the package after all
        with contextlib.suppress(Exception), _standing_for(package, _Rest(dict(meanwhile or {}), then)):
            for name in (*parts, *others):
                importlib.import_module(name)
    for name in (*parts, *others):
        importlib.import_module(name)


@contextlib.contextmanager
def _standing_for(package: str, rest: _Rest) -> Iterator[None]:
    """Let a module stand for a package while parts of it are imported, and afterwards unless one of them fails."""
    before = set(sys.modules)
    parent, _, name = package.rpartition(".")
    spec = find_spec(package)
    assert spec is not None
    module = module_from_spec(spec)
    module.__class__ = _Importing
    sys.modules[package] = module
    setattr(sys.modules[parent], name, module)
    try:
        yield
    except BaseException:
        for imported in set(sys.modules) - before:
            if f"{imported}.".startswith(f"{package}."):
                del sys.modules[imported]
        delattr(sys.modules[parent], name)
        raise
    vars(module).update(rest.meanwhile)
    module.__class__ = _Waiting
    sys.meta_path.insert(0, _Finder(module, rest))


@dataclass(frozen=True)
class _Rest:
    """What becomes of a package later."""

    meanwhile: dict[str, Any]
    then: Callable[[], None]


class _Importing(ModuleType):
    """A package of which parts are being imported."""


class _Waiting(ModuleType):
    """A package that runs its ``__init__`` as soon as a name is asked for that it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        run(self)
        return getattr(self, name)


class _Finder(MetaPathFinder):
    """Runs the package before another part of it is imported, as Python does."""

    def __init__(self, package: ModuleType, rest: _Rest):
        self.package, self.rest = package, rest

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find what the package itself imported; leave everything else to others."""
        if not fullname.startswith(f"{self.package.__name__}."):
            return None
        run(self.package)
        module = sys.modules.get(fullname)
        return None if module is None else ModuleSpec(fullname, _Imported(module))


class _Imported(Loader):
    """Gives a module that was imported meanwhile."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""
        module.__spec__ = self.spec


def run(package: ModuleType) -> None:
    """Run the ``__init__`` of a package of which only parts were imported."""
    for finder in [f for f in sys.meta_path if isinstance(f, _Finder) and f.package is package]:
        sys.meta_path.remove(finder)
        package.__class__ = ModuleType
        for name in finder.rest.meanwhile:
            delattr(package, name)
        assert package.__spec__ is not None
        assert package.__spec__.loader is not None
        package.__spec__.loader.exec_module(package)
        finder.rest.then()
