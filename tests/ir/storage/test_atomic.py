"""What is written appears whole or not at all: killed, interrupted, on a full disk, or where something else is."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forging import everything_in
from forks import Forks

import graphopt
from graphopt import CheckpointError, Program, UsageError
from graphopt.ir.storage.atomic import WriteError, atomic_file, atomic_folder
from graphopt.ir.storage.safetensors_file import read_header, write_file
from graphopt.ir.weights import InMemory

IDS = torch.full((2, 5), 7)

# a weight that never finishes loading; when it is asked for, part of the file is written
SLOW = """
import sys, time
import graphopt
kind, source, target = sys.argv[1:4]

class Slow:
    def __init__(self, inner):
        self.shape, self.dtype = inner.shape, inner.dtype
    def load(self):
        print("ready", flush=True)
        time.sleep(120)

program = graphopt.load(source)
last = max(program.weights)
program.weights[last] = program.weights[last].with_source(Slow(program.weights[last].source))
program.save(target) if kind == "save" else program.save_pretrained(target)
"""
SLOW_FILE = """
import sys, time
from graphopt.ir.storage.atomic import atomic_file
with atomic_file(sys.argv[3]) as place:
    place.write_text("half of it")
    print("ready", flush=True)
    time.sleep(120)
"""


def stopped_in_the_middle(forks: Forks, kind: str, source: Path, target: Path, how: signal.Signals) -> None:
    """Start writing in another process and stop it there."""
    process = forks.start(SLOW_FILE if kind == "file" else SLOW, kind, source, target)
    assert process.ready("ready"), f"the process never came to write: {process.stderr}"
    process.send(how)
    assert process.wait() != 0, "the process was not stopped"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("kind", ["save", "save_pretrained", "file"])
def test_nothing_half_written_takes_a_place(
    kind: str, how: signal.Signals, forks: Forks, whole: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    older: dict[str, bytes] = {}
    if how is signal.SIGKILL:
        if kind == "file":
            target.write_text("all of the older one")
        else:
            program = graphopt.load(whole)
            program.save(target) if kind == "save" else program.save_pretrained(target)
            older = everything_in(target)
    stopped_in_the_middle(forks, kind, whole, target, how)
    if how is signal.SIGINT:
        assert list(tmp_path.iterdir()) == [], "an interrupted writer leaves something behind"
        return
    if kind == "file":
        assert target.read_text() == "all of the older one"
    else:
        assert everything_in(target) == older, "the older folder was touched before the new one was whole"
    left = [p for p in tmp_path.iterdir() if p != target]
    assert len(left) == 1, "there was nothing half written, so this shows nothing"
    assert left[0].name.startswith(".target.")
    assert left[0].name.endswith(".partial"), "what a killed writer leaves must not look like a result"
    if kind == "save":
        graphopt.load(whole).save(target)
        assert torch.equal(
            graphopt.load(target, check_hashes=True)(IDS).logits, graphopt.load(whole)(IDS).logits
        )


def test_killed_with_no_older_one_there_is_none(forks: Forks, whole: Path, tmp_path: Path) -> None:
    stopped_in_the_middle(forks, "save", whole, tmp_path / "target", signal.SIGKILL)
    assert not (tmp_path / "target").exists()
    with pytest.raises(CheckpointError):
        graphopt.load(tmp_path / "target")


# -- full disks -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB: room for one saved program and no second."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_older_program_and_nothing_else(small_disk: Path, whole: Path) -> None:
    program = graphopt.load(whole)
    program.save(small_disk / "first")
    kept = everything_in(small_disk)
    for write in (program.save, program.save_pretrained):
        for name in ("first", "second", "new/deeper/second"):
            if (write, name) == (program.save_pretrained, "first"):
                continue
            with pytest.raises(WriteError, match="nothing was written"):
                write(small_disk / name)
            assert everything_in(small_disk) == kept, f"{name} was touched, or something is left"
            assert sorted(p.name for p in small_disk.iterdir()) == ["first"], "empty folders are left"
    assert torch.equal(graphopt.load(small_disk / "first")(IDS).logits, program(IDS).logits)


def test_commands_on_a_full_disk_fail_and_leave_nothing(small_disk: Path, whole: Path) -> None:
    from graphopt.cli.running import run

    (small_disk / "filling").write_bytes(b"\0" * 150_000)
    assert run(["optimize", str(whole), "-p", "fuse-projections", "-o", str(small_disk / "o")]) == 1
    assert run(["export", str(whole), "--to", "pt2", "-o", str(small_disk / "o.pt2")]) == 1
    assert run(["lower", str(whole), "--to", "onnx", "-o", str(small_disk / "o.onnx")]) == 1
    assert [p.name for p in small_disk.iterdir()] == ["filling"], "a failed command leaves output"


def test_a_file_that_cannot_grow_is_no_file(whole: Path, tmp_path: Path) -> None:
    program = graphopt.load(whole)
    with files_no_larger_than(20_000):
        with pytest.raises(WriteError):
            program.save(tmp_path / "program")
        with pytest.raises(WriteError), atomic_file(tmp_path / "file") as place:
            place.write_bytes(b"\0" * 30_000)
    assert list(tmp_path.iterdir()) == [], "something is left of what could not be written"
    program.save(tmp_path / "program")


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "file/below/far/below"])
def test_places_that_cannot_be(name: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((WriteError, UsageError)):
        graphopt.load(whole).save(tmp_path / name)
    with pytest.raises((WriteError, UsageError)), atomic_file(tmp_path / name) as place:
        place.write_text("x")
    assert everything_in(tmp_path) == {"file": b"mine"}


# -- errors on the way ------------------------------------------------------------------------------------


@dataclass
class Failing:
    """A weight that cannot be had."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    error: BaseException

    def load(self) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), CheckpointError("gone"), MemoryError(), RuntimeError("cuda"), OSError("network")],
)
@pytest.mark.parametrize("older", [False, True])
def test_an_error_on_the_way_leaves_things_as_they_were(
    error: BaseException, older: bool, whole: Path, tmp_path: Path
) -> None:
    program = graphopt.load(whole)
    if older:
        program.save(tmp_path / "out")
    before = everything_in(tmp_path)
    last = max(program.weights)
    source = program.weights[last].source
    program.weights[last] = program.weights[last].with_source(Failing(source.shape, source.dtype, error))
    expected = WriteError if isinstance(error, OSError) else type(error)
    for write in (program.save, program.save_pretrained):
        with pytest.raises(expected):
            write(tmp_path / ("out" if write == program.save else "other"))
        assert everything_in(tmp_path) == before
        assert {p.name for p in tmp_path.iterdir()} == ({"out"} if older else set())


def test_a_weight_that_is_not_what_was_announced_is_not_written(whole: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Lying(InMemory):
        @property
        def shape(self) -> tuple[int, ...]:
            return (3, 3)

    with pytest.raises(CheckpointError, match=r"declared as \(3, 3\) but loaded as \(2, 2\)"):
        write_file(tmp_path / "x.safetensors", {"a": Lying(torch.ones(2, 2))})


def test_the_older_folder_comes_back_if_the_new_one_cannot_move_in(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only moment when neither is in its place; nothing but a stand-in makes exactly this move fail."""
    program = graphopt.load(whole)
    program.save(tmp_path / "out")
    before = everything_in(tmp_path)
    moves: list[str] = []
    rename = os.rename

    for error in (OSError("the disk went away"), KeyboardInterrupt()):

        def second_fails(old: str, new: str, error: BaseException = error) -> None:
            moves.append(str(old))
            if len(moves) == 2:
                raise error
            rename(old, new)

        moves.clear()
        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises((WriteError, KeyboardInterrupt)):
            program.save(tmp_path / "out")
        assert len(moves) == 3, "the older folder was not put back"
        assert everything_in(tmp_path) == before


# -- what is there already --------------------------------------------------------------------------------


def foreign(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")


def half_ours(place: Path) -> None:
    foreign(place)
    (place / "out" / "program.json").write_text("{}")


def a_file(place: Path) -> None:
    (place / "out").write_text("years of work")


@pytest.mark.parametrize("there", [foreign, half_ours, a_file])
def test_what_is_not_ours_is_not_replaced(there: Callable[[Path], None], whole: Path, tmp_path: Path) -> None:
    there(tmp_path)
    before = everything_in(tmp_path)
    program = graphopt.load(whole)
    for write in (program.save, program.save_pretrained):
        with pytest.raises(UsageError, match="exists and must not be replaced"):
            write(tmp_path / "out")
        assert everything_in(tmp_path) == before


def test_what_arrives_while_we_write_is_not_replaced_either(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out", may_replace=lambda _: False) as place:
            (place / "a").write_text("a")
            foreign(tmp_path)

    with pytest.raises(UsageError):
        write()
    assert everything_in(tmp_path) == {"out/thesis.tex": b"years of work"}


def test_an_empty_folder_and_an_older_program_are_replaced(whole: Path, tmp_path: Path) -> None:
    program = graphopt.load(whole)
    (tmp_path / "out").mkdir()
    program.save(tmp_path / "out")
    graphopt.optimize(program, "fuse-projections", verify="off").save(tmp_path / "out")
    assert graphopt.load(tmp_path / "out").history, "the older program is still there"
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the older program was put aside and kept"


def test_a_link_stays_and_what_it_leads_to_is_replaced(whole: Path, tmp_path: Path) -> None:
    program = graphopt.load(whole)
    program.save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    graphopt.optimize(program, "fuse-projections", verify="off").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert graphopt.load(tmp_path / "real").history
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    foreign(tmp_path)
    with pytest.raises(UsageError, match="is a folder"), atomic_file(tmp_path / "out") as place:
        place.write_text("x")
    assert everything_in(tmp_path) == {"out/thesis.tex": b"years of work"}


def test_a_program_saved_over_its_own_weights_does_not_read_the_new_ones(whole: Path, tmp_path: Path) -> None:
    """Weights are read when needed: after this, their place holds others."""
    first: Program = graphopt.load(whole)
    expected = first(IDS).logits
    first.save(tmp_path / "out")
    opened = graphopt.load(tmp_path / "out")
    fused = graphopt.optimize(opened, "fuse-projections")
    fused.save(tmp_path / "out")
    for stale in (opened.copy(), fused):
        with pytest.raises(CheckpointError, match="has changed"):
            stale(IDS)
    assert torch.allclose(graphopt.load(tmp_path / "out")(IDS).logits, expected, atol=1e-6)
    assert len(read_header(tmp_path / "out" / "weights" / "00001.safetensors")) < len(first.weights)
