"""Checkpoints, exported files and inputs that are damaged or hostile: refused with the reason, nothing executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import (
    Canary,
    canary_code,
    everything_in,
    pickled,
    rewrite_archive,
    safetensors_parts,
    write_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import CheckpointError, GraphoptError
from graphopt.frontends.checkpoint_files import read_folder
from graphopt.ir.storage.safetensors_file import read_header

Folders = Callable[[str], Path]


@pytest.fixture
def folder(checkpoint: Folders, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test that damages it."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(folder: Path) -> dict[str, Any]:
    """Turn the single weight file into two with an index, and return the index."""
    header, data = safetensors_parts(folder / "model.safetensors")
    header.pop("__metadata__", None)
    (folder / "model.safetensors").unlink()
    names = sorted(header)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, members in enumerate((names[:7], names[7:]), start=1):
        file, place, kept, raw = f"part-{number}.safetensors", 0, {}, b""
        for name in members:
            start, end = header[name]["data_offsets"]
            kept[name] = header[name] | {"data_offsets": [place, place + end - start]}
            raw, place = raw + data[start:end], place + end - start
            index["weight_map"][name] = file
        write_safetensors(folder / file, kept, raw)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


# -- safetensors ------------------------------------------------------------------------------------------


def test_every_truncation_of_a_weight_file_is_noticed_before_any_value_is_read(
    checkpoint: Folders, tmp_path: Path
) -> None:
    whole = (checkpoint("bert") / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            read_header(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole)
    assert len(read_header(tmp_path / "cut.safetensors")) > 10, "the whole file must be readable"


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": ONE | {"shape": [2**39, 2**39]}}, b"\0" * 8),
        ({"a": ONE | {"shape": [2**62]}}, b"\0" * 8),
        ({"a": ONE | {"shape": [-2]}}, b"\0" * 8),
        ({"a": ONE | {"shape": [2.0]}}, b"\0" * 8),
        ({"a": ONE | {"shape": [True, 2]}}, b"\0" * 8),
        ({"a": ONE | {"shape": "2"}}, b"\0" * 8),
        ({"a": ONE | {"shape": [1] * 1000 + [2]}}, b"\0" * 8),
        ({"a": ONE | {"shape": [3]}}, b"\0" * 8),
        ({"a": ONE | {"data_offsets": [8, 0]}}, b"\0" * 8),
        ({"a": ONE | {"data_offsets": [-8, 0]}}, b"\0" * 8),
        ({"a": ONE | {"data_offsets": [0, 8, 16]}}, b"\0" * 16),
        ({"a": ONE | {"data_offsets": [0, 10**30]}}, b"\0" * 8),
        ({"a": ONE | {"dtype": "F4"}}, b"\0" * 8),
        ({"a": ONE | {"dtype": ["F32"]}}, b"\0" * 8),
        ({"a": ONE, "b": ONE}, b"\0" * 8),
        ({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, b"\0" * 12),
        ({"a": ONE, "b": ONE | {"data_offsets": [16, 24]}}, b"\0" * 24),
        ({"a": ONE | {"data_offsets": [8, 16]}}, b"\0" * 16),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        ({"a": 5}, b""),
        ([1, 2], b""),
        (b"{" * 100, b""),
        (b"[" * 100_000, b""),
        (b'{"a": \xff}', b""),
        (b'{"a": ' + json.dumps(ONE).encode() + b', "a": ' + json.dumps(ONE).encode() + b"}", b"\0" * 8),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(header: Any, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_header(write_safetensors(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_not_allocated(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="header claims"):
        read_header(write_safetensors(tmp_path / "x.safetensors", {"a": ONE}, b"\0" * 8, length))


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200), head=st.booleans())
def test_any_bytes_are_a_weight_file_or_refused(
    raw: bytes, head: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    if head:
        write_safetensors(path, raw[:100], raw[100:])
    else:
        path.write_bytes(raw)
    # any other error would reach the user as an internal one
    with contextlib.suppress(CheckpointError):
        read_header(path)


def test_the_format_s_own_reader_agrees_with_ours(checkpoint: Folders) -> None:
    from safetensors.torch import load_file

    path = checkpoint("bert") / "model.safetensors"
    theirs, ours = load_file(path), read_header(path)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name].load()), f"{name} is read from the wrong place"


def test_a_file_that_changes_after_its_header_was_read_is_not_read_on(folder: Path) -> None:
    entry = read_header(folder / "model.safetensors")["model.norm.weight"]
    assert entry.load().shape == (32,)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(raw[:-8] + b"\0" * 8)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="has changed"):
        entry.load()


# -- folders ----------------------------------------------------------------------------------------------


def test_a_split_checkpoint_holds_the_same_tensors(folder: Path, checkpoint: Folders) -> None:
    split(folder)
    found, expected = read_folder(folder).tensors, read_folder(checkpoint("llama")).tensors
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].load(), expected[name].load()) for name in expected)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "", ".", "x\0y"]
)
def test_an_index_cannot_name_a_file_outside_its_folder(name: str, folder: Path, tmp_path: Path) -> None:
    index = split(folder)
    shutil.copy(folder / "part-1.safetensors", tmp_path / "outside.safetensors")
    lost = {k: v.replace("part-1.safetensors", name.format(outside=tmp_path / "outside.safetensors"))
            for k, v in index["weight_map"].items()}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": lost}))
    with pytest.raises(CheckpointError, match=r"not a plain file name|does not exist|cannot be read|outside"):
        read_folder(folder)


def test_links_out_of_the_folder_are_not_followed_except_those_of_the_cache(
    folder: Path, tmp_path: Path
) -> None:
    outside = shutil.move(folder / "model.safetensors", tmp_path / "private.safetensors")
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        read_folder(folder)
    # models--x/snapshots/abc/model.safetensors -> ../../blobs/123
    cache = tmp_path / "models--x"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "config.json", snapshot)
    shutil.move(outside, cache / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert len(read_folder(snapshot).tensors) > 10, "the Hugging Face cache must stay readable"


def test_a_small_file_that_links_to_a_secret_is_not_carried_along(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        read_folder(folder).assets()


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"model.norm.weight": 5}, {"nobody": "part-1.safetensors"}, {"model.norm.weight": "gone.safetensors"},
     {"lm_head.weight": "part-2.safetensors"}],
)  # fmt: skip
def test_an_index_that_contradicts_its_files_is_refused(weight_map: Any, folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        read_folder(folder)


def test_a_tensor_in_two_files_is_the_one_that_the_index_names(folder: Path) -> None:
    index = split(folder)
    name = "model.norm.weight"
    assert index["weight_map"][name] == "part-2.safetensors"
    header, data = safetensors_parts(folder / "part-1.safetensors")
    header[name] = {"dtype": "F32", "shape": [32], "data_offsets": [len(data), len(data) + 128]}
    write_safetensors(folder / "part-1.safetensors", header, data + b"\0" * 128)
    assert read_folder(folder).tensors[name].load().abs().max() > 0
    index["weight_map"][name] = "part-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_folder(folder).tensors[name].load().abs().max() == 0, "the index was not obeyed"


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"model_type": ["llama"]}',
        '{"architectures": [5], "model_type": "llama"}',
    ],
)
def test_a_configuration_that_is_none_is_refused(config: str, folder: Path) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config.json"):
        graphopt.capture(folder)


def test_code_of_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    runpy.run_path(str(folder / "evil.py"))
    assert canary.exists(), "the canary must work"
    canary.unlink()
    edit_config(folder, auto_map=auto, model_type="evil")
    with pytest.raises(CheckpointError, match=r"auto_map.*never run"):
        graphopt.capture(folder)
    edit_config(folder, model_type="llama", architectures=["EvilForCausalLM"])
    with pytest.raises(CheckpointError, match=r"EvilForCausalLM.*not one of transformers' own"):
        graphopt.capture(folder)
    for name in ("AutoModel", "pipeline", "PreTrainedModel.__init__", "os.system"):
        edit_config(folder, architectures=[name])
        with pytest.raises(GraphoptError):
            graphopt.capture(folder)
    # an architecture that the library knows by itself is built from the library, whatever else is asked for
    edit_config(folder, architectures=["LlamaForCausalLM"])
    program = graphopt.capture(folder, compare=False)
    assert not any(name.endswith(".py") for name in program.origin.assets), "code would be passed on"
    assert not canary.exists(), "code of the checkpoint was run"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.pth"])
def test_pickles_in_place_of_weights_are_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    raw = pickle.dumps({"model.norm.weight": Canary(canary)})
    pickle.loads(raw)
    assert canary.exists(), "the canary must work"
    canary.unlink()
    (folder / name).write_bytes(raw)
    program = graphopt.capture(folder, compare=False)
    assert name not in program.origin.assets, "a pickle would be passed on to whoever gets the saved program"
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickle.*can run code"):
        graphopt.capture(folder)
    assert not canary.exists(), "the pickle was run"


def test_a_name_that_is_no_folder_is_not_looked_up_on_the_network(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"")
    for source in (
        tmp_path / "none",
        tmp_path / "file.safetensors",
        "nobody/has-this-model",
        "./none",
        "a/b/c",
    ):
        with pytest.raises(CheckpointError):
            graphopt.capture(source)


# -- torch.export archives --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "whole.pt2"
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(torch.nn.Linear(4, 3), (torch.randn(3, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    return path


def hostile(archive: Path, target: Path, canary: Path, road: str) -> Path:
    def change(name: str, raw: bytes) -> bytes:
        if road == "pickle" and name.endswith("sample_inputs/model.pt"):
            return pickled(Canary(canary))
        if road == "expression" and name.endswith("models/model.json"):
            document = json.loads(raw)
            sizes = [
                s for t in document["graph_module"]["graph"]["tensor_values"].values() for s in t["sizes"]
            ]
            next(s["as_expr"] for s in sizes if "as_expr" in s)["expr_str"] = canary_code(canary)
            return json.dumps(document).encode()
        return raw

    return rewrite_archive(archive, target, change)


@pytest.mark.parametrize("road", ["pickle", "expression"])
def test_a_pt2_file_is_not_opened_unless_trusted(road: str, archive: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = hostile(archive, tmp_path / "hostile.pt2", canary, road)
    for place in (path, shutil.copy(path, tmp_path / "hostile.zip"), shutil.copy(path, tmp_path / "hostile")):
        with pytest.raises(CheckpointError):
            graphopt.capture(place)
    with pytest.raises(CheckpointError, match="trust=True"):
        graphopt.optimize(path, "fuse-projections")
    assert not canary.exists(), f"code was run from a file nobody vouched for ({road})"
    with contextlib.suppress(Exception):
        torch.export.load(path)
    if not canary.exists():
        pytest.skip("torch runs this road no longer, so the forgery proves nothing")


def test_a_trusted_pt2_file_is_a_program_and_a_damaged_one_an_error(archive: Path, tmp_path: Path) -> None:
    program = graphopt.capture(archive, trust=True)
    rows = torch.randn(5, 4)
    assert torch.equal(program(rows), torch.export.load(archive).module()(rows))
    (tmp_path / "cut.pt2").write_bytes(archive.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        graphopt.capture(tmp_path / "cut.pt2", trust=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        graphopt.capture(tmp_path / "none.pt2", trust=True)
    assert everything_in(tmp_path).keys() == {"cut.pt2"}, "reading left something behind"
