"""The services a pass uses: data, recorded values, scores, progress."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from ..ir.errors import PipelineError
from ..ir.program import Program
from ..ir.running.execute import interpret, run
from ..ir.running.recurrent_state import begun
from ..ir.storage.content import whole_hash
from ..ir.vocabulary import over_all_tokens
from ..ir.weights import digest
from .metrics import BY_NAME, Batch, default_metric, measure, relative_loss

_CONTEXT_NUMBERS = itertools.count()
OUTPUTS_KEPT = 1 << 26
"""Bytes of a program's outputs that are stored for comparing others with them."""


class Progress(Protocol):
    """Shows the progress of a long computation."""

    def start(self, what: str, total: int) -> None:
        """Begin a computation of ``total`` steps."""

    def step(self, note: str = "") -> None:
        """Count one step."""

    def done(self) -> None:
        """End the computation."""


class Silent:
    """Progress that shows nothing."""

    def start(self, what: str, total: int) -> None:
        """Begin."""

    def step(self, note: str = "") -> None:
        """Advance by one."""

    def done(self) -> None:
        """End."""


class Context:
    """Data and services for a pass.

    The first half of the data is for calibration, the second half for judging the result, so that no budget is
    judged on data that a pass calibrated on. A single batch serves as both, and a note says so.

    Args:
        data: batches of inputs by name.
        evaluate: the user's own metric of a program; lower is better.
        work_dir: where scores are stored, so that an interrupted run can continue.
        seed: the seed of all random numbers.
        progress: shows long computations.
    """

    def __init__(
        self,
        data: Iterable[Batch] | None = None,
        *,
        evaluate: Callable[[Program], float] | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        self.data = list(data) if data is not None else []
        self.user_metric = evaluate
        self.work_dir = Path(work_dir) if work_dir is not None else None
        self.seed = seed
        self.progress: Progress = progress or Silent()
        self.ranks = 1
        self.notes: list[str] = []
        self._number = next(_CONTEXT_NUMBERS)
        self._outputs: tuple[tuple[int, int], dict[int, Mapping[str, Any]]] = (-1, -1), {}

    @property
    def rng(self) -> torch.Generator:
        """A fresh generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)

    def log(self, message: str) -> None:
        """Add a note to the report."""
        self.notes.append(message)

    def batches(self) -> list[Batch]:
        """Return calibration data.

        Raises:
            PipelineError: there is none.
        """
        if not self.data:
            raise PipelineError(
                "this pass needs data", hint="give data= in Python or --data FILE on the command line"
            )
        return self.data[: max(1, len(self.data) // 2)]

    def judging(self) -> list[Batch]:
        """Return data that no pass calibrates on."""
        if len(self.data) == 1:
            note = (
                "one batch of data served for calibration and for judging; give more for an honest judgement"
            )
            if note not in self.notes:
                self.log(note)
        return self.data[len(self.data) // 2 :] if len(self.data) > 1 else self.data

    def data_hash(self) -> str:
        """Return a hash of all data."""
        hasher = hashlib.sha256()
        for batch in self.data:
            for name in sorted(batch):
                hasher.update(name.encode())
                hasher.update(digest(batch[name]).encode())
        return hasher.hexdigest()[:16]

    # -- values and metrics ---------------------------------------------------------------------------

    def record(
        self, program: Program, values: Iterable[fx.Node]
    ) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
        """Yield each calibration batch with the values of some nodes, computed one batch at a time."""
        nodes = list(values)
        for batch in self.batches():
            yield batch, interpret(program, self.bound(program, batch), record=nodes, stop=True)

    def bound(self, program: Program, batch: Batch) -> dict[str, torch.Tensor]:
        """Return a batch as a program takes it, without inputs it does not take and with missing ones filled in.

        Run-time settings are taken from the batch if it has them. Caches and recurrent states are those of a first step.
        """
        accepted = {k: v for k, v in batch.items() if k in program.signature.parameters or k in program.dials}
        return program.bind((), begun(program, accepted))

    def evaluate(
        self, program: Program, reference: Program, *, metric: str = "auto", judge: bool = True
    ) -> tuple[str, float]:
        """Return the metric's name and value; lower is better.

        A program is measured once: a program that a search tried and the pipeline continues with is not run again to be
        judged, and the measurement that judged one pass is that of the original for the next.

        Args:
            program: the program to judge.
            reference: the original, for metrics that compare.
            metric: perplexity, kl, cosine or auto.
            judge: whether to use data for judging, else calibration data.
        """
        if self.user_metric is not None and judge:
            user_metric = self.user_metric
            return "evaluate", program.derived(
                ("metric", self._number, "evaluate"), lambda: float(user_metric(program))
            )
        name = default_metric(program) if metric == "auto" else metric
        data = self.judging() if judge else self.batches()
        compared = name in BY_NAME and BY_NAME[name].compares
        reference_version = (reference.number, reference.version) if compared else ()
        return name, program.derived(
            ("metric", self._number, name, judge, reference_version),
            lambda: measure(name, self._runner(program), self._original(reference), data),
        )

    def loss(
        self, program: Program, reference: Program, *, metric: str = "auto", judge: bool = True
    ) -> float:
        """Return the relative loss that budgets limit."""
        name, value = self.evaluate(program, reference, metric=metric, judge=judge)
        compared = name in ("kl", "cosine")
        original = 0.0 if compared else self.original(reference, metric=metric, judge=judge)
        return relative_loss(name, value, original)

    def original(self, program: Program, *, metric: str = "auto", judge: bool = True) -> float:
        """Return the metric of a program that others are compared with."""
        return self.evaluate(program, program, metric=metric, judge=judge)[1]

    def _runner(self, program: Program) -> Callable[[Batch], Mapping[str, Any]]:
        return lambda batch: over_all_tokens(program, run(program, self.bound(program, batch)))

    def _original(self, program: Program) -> Callable[[Batch], Mapping[str, Any]]:
        """Return a function that runs the program others are compared with; its outputs are stored if they are small."""
        if self._outputs[0] != (program.number, program.version):
            self._outputs = (program.number, program.version), {}
        stored, runner = self._outputs[1], self._runner(program)

        def outputs(batch: Batch) -> Mapping[str, Any]:
            if id(batch) in stored:
                return stored[id(batch)]
            result = runner(batch)
            if _bytes(result) + sum(map(_bytes, stored.values())) <= OUTPUTS_KEPT:
                stored[id(batch)] = result
            return result

        return outputs

    # -- scores -----------------------------------------------------------------------------------------

    def score(
        self,
        program: Program,
        sites: list[str],
        edit: Callable[[Program, str], None],
        *,
        metric: str = "auto",
        key: str = "",
    ) -> dict[str, float]:
        """Return the metric of each site, edited alone on a copy and evaluated on calibration data.

        Stored in ``work_dir`` under a hash of program, data and options; stored scores are not computed again.
        """
        store = self._store(program, f"{key}:{metric}")
        scores: dict[str, float] = {k: v for k, v in self._read(store).items() if k in sites}
        pending = [site for site in sites if site not in scores]
        if not pending:
            return scores
        self.progress.start(f"scoring {len(pending)} sites", len(pending))
        try:
            for site in pending:
                began = time.perf_counter()
                edited = program.copy(analysed=True)
                edit(edited, site)
                scores[site] = self.evaluate(edited, program, metric=metric, judge=False)[1]
                self._write(store, scores)
                self.progress.step(f"{site} {scores[site]:.4g} ({time.perf_counter() - began:.1f} s)")
        finally:
            self.progress.done()
        return {site: scores[site] for site in sites}

    def remember(
        self, program: Program, key: str, compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return scores that are computed once and stored in ``work_dir``."""
        store = self._store(program, key)
        scores = self._read(store)
        if not scores:
            scores = compute()
            self._write(store, scores)
        return scores

    def stored(self, program: Program, key: str) -> dict[str, float]:
        """Return the numbers that :meth:`store` stored for this program, data and key; empty if there are none."""
        return self._read(self._store(program, key))

    def store(self, program: Program, key: str, numbers: dict[str, float]) -> None:
        """Store numbers in ``work_dir``, if there is one, for a run that continues later."""
        self._write(self._store(program, key), numbers)

    def _store(self, program: Program, key: str) -> Path | None:
        if self.work_dir is None:
            return None
        identity = hashlib.sha256(
            "\n".join([whole_hash(program), self.data_hash(), key]).encode()
        ).hexdigest()[:24]
        return self.work_dir / f"scores-{identity}.json"

    def _read(self, store: Path | None) -> dict[str, float]:
        if store is None or not store.is_file():
            return {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return {str(k): float(v) for k, v in json.loads(store.read_text()).items()}
        return {}

    def _write(self, store: Path | None, scores: dict[str, float]) -> None:
        if store is None:
            return
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(scores, indent=1))
        os.replace(temporary, store)


def _bytes(outputs: Mapping[str, Any]) -> int:
    """Return the size of outputs in bytes."""
    return sum(value.nbytes for value in outputs.values() if isinstance(value, torch.Tensor))
