"""The files of saved programs: missing, changed, elsewhere, or random bytes. Reading does nothing but read."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amounts import examples
from forging import forge, list_file, refused, safetensors_parts, write_program, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import CheckpointError
from graphopt.ir.storage.write import describe_program

# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["/tmp/x", "..", "a/../../x", "config.json", "evil.py", "pytorch_model.bin", "model.safetensors", ".bashrc", "a/.git",
     "a//b", "C:\\x", "a\0b", "a\nb", "", ".", 5, "EVIL.PY"],
)  # fmt: skip
def test_small_files_cannot_be_written_elsewhere_or_pass_for_others(
    name: Any, whole: Path, tmp_path: Path
) -> None:
    """A saved program is written out again, also as a Hugging Face folder: names of its files decide where."""
    folder = Path(shutil.copytree(whole, tmp_path / "forged"))
    (folder / "notes.txt").write_text("x")
    with contextlib.suppress(ValueError, OSError, TypeError):
        place = folder / "assets" / str(name).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x")
    list_file(folder, "notes.txt", f"assets/{name}")
    refused(whole, folder, lambda d: d["origin"]["assets"].append(name), match="may be saved with a program")


def test_weights_behind_a_link_out_of_the_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = forge(whole, tmp_path / "forged")
    outside = shutil.move(folder / "weights" / "00001.safetensors", tmp_path / "outside.safetensors")
    (folder / "weights" / "00001.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        graphopt.load(folder)


@pytest.mark.parametrize(
    "listed", ["../../outside", "/etc/hostname", "weights/../../outside", "a\0b", "gone.safetensors"]
)
def test_the_manifest_cannot_name_files_elsewhere(listed: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = list_file(forge(whole, tmp_path / "forged"), "program.json", listed)
    with pytest.raises(CheckpointError):
        graphopt.load(folder, check_hashes=True)


@pytest.mark.parametrize("name", ["program.json", "manifest.json", "weights/00001.safetensors"])
def test_a_missing_or_cut_file_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    folder = forge(whole, tmp_path / "forged")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=Path(name).name):
        graphopt.load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="forged"):
        graphopt.load(folder)


def test_wrong_hashes_are_noticed(whole: Path, tmp_path: Path) -> None:
    folder = forge(whole, tmp_path / "forged")
    text = (folder / "program.json").read_text()
    (folder / "program.json").write_text(text.replace("logits", "logitz"))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        graphopt.load(folder)
    (folder / "program.json").write_text(text)
    header, data = safetensors_parts(folder / "weights" / "00001.safetensors")
    write_safetensors(folder / "weights" / "00001.safetensors", header, bytes([data[0] ^ 1]) + data[1:])
    list_file(folder, "program.json")
    graphopt.load(folder)
    with pytest.raises(CheckpointError, match=r"00001.safetensors.*changed or damaged"):
        graphopt.load(folder, check_hashes=True)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"5",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": "graphopt-program", "version": 1}',
        b'{"format": "graphopt-program", "version": 99, "files": {}}',
        b'{"format": "x", "version": 1, "files": {}}',
        b'{"format": "graphopt-program", "version": 1, "files": {"program.json": 5}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(manifest: bytes, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "forged"))
    (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError):
        graphopt.load(folder)
    with pytest.raises(CheckpointError):
        graphopt.load(tmp_path)


# -- anything at all --------------------------------------------------------------------------------------

_WATCHED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pickle.find_class",
            "shutil.rmtree", "os.remove", "os.rename")  # fmt: skip
_seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _WATCHED:
        _seen.append(f"{event} {arguments}")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail if anything inside starts a process, unpickles, or touches a file by name."""
    global _seen
    if not getattr(sys, "_graphopt_audit", False):
        sys.addaudithook(_audit)
        sys._graphopt_audit = True  # type: ignore[attr-defined]
    _seen = []
    try:
        yield
        assert not _seen, f"reading did more than reading: {_seen}"
    finally:
        _seen = None


@pytest.fixture(scope="module")
def scratch(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(saved("llama"), tmp_path_factory.mktemp("scratch") / "program"))


def read_or_refuse(folder: Path) -> bool:
    """Return whether the program was read; what is read must be whole enough to describe and print."""
    with watched():
        try:
            program = graphopt.load(folder)
        except CheckpointError:
            return False
        json.dumps(describe_program(program), allow_nan=False)
        assert program.text()
        assert set(program.input_nodes) == set(program.signature.inputs) | set(program.dials)
    return True


@settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(data: st.DataObject, scratch: Path, whole: Path) -> None:
    raw = bytearray((whole / "program.json").read_bytes())
    places = st.integers(0, len(raw) - 1)
    for place, byte in data.draw(
        st.lists(
            st.tuples(places, st.sampled_from(b'0123456789abz"{}[],:-. _\x00\xff')), min_size=1, max_size=3
        )
    ):
        raw[place] = byte
    read_or_refuse(write_program(scratch, bytes(raw)))


_POOL = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=6),
    st.just([]), st.just({}), st.just([[]]),
    st.sampled_from(["batch", "float32", "linear", "p_lm_head_weight", "batch*2", "aten.mul.Tensor", "__class__", 2**64]),
)  # fmt: skip


@settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_changed_entries_are_refused_or_harmless(data: st.DataObject, scratch: Path, whole: Path) -> None:
    document = json.loads((whole / "program.json").read_text())
    parent, key = None, None
    current: Any = document
    while (
        isinstance(current, (dict, list)) and current and (parent is None or data.draw(st.integers(0, 7)) > 0)
    ):
        parent = current
        key = data.draw(
            st.sampled_from(sorted(current) if isinstance(current, dict) else range(len(current)))
        )
        current = parent[key]
    assert parent is not None
    how = data.draw(st.sampled_from(["replace", "drop", "double"]))
    if how == "replace":
        parent[key] = data.draw(_POOL)
    elif how == "drop":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, copy.deepcopy(current))
    else:
        parent[data.draw(st.text(max_size=4))] = copy.deepcopy(current)
    read_or_refuse(write_program(scratch, json.dumps(document).encode()))


def test_the_watch_sees_what_it_is_for(scratch: Path, whole: Path) -> None:
    """And an unchanged program passes it, so the two tests above test something."""
    with pytest.raises(AssertionError, match="did more than reading"), watched():
        pickle.loads(pickle.dumps(print))
    assert read_or_refuse(write_program(scratch, (whole / "program.json").read_bytes()))
