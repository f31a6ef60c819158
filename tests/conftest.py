"""What several files of tests share: small checkpoints and programs, made once a session and only read."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amounts
import numpy
import processors
import pytest
import sharing
import torch
import zoo
from forks import Forks
from hypothesis import HealthCheck, settings
from reload_server import ReloadServer

import graphopt
from graphopt import Program
from graphopt.cli import catalogue

# some tests compare to the bit with processes of their own, and sums depend on the number of threads
os.environ["OMP_NUM_THREADS"] = "1"
# what is captured is captured; tests of the cache give it a folder of their own
os.environ["GRAPHOPT_CACHE"] = "off"
torch.set_num_threads(1)

# hypothesis measures how long an example and its making take; a loaded machine must not decide. Where it sees that
# it runs in CI it would draw the same examples every time, which finds nothing new
settings.register_profile(
    "graphopt",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize=False,
)
settings.load_profile("graphopt")

# started in the background, a shell leaves Ctrl-C ignored, which the processes of tests would inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw one seed for the examples of all processes, unless --hypothesis-seed gives it."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.randrange(1 << 32))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say how the examples of this run are drawn again; quiet runs have no header that could."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        reporter.write_line(
            f"the same examples again: --hypothesis-seed={session.config.option.hypothesis_seed}"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one at the end.

    Leave out the cases that only GRAPHOPT_THOROUGH=1 runs; a test that is named alone runs whole.
    """
    items.sort(key=lambda item: amounts.place(item.nodeid))
    processors.skip_overflowing(items)
    if amounts.THOROUGH or any("::" in argument for argument in config.args):
        return
    runs, unused = amounts.split([item.nodeid for item in items])
    if unused:
        raise pytest.UsageError(f"tests/amounts.py names what no test is called: {'; '.join(unused)}")
    left = [item for item, run in zip(items, runs, strict=True) if not run]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item, run in zip(items, runs, strict=True) if run]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test the same random numbers whichever tests ran before it; GRAPHOPT_SEED gives others."""
    torch.manual_seed(int(os.environ.get("GRAPHOPT_SEED", "0")))


@pytest.fixture(scope="session", autouse=True)
def reloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Folders are reloaded by forks of one process that has imported transformers; return what does it for users."""
    from graphopt.backends.huggingface import save as huggingface

    server = ReloadServer(tmp_path_factory.mktemp("reloading") / "said")
    with pytest.MonkeyPatch.context() as patch:
        started = huggingface._child
        patch.setattr(huggingface, "_child", server)
        yield started
    server.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Return what runs code in a process of its own, in which torch and graphopt are imported already."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture
def own_process(reloading: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload folders as users do, in a process of its own."""
    from graphopt.backends.huggingface import save as huggingface

    monkeypatch.setattr(huggingface, "_child", reloading)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the Hugging Face folder of a model of the zoo. Copy it before changing it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            zoo.make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def captured(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Program]:
    """Return the program of a model of the zoo, captured by the first process that asks; passes leave it as it is."""
    made: dict[str, Program] = {}

    def program(name: str) -> Program:
        if name not in made:
            place = sharing.everyones(tmp_path_factory, "captured", name)
            if not place.exists():
                made[name] = graphopt.capture(checkpoint(name))
                sharing.shared(made[name], place)
            else:
                made[name] = graphopt.load(place)
        return made[name]

    return program


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """Capture each checkpoint once a process, wherever it is captured from: for tests of what comes after."""
    from graphopt.frontends import huggingface

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "capture_huggingface", sharing.Once(huggingface.capture_huggingface))
        yield


@pytest.fixture(scope="session")
def saved(
    captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the folder of a saved program of a model of the zoo. Copy it before changing it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = captured(name).save(tmp_path_factory.mktemp("programs") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the catalogue of the command line, as `make docs` and `make wheel` build it."""
    place = tmp_path_factory.mktemp("built") / "catalogue.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "BUILT", place)
        catalogue.build()
    return place


@pytest.fixture
def whole(saved: Callable[[str], Path]) -> Path:
    """Return the folder of a saved program, to be read only."""
    return saved("llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows of tokens: two batches, one to calibrate and one to judge."""
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    numpy.savez(path, input_ids=numpy.random.default_rng(0).integers(3, 100, (16, 8)))
    return path


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with --json and return its document; standard output must hold that and nothing else."""

    from graphopt.cli.running import run

    def call(*arguments: Any, status: int = 0) -> Any:
        capsys.readouterr()
        found = run([*map(str, arguments), "--json"])
        shown = capsys.readouterr()
        assert found == status, f"exit status {found}: {shown.err}"
        document = json.loads(shown.out)
        if status and isinstance(document, dict) and "error" in document:
            assert document["exit_status"] == status
            assert document["message"], "an error without a message"
        return document

    return call
