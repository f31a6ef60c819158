"""Captures that are found in the cache: equal to fresh ones, and only where nothing they depend on has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
import zoo
from amounts import cases
from paths import ROOT
from sharing import Once

import graphopt
from graphopt import Program, cache
from graphopt.cli.inspecting import what_passes_could_do
from graphopt.frontends import huggingface
from graphopt.ir.compat import symbol_range
from graphopt.ir.facts import Capture
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.text import source_line
from graphopt.ir.weights import InMemory

Folders = Callable[[str], Path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache asks to be captured was captured before, for tests of what the cache then does with it."""
    monkeypatch.setattr(huggingface, "capture_huggingface", Once(huggingface.capture_huggingface))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each capture that was asked for."""
    made: list[Any] = []
    capture = huggingface.capture_huggingface

    def counting(source: Any, *args: Any, **options: Any) -> Program:
        made.append(source)
        return capture(source, *args, **options)

    monkeypatch.setattr(huggingface, "capture_huggingface", counting)
    return made


def entries(place: Path) -> list[Path]:
    return sorted(p for p in place.rglob("*") if p.is_file())


def weights_of(program: Program) -> list[Any]:
    """Everything of the weights, those in no file by their bytes."""
    return [
        (
            node,
            w.name,
            w.names,
            w.kind,
            w.persistent,
            w.trainable,
            w.source.load().numpy().tobytes() if isinstance(w.source, InMemory) else w.source,
        )
        for node, w in program.weights.items()
    ]


def sizes_of(program: Program) -> dict[str, Any]:
    # the tracer's own lower limits, 2 for sizes that it takes for many, are not part of a program
    return {name: symbol_range(program.mode, s)[1:] for s, name in program.symbols.items()}


def require_same(first: Program, second: Program) -> None:
    assert first.text(sources=True) == second.text(sources=True)
    for one, other in zip(first.nodes, second.nodes, strict=True):
        assert source_line(one) == source_line(other)
        assert one.meta.get("custom", {}).get("graphopt", {}).get("weight") == other.meta.get(
            "custom", {}
        ).get("graphopt", {}).get("weight")
    assert first.signature == second.signature
    assert sizes_of(first) == sizes_of(second)
    assert first.facts == second.facts
    assert weights_of(first) == weights_of(second)
    assert {k: n.name for k, n in first.checkpoint.items()} == {
        k: n.name for k, n in second.checkpoint.items()
    }
    for name in ("kind", "model_class", "config", "assets", "unused", "notes", "padding"):
        assert getattr(first.origin, name) == getattr(second.origin, name), name
    assert (first.history, first.dials) == (second.history, second.dials)


@pytest.mark.parametrize(
    "name",
    cases(("llama_tied", "gpt_oss", "gemma3", "vit", "deepseek_v3", "roberta"), ("llama", "mixtral", "bert")),
)
def test_a_cached_capture_is_the_fresh_one(
    name: str, checkpoint: Folders, counted: list[Any], tmp_path: Path
) -> None:
    first = graphopt.capture(checkpoint(name))
    second = graphopt.capture(checkpoint(name))
    assert len(counted) == 1, "it is captured again"
    assert not first.origin.recalled
    assert "compared with the model then" in second.origin.recalled
    require_same(first, second)
    ids = example_inputs(first)
    expected, found = first(**ids), second(**ids)
    assert all(torch.equal(expected[key], found[key]) for key in first.signature.output_names)
    assert what_passes_could_do(first) == what_passes_could_do(second)
    saved = [p.save(tmp_path / str(n)) for n, p in enumerate((first, second))]
    one, other = (
        {p.relative_to(s).as_posix(): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in saved
    )
    assert one == other


@pytest.mark.usefixtures("once")
def test_passes_and_exporters_make_the_same_of_it(checkpoint: Folders, tmp_path: Path) -> None:
    made = []
    for n in range(2):
        program = graphopt.optimize(checkpoint("llama"), "fuse-projections, fold-norms, attach-early-exit")
        program.lower("onnx", tmp_path / f"{n}.onnx")
        made.append(program)
    assert made[1].origin.recalled
    assert made[0].text() == made[1].text()
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    state, again = (p.module().state_dict() for p in made)
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_gguf_file_is_found_again(counted: list[Any], tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "qwen3", gguf_files.make("qwen3"))
    first, second = graphopt.capture(path), graphopt.capture(path)
    assert len(counted) == 1
    require_same(first, second)
    gguf_files.write(path, "qwen3", gguf_files.make("qwen3", num_hidden_layers=1))
    assert len(graphopt.capture(path).anatomy.layers) == 1
    assert len(counted) == 2


def _other_values(folder: Path) -> None:
    """Other weights of the same shapes, under the same date."""
    path = folder / "model.safetensors"
    before = path.stat()
    zoo.make("llama", seed=1).save_pretrained(folder)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def _copied(folder: Path) -> None:
    """The same bytes in files of their own."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def _renamed(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")


@pytest.mark.parametrize("change", [_other_values, _config, _copied, _renamed], ids=lambda f: f.__name__)
def test_what_has_changed_is_captured_again(
    change: Callable[[Path], None], checkpoint: Folders, counted: list[Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    ids = torch.arange(3, 9)[None]
    first = graphopt.capture(folder)
    # its own files are gone where they are written anew
    before = first(input_ids=ids)["logits"]
    change(folder)
    second = graphopt.capture(folder)
    assert len(counted) == 2
    assert not second.origin.recalled
    found = second(input_ids=ids)["logits"]
    if change in (_copied, _renamed):
        assert torch.equal(found, before)
    else:
        assert torch.equal(found, graphopt.capture(folder, cache=False)(input_ids=ids)["logits"])
        assert not torch.equal(found, before)
    assert first.text() == second.text() or change is _config


@pytest.mark.usefixtures("once")
def test_options_of_the_capture_are_part_of_the_key(checkpoint: Folders, counted: list[Any]) -> None:
    folder = checkpoint("llama")
    ids = torch.arange(3, 11)[None]
    free = graphopt.capture(folder)
    fixed = graphopt.capture(folder, dynamic=None)
    given = graphopt.capture(folder, {"input_ids": ids})
    graphopt.capture(folder, {"input_ids": ids + 1})
    assert len(counted) == 4
    assert not fixed.signature.sizes
    assert free.signature.sizes
    for options, first in (({"dynamic": None}, fixed), ({"inputs": {"input_ids": ids}}, given)):
        require_same(first, graphopt.capture(folder, **options))
    assert len(counted) == 4


@pytest.mark.usefixtures("once")
def test_a_new_version_captures_again(
    checkpoint: Folders, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphopt.capture(checkpoint("llama"))
    for patch in (
        ("graphopt.cache.sources", lambda: "others"),
        ("importlib.metadata.version", lambda name: "99"),
    ):
        with monkeypatch.context() as context:
            context.setattr(*patch)
            graphopt.capture(checkpoint("llama"))
    assert len(counted) == 3


@pytest.mark.usefixtures("once")
def test_captures_that_were_not_compared_are_not_kept(checkpoint: Folders, place: Path) -> None:
    graphopt.capture(checkpoint("llama"), compare=False)
    assert not place.exists()
    graphopt.capture(checkpoint("llama"), cache=False)
    assert not place.exists()


def test_what_changes_while_it_is_captured_is_not_kept(
    checkpoint: Folders, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    capture = huggingface.capture_huggingface

    def slow(source: Any, *args: Any, **options: Any) -> Program:
        program = capture(source, *args, **options)
        _copied(folder)
        return program

    monkeypatch.setattr(huggingface, "capture_huggingface", slow)
    graphopt.capture(folder)
    assert not entries(place)


def _cut(data: bytes) -> bytes:
    return data[:-7]


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _other(data: bytes) -> bytes:
    """Whole by its hash, and no program."""
    import hashlib

    return hashlib.sha256(b"{}").hexdigest().encode() + b"\n{}"


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    "damage", [_cut, _flipped, _other, lambda _: b""], ids=["cut", "flipped", "other", "empty"]
)
def test_damaged_entries_are_replaced(
    damage: Callable[[bytes], bytes], checkpoint: Folders, counted: list[Any], place: Path
) -> None:
    first = graphopt.capture(checkpoint("llama"))
    (entry,) = entries(place)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    second = graphopt.capture(checkpoint("llama"))
    assert len(counted) == 2
    assert not second.origin.recalled
    assert entry.read_bytes() == whole
    require_same(first, graphopt.capture(checkpoint("llama")))
    assert len(counted) == 2


@pytest.mark.usefixtures("once")
def test_entries_hold_no_weights_of_files(checkpoint: Folders, place: Path) -> None:
    program = graphopt.capture(checkpoint("llama"))
    (entry,) = entries(place)
    content = entry.read_bytes()
    source = program.weight_node("lm_head.weight")
    values = program.weights[source.name].source.load().numpy().tobytes()
    assert values[:64] not in content
    assert b"pickle" not in content


@pytest.mark.usefixtures("once")
def test_without_a_folder_everything_is_captured(
    checkpoint: Folders, counted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for setting in ("off", "0", str(tmp_path / "file")):
        monkeypatch.setenv("GRAPHOPT_CACHE", setting)
        graphopt.capture(checkpoint("llama"), dynamic=None)
    assert len(counted) == 3


def test_a_missing_or_damaged_checkpoint_is_refused_as_ever(tmp_path: Path, place: Path) -> None:
    with pytest.raises(graphopt.CheckpointError, match="neither a folder nor an id"):
        graphopt.capture("no-such/model")
    (tmp_path / "m").mkdir()
    with pytest.raises(graphopt.CheckpointError, match="does not exist"):
        graphopt.capture(tmp_path / "m")
    assert not place.exists()


@pytest.mark.usefixtures("once")
def test_commands_say_so_and_can_do_without(
    checkpoint: Folders, counted: list[Any], told: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from graphopt.cli.running import run

    first = told("inspect", checkpoint("llama"))
    assert told("inspect", checkpoint("llama")) == first
    assert run(["inspect", str(checkpoint("llama"))]) == 0
    assert "found in the cache; compared with the model then" in capsys.readouterr().err
    assert len(counted) == 1
    assert told("inspect", checkpoint("llama"), "--no-cache") == first
    assert len(counted) == 2
    assert cache.folder() is not None


def test_a_second_command_reads_neither_weights_nor_transformers(checkpoint: Folders, place: Path) -> None:
    code = f"""
import builtins, sys
sys.argv = ["graphopt", "inspect", {str(checkpoint("llama"))!r}]
from graphopt.cli import main
try:
    main()
finally:
    heavy = {{"transformers", "tokenizers", "scipy", "networkx", "onnx"}} & set(sys.modules)
    sys.stderr.write(f"heavy: {{sorted(heavy)}}")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )

    first, second = command(), command()
    assert "transformers" in first.stderr.rpartition("heavy: ")[2]
    assert second.stderr.endswith("heavy: []")
    assert (second.returncode, second.stdout) == (0, first.stdout)


def test_a_stamped_capture_is_found_as_it_was(counted: list[Any], tmp_path: Path) -> None:
    config = zoo.make("qwen3_moe").config
    config.num_hidden_layers = 6
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 6
    torch.manual_seed(0)
    type(zoo.make("qwen3_moe"))(config).save_pretrained(tmp_path / "m")
    first = graphopt.capture(tmp_path / "m")
    second = graphopt.capture(tmp_path / "m")
    assert len(counted) == 1
    assert "copied" in second.facts[Capture].layers, "it is to be about stamped layers"
    require_same(first, second)
    for one, other in zip(first.nodes, second.nodes, strict=True):
        assert [n.name for n in one.users] == [n.name for n in other.users]
    assert what_passes_could_do(first) == what_passes_could_do(second)
