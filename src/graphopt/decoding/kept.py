"""What decoders of one program share, and what is kept of them from call to call: weights as they are laid out, and graphs.

It belongs to a state of the program: it goes with the program, with the next edit, and when weights are exchanged or
written to. Of several ways to run (devices, kernels) only the last is kept, so that weights are laid out once.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..ir.program import Program
from ..ir.running.execute import DECODING
from ..ir.weights import InMemory
from .weights import Weights

if TYPE_CHECKING:
    from .running import Running


class Shared:
    """Weights and graphs of a program, for decoders that run it in one way.

    Args:
        device: where it runs.
        compiled: everything between attentions is compiled.
        kernels: "auto" or "exact", as :class:`~graphopt.decoding.cached.CachedDecoder` has them.

    Attributes:
        graphs: by what they compute.
        lock: held while one is made.
    """

    def __init__(self, device: torch.device, compiled: bool, kernels: str):
        self.weights = Weights(device, plain=compiled, exact=kernels == "exact")
        self.graphs: dict[Hashable, Running] = {}
        self.lock = threading.RLock()


def shared(program: Program, device: torch.device | str, compiled: bool, kernels: str) -> Shared:
    """Return what decoders of a program share that run it in this way; made if it is not kept."""
    device = torch.device(device)
    held: dict[str, Any] = program.derived(DECODING, dict)
    way = (device, compiled, kernels)
    if held.get("way") != way:
        held.clear()
        held.update(way=way, shared=Shared(device, compiled, kernels))
    found: Shared = held["shared"]
    return found


def notice_changes(program: Program) -> None:
    """Forget what was made of a program's weights if they are others since, without an edit that says so."""
    sources = [w.source for w in program.weights.values()]
    now = (list(program.weights), [stamp for source in sources for stamp in _stamps(source)])
    # sources are held, so that no other one can have the same id
    before, _ = program.derived("weights when it decoded", lambda: (now, sources))
    if before != now:
        program.changed()
        program.derived("weights when it decoded", lambda: (now, sources))


def _stamps(source: Any) -> Iterator[tuple[int, object]]:
    """Yield what differs if a source, or the file that it reads, is another one or has been written to."""
    version: object = None
    if isinstance(source, InMemory) and not source.tensor.is_inference():
        version = source.tensor._version
    elif (path := getattr(source, "path", None)) is not None:
        try:
            found = path.stat()
            version = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            version = "missing"
    yield id(source), version
    for part in getattr(source, "inputs", ()):
        yield from _stamps(part)
