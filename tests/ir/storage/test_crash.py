"""Interrupted writing: kill -9, a full disk, Ctrl-C; nothing half written, what was there before intact."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path

import pytest
import torch
from forks import Forks

import graphopt
from graphopt import UsageError
from graphopt.ir.storage.atomic import WriteError

WRITER = textwrap.dedent(
    """
    import sys, time, torch, graphopt
    from dataclasses import replace
    program = graphopt.capture(torch.nn.Linear(64, 64), torch.randn(2, 64))
    class Slow:
        def __init__(self, source):
            self.inner, self.shape, self.dtype = source, source.shape, source.dtype
        def load(self):
            print("writing", flush=True)
            time.sleep(30)
            return self.inner.load()
    for name, weight in list(program.weights.items()):
        program.weights[name] = weight.with_source(Slow(weight.source))
    program.save(sys.argv[1])
    """
)


@pytest.fixture
def program():
    return graphopt.capture(torch.nn.Linear(64, 64), torch.randn(2, 64))


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_saving(program, forks: Forks, tmp_path: Path, stop: signal.Signals) -> None:
    target = tmp_path / "saved"
    program.save(target)
    before = (target / "program.json").read_bytes()
    child = forks.start(WRITER, target)
    assert child.ready("writing"), child.stderr
    child.send(stop)
    assert child.wait() != 0
    assert (target / "program.json").read_bytes() == before, "an interrupted save damaged what was there"
    graphopt.load(target, check_hashes=True)
    visible = [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert visible == ["saved"], "something half written is in plain sight"


def test_full_disk_leaves_nothing(forks: Forks, tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import resource, signal, sys, torch, graphopt
        program = graphopt.capture(torch.nn.Linear(512, 512), torch.randn(2, 512))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            program.save(sys.argv[1])
        except Exception as error:
            print(type(error).__name__)
        """
    )
    _, done = forks.run(code, tmp_path / "saved")
    assert done.stdout.strip() == WriteError.__name__, done.stderr
    assert not list(tmp_path.iterdir()), "a full disk left files behind"


def test_a_folder_of_something_else_is_not_replaced(program, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="must not be replaced"):
        program.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_loads_and_runs_where_transformers_is_not_installed(forks: Forks, tmp_path: Path) -> None:
    import zoo

    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    program = graphopt.capture(zoo.make("llama"), {"input_ids": ids})
    program.save(tmp_path / "saved")
    torch.save(ids, tmp_path / "ids")
    code = textwrap.dedent(
        """
        import sys
        assert "transformers" not in sys.modules
        sys.modules["transformers"] = None
        import torch, graphopt
        program = graphopt.load(sys.argv[1])
        ids = torch.load(sys.argv[2], weights_only=True)
        print(float(program(input_ids=ids).logits.double().sum()))
        """
    )
    status, done = forks.run(code, tmp_path / "saved", tmp_path / "ids")
    assert status == 0, done.stderr
    assert abs(float(done.stdout) - float(program(input_ids=ids).logits.double().sum())) < 1e-3
