"""The training loop: a run that is interrupted anywhere ends as the one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from forks import Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from graphopt import CheckpointError, UsageError
from graphopt.training import Settings, train
from graphopt.training.loop import DivergedError
from graphopt.training.state import FILE, locked


def network() -> nn.Module:
    """Dropout, running statistics and tied weights: what a resumption can lose."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.GELU())
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embed(ids)))

    torch.manual_seed(5)
    return Tied()


def batch(number: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(11, (16,), generator=torch.Generator().manual_seed(number))}


def loss(module: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(given["ids"]), (given["ids"] + 3) % 11)


SETTINGS = Settings(steps=60, learning_rate=1e-2, warmup=5, weight_decay=0.1, accumulate=2, seed=7)


def trained(work_dir: Path | None, **options: object) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = network()
    record = train(module, batch, loss, SETTINGS, work_dir=work_dir, device="cpu", **options)  # type: ignore[arg-type]
    return module.state_dict(), record.losses


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


CHILD = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_training as t
folder, steps, sent = pathlib.Path(sys.argv[1]), {steps}, []
def stopping(module, given):
    # a parent that sends the signal may come too late on a loaded machine
    if not sent and t.step_on_disk(folder) >= steps:
        sent.append(steps)
        os.kill(os.getpid(), {number})
    return t.loss(module, given)
try:
    t.train(t.network(), t.batch, stopping, t.SETTINGS, work_dir=folder, device="cpu", save_every=0.0)
except KeyboardInterrupt as stop:
    print(stop, flush=True)
"""


def stopped(forks: Forks, folder: Path, steps: int, how: signal.Signals) -> tuple[int, str]:
    """Let a process train until so many steps are on disk, and stop itself then; return its status and what it said."""
    code = CHILD.format(tests=str(TESTS / "training"), steps=steps, number=int(how))
    status, done = forks.run(code, folder)
    return status, done.stdout


def step_on_disk(folder: Path) -> int:
    path = folder / FILE
    if not path.is_file():
        return 0
    import json

    with safe_open(str(path), framework="pt") as file:
        return len(json.loads(file.metadata()["graphopt.training"])["record"]["losses"])


def test_a_killed_run_ends_with_the_same_weights(forks: Forks, tmp_path: Path) -> None:
    """Wrong if a state on disk is ever half written, or lacks anything that the next step depends on."""
    torch.set_num_threads(1)
    expected, losses = trained(None)
    for steps in (5, 20, 35):
        assert stopped(forks, tmp_path / "run", steps, signal.SIGKILL)[0] == -signal.SIGKILL
        assert step_on_disk(tmp_path / "run") == steps
    (tmp_path / "run" / f".{FILE}.1.abcd.partial").write_bytes(b"left by a process that was killed")
    found, seen = trained(tmp_path / "run")
    assert seen == losses, "the record of a resumed run differs"
    assert same(found, expected)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["training.lock", FILE], "rubbish was left"


def test_ctrl_c_ends_between_steps_with_the_state_on_disk(forks: Forks, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    status, said = stopped(forks, tmp_path, 3, signal.SIGINT)
    assert status == 0, "the interruption was not an orderly one"
    done = step_on_disk(tmp_path)
    assert done in (4, 5), "the step under way was not brought to its end, or more than one came after it"
    assert f"stopped after step {done}" in said
    assert same(trained(tmp_path)[0], trained(None)[0])


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first, _ = trained(tmp_path)

    def never(number: int) -> dict[str, torch.Tensor]:
        raise AssertionError("a finished run asked for data")

    module = network()
    record = train(module, never, loss, SETTINGS, work_dir=tmp_path, device="cpu")
    assert record.step == SETTINGS.steps
    assert same(module.state_dict(), first)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    def half(number: int) -> dict[str, torch.Tensor]:
        whole = torch.arange(22) % 11
        return {"ids": whole[(number % 2) * 11 :][:11]}

    def whole(number: int) -> dict[str, torch.Tensor]:
        return {"ids": torch.arange(22) % 11}

    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)).double()

    def wanted(m: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(m(given["ids"]), given["ids"])

    first, second = module(), module()
    train(first, half, wanted, Settings(steps=5, accumulate=2), device="cpu")
    train(second, whole, wanted, Settings(steps=5), device="cpu")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_other_random_numbers_and_frozen_weights_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    module = network()
    frozen = module.body[0].weight  # type: ignore[index, union-attr]
    frozen.requires_grad_(False)
    before = frozen.clone()
    torch.manual_seed(3)
    train(module, batch, loss, Settings(steps=3, weight_decay=0.5), device="cpu")
    assert torch.equal(torch.rand(4), expected), "training drew from the caller's random numbers"
    assert torch.equal(frozen, before)
    assert module.training, "the module came back in another mode"


def test_measurements_are_recorded_in_evaluation_mode() -> None:
    modes = []

    def measure(module: nn.Module) -> dict[str, float]:
        modes.append((module.training, torch.is_grad_enabled()))
        return {"x": len(modes)}

    record = train(network(), batch, loss, Settings(steps=7), device="cpu", measure=measure, measure_every=3)
    assert record.measured == [(3, {"x": 1.0}), (6, {"x": 2.0}), (7, {"x": 3.0})]
    assert modes == [(False, False)] * 3


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    stamp = (tmp_path / FILE).read_bytes()
    other = Settings(steps=61, learning_rate=1e-2, warmup=5, weight_decay=0.1, accumulate=2, seed=7)
    with pytest.raises(UsageError, match="steps was 60, is 61"):
        train(network(), batch, loss, other, work_dir=tmp_path, device="cpu")
    with pytest.raises(UsageError, match=r"another module: 0\.weight is"):
        train(nn.Sequential(nn.Linear(2, 2)), batch, loss, SETTINGS, work_dir=tmp_path, device="cpu")
    assert (tmp_path / FILE).read_bytes() == stamp, "a refused run changed the state of the other one"


@pytest.mark.parametrize("damage", ["short", "other"])
def test_a_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / FILE
    if damage == "short":
        trained(tmp_path)
        path.write_bytes(path.read_bytes()[:200])
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"training\.safetensors is not the state"):
        trained(tmp_path)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UsageError, match="another process"):
        trained(tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    def broken(module: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        value = loss(module, given)
        return value * float("nan") if step_on_disk(tmp_path) >= 4 else value

    with pytest.raises(DivergedError, match="the loss is nan at step 5"):
        trained_with(broken, tmp_path)
    assert step_on_disk(tmp_path) == 4
    assert same(trained(tmp_path)[0], trained(None)[0]), "what was on disk was spoilt too"


def trained_with(wanted: object, folder: Path) -> None:
    train(network(), batch, wanted, SETTINGS, work_dir=folder, device="cpu", save_every=0.0)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_learning_rates_rise_and_fall(steps: int, warmup: int, final: float, schedule: str) -> None:
    made = Settings(steps=steps, warmup=warmup, final=final, schedule=schedule, learning_rate=2.0)  # type: ignore[arg-type]
    rates = [made.rate(step) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(0 < r <= 2.0 + 1e-12 for r in rising)
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(2.0 * (1.0 if schedule == "constant" else final) - 1e-9 <= r <= 2.0 for r in falling)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"warmup": -1}, {"accumulate": 0},
        {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"schedule": "exponential"}, {"final": 1.5},
        {"clip": -1.0}, {"weight_decay": -0.1}, {"weight_decay": float("nan")}, {"clip": float("nan")},
    ],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**{"steps": 5, **wrong})  # type: ignore[arg-type]


def test_progress_is_written_to_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.training import shown

    monkeypatch.setattr(shown, "_INTERVAL", 0.0)
    train(network(), batch, loss, Settings(steps=3), device="cpu", progress=shown.Shown("a run"))
    said = capsys.readouterr().err
    assert "a run: step 2 of 3, loss" in said
    assert "minutes left" in said


def test_a_module_of_a_program_trains(tmp_path: Path) -> None:
    import graphopt

    torch.manual_seed(0)
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4))
    module = program.module()

    def given(number: int) -> dict[str, torch.Tensor]:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(number))
        return {"x": x, "y": torch.stack([x.sum(-1), x[:, 0]], -1)}

    def squared(m: nn.Module, g: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(m(g["x"]), g["y"])

    record = train(
        module, given, squared, Settings(steps=150, learning_rate=2e-2), work_dir=tmp_path, device="cpu"
    )
    assert record.losses[-1] < 0.1 * record.losses[0]
    assert os.listdir(tmp_path)
