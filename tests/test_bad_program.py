"""Saved programs that are forged or damaged: reading refuses them, and nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import canary_code, first_call, forge, list_file, safetensors_parts, write_program, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import CheckpointError
from graphopt.ir.serialize.write import describe_program

Document = dict[str, Any]
Edit = Callable[[Document], Any]
IDS = torch.full((2, 5), 7)


@pytest.fixture
def whole(saved: Callable[[str], Path]) -> Path:
    """A saved program; read only."""
    return saved("llama")


def refused(whole: Path, folder: Path, edit: Edit, match: str | None = None) -> None:
    canary = folder.parent / "canary"
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=match):
        graphopt.load(forge(whole, folder, edit))
    assert not canary.exists(), "reading a forged program ran code from it"
    assert time.perf_counter() - began < 20, "a forged program keeps the reader busy"


def test_a_program_that_nobody_touched_is_read(whole: Path, tmp_path: Path) -> None:
    """Everything below would pass if forging alone made programs unreadable."""
    program = graphopt.load(forge(whole, tmp_path / "same"), check_hashes=True)
    assert torch.equal(program(IDS).logits, graphopt.load(whole)(IDS).logits)


# -- operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["aten.save.default", "aten.from_file.default", "os.system", "aten.add_.Tensor", "aten.add.out", "torch.os.system",
     "builtins.eval", "aten.linear", "aten.linear.default.x", "aten.linear.__class__", "aten.__class__.default",
     "aten.relu_.default", "prim.device.default", "_operator.add", "size.pow", "", "aten..default", "math.floor",
     "graphopt.attention.default.__init__", "graphopt.nothing.default", "transformers.grouped_mm_fallback.default",
     5, None, ["aten.linear.default"]],
)  # fmt: skip
def test_only_listed_operators_are_called(name: Any, whole: Path, tmp_path: Path) -> None:
    assert hasattr(torch.ops.aten, "from_file"), "an operator that opens files exists, so a list is needed"

    def edit(document: Document) -> None:
        first_call(document, "aten.linear")[1] = name

    refused(whole, tmp_path / "forged", edit)


def test_the_list_of_operators_holds_none_that_writes_or_reads_files() -> None:
    from graphopt.ir.serialize.allowed import allowed, operator_of

    names = allowed()
    assert len(names) > 300
    for bad in ("save", "from_file", "load", "set_", "resize_", "copy_", "_print", "run", "record_stream"):
        assert f"aten.{bad}" not in names
    mutable = 0
    for full in sorted(names):
        namespace, short = full.split(".")
        packet = getattr(getattr(torch.ops, namespace), short, None)
        for overload in packet.overloads() if packet is not None else ():
            target = getattr(packet, overload)
            if target._schema.is_mutable:
                mutable += 1
                with pytest.raises(CheckpointError):
                    operator_of(f"{full}.{overload}")
    assert mutable > 100, "out= overloads of listed operators exist and must be refused one by one"


# -- code in places that become source --------------------------------------------------------------------


def keyword(canary: Path) -> Edit:
    def edit(document: Document) -> None:
        first_call(document, "aten.linear")[3] = {f"**dict(x={canary_code(canary)}) and {{}}, bias": None}

    return edit


def input_named(canary: Path) -> Edit:
    def edit(document: Document) -> None:
        name = f"x={canary_code(canary)}"
        document["inputs"][2]["name"] = name
        document["parameters"]["position_ids"] = {"leaf": name}
        for node in document["nodes"]:
            if node[5].get("input") == "position_ids":
                node[5]["input"] = name

    return edit


def weight_named(canary: Path) -> Edit:
    def edit(document: Document) -> None:
        code = canary_code(canary).replace(".", "' + chr(46) + '")
        name = f'training"), eval("{code}")) or getattr(self, "training'.replace("'", "\\'")
        document["weights"]["p_lm_head_weight"].update(name=name, names=[name])

    return edit


@pytest.mark.parametrize("road", [keyword, input_named, weight_named])
def test_names_that_become_source_code_hold_none(road: Callable[[Path], Edit], whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path / "forged", road(tmp_path / "canary"))


@pytest.mark.parametrize(("road", "guard"), [(keyword, "check_call"), (input_named, "input_name")])
def test_it_is_these_checks_that_keep_code_out(
    road: Callable[[Path], Edit], guard: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check the forgery runs: torch.fx writes such names into the functions it compiles."""
    import graphopt.ir.serialize.read as reader

    canary = tmp_path / "canary"
    monkeypatch.setattr(reader, guard, lambda name, *rest: name)
    folder = forge(whole, tmp_path / "forged", road(canary))
    with contextlib.suppress(Exception):
        program = graphopt.load(folder)
        program.module()(IDS)
    if not canary.exists():
        pytest.skip("what this guards against is no longer possible")


@pytest.mark.parametrize("name", ["class", "print", "a b", "a.b", "self", "", 5, "ﬁ", "a\n", "linear_1"])
def test_names_of_nodes_are_new_identifiers(name: Any, whole: Path, tmp_path: Path) -> None:
    def edit(document: Document) -> None:
        first_call(document, "aten.linear")[0] = name

    refused(whole, tmp_path / "forged", edit)


# -- sizes ------------------------------------------------------------------------------------------------


SIZES = [
    "__import__('os').system('touch {canary}')", "(" * 5000 + "batch" + ")" * 5000, "batch//0", "batch**9", "batch.__class__",
    "batch if batch else 1", "[batch]", "lambda: 1", "nobody", "", " ", "batch batch", "7 // (sequence - 13)", "-" * 1900 + "batch",
    "batch%7" + "%7" * 400, "*".join(["(batch+sequence)%5"] * 100), "0-batch", "1/2", "1.5", "max(batch)", "max(batch,",
    2**40, 2**70, -1, 1.5, True, None, ["batch"], {"size": "batch"},
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda s: str(s)[:24])
@pytest.mark.parametrize("place", ["value", "input"])
def test_sizes_are_arithmetic_and_nothing_else(size: Any, place: str, whole: Path, tmp_path: Path) -> None:
    if isinstance(size, str):
        size = size.replace("{canary}", str(tmp_path / "canary"))

    def edit(document: Document) -> None:
        if place == "value":
            document["values"][-1] = {"dtype": "float32", "shape": [size]}
        else:
            document["inputs"][0]["shape"] = ["batch", size]

    refused(whole, tmp_path / "forged", edit)


@pytest.mark.parametrize(
    "limits", [[5, 2, 3], [1, None, None], [None, None, 3], [-1, None, 3], [1, None, 10**30], [1, None], "1", [1.5, None, 3], []]
)
def test_limits_of_sizes_are_numbers_in_order(limits: Any, whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path / "forged", lambda d: d["sizes"].update(batch=limits))


# -- structure --------------------------------------------------------------------------------------------


def set_in(*path: Any, value: Any) -> Edit:
    def edit(document: Document) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return edit


def swap_nodes(document: Document) -> None:
    nodes = document["nodes"]
    place = next(i for i, n in enumerate(nodes) if n[1].startswith("aten.linear"))
    nodes.append(nodes.pop(place))


def nest(document: Document) -> None:
    value: Any = 1
    for _ in range(50):
        value = [value]
    first_call(document, "aten.linear")[2].append(value)


STRUCTURE: dict[str, Edit] = {
    "a node that reads what no node defines": lambda d: first_call(d, "aten.linear")[2].__setitem__(0, {"node": "nobody"}),
    "a node that reads itself": lambda d: first_call(d, "aten.linear")[2].__setitem__(0, {"node": "linear"}),
    "a node that reads a later one": swap_nodes,
    "a node without its arguments": lambda d: first_call(d, "aten.linear")[2].clear(),
    "a node with too many arguments": lambda d: first_call(d, "aten.linear")[2].extend([None] * 9),
    "an argument of no kind": lambda d: first_call(d, "aten.linear")[2].append({"object": "os.system"}),
    "a device that is none": lambda d: first_call(d, "aten.linear")[2].append({"device": "../x"}),
    "arguments without end": nest,
    "a value that is not in the table": lambda d: first_call(d, "aten.linear").__setitem__(4, 10**6),
    "a value that is no number": lambda d: first_call(d, "aten.linear").__setitem__(4, "0"),
    "an element type that is none": set_in("values", 0, "dtype", value="__class__"),
    "a node of two fields": lambda d: d["nodes"].append(["x", "aten.relu.default"]),
    "a placeholder for nothing": lambda d: d["nodes"].insert(0, ["x", "placeholder", [], {}, 0, {}]),
    "no nodes": set_in("nodes", value=[]),
    "nodes that are no list": set_in("nodes", value={}),
    "a result that is no node": set_in("results", value=[5]),
    "results for no output": lambda d: d["results"].append(d["results"][0]),
    "an input that nobody reaches": set_in("parameters", "position_ids", value={"leaf": "input_ids"}),
    "an input filled from itself": set_in("inputs", 1, "fill", value=["ones", "attention_mask"]),
    "an input filled from nothing": set_in("inputs", 1, "fill", value=["ones", "nobody"]),
    "an input filled by an unknown rule": set_in("inputs", 1, "fill", value=["eval", "input_ids"]),
    "an input of another type than its node": set_in("inputs", 0, "dtype", value="float32"),
    "an input of another shape than its node": set_in("inputs", 0, "shape", value=["batch"]),
    "an input listed twice": lambda d: d["inputs"].append(d["inputs"][0]),
    "outputs of no form": set_in("outputs", value={"leaf": "a", "dict": {}}),
    "outputs of a class that is no name": set_in("outputs", "class", value=5),
    "outputs that share a name": set_in("outputs", value={"list": [{"leaf": "a"}, {"leaf": "a"}]}),
    "a constant that is a list": set_in("parameters", "more", value={"constant": [1]}),
    "a history of numbers": set_in("history", value=[5]),
    "a dial without limits": set_in("dials", value={"d": [1.0]}),
    "a dial that is no input": set_in("dials", value={"d": [1.0, 0.0, 2.0, ""]}),
    "a checkpoint that leads nowhere": set_in("checkpoint", "lm_head.weight", value="nobody"),
    "no origin": set_in("origin", value=None),
    "another format": set_in("format", value="other"),
    "another version": set_in("version", value=2),
    "a weight of no kind": set_in("weights", "p_lm_head_weight", "kind", value="pickle"),
    "a weight that is not described": lambda d: d["weights"].pop("p_lm_head_weight"),
    "a weight described in another shape": set_in("values", 0, "shape", value=[101, 33]),
    "a weight described in another type": set_in("values", 0, "dtype", value="float64"),
    "a weight of a size that varies": lambda d: (d["sizes"].update(x=[2, None, 101]),
                                                 d["values"][0].update(shape=["x", 32])),
    "a weight in a file that is not listed": set_in("weights", "p_lm_head_weight", "file", value="weights/00002.safetensors"),
    "a weight in program.json": set_in("weights", "p_lm_head_weight", "file", value="program.json"),
    "a weight outside": set_in("weights", "p_lm_head_weight", "file", value="weights/../../x.safetensors"),
    "an asset outside": lambda d: d["origin"]["assets"].append("../canary"),
    "an asset at an absolute place": lambda d: d["origin"]["assets"].append("/etc/passwd"),
    "an asset that is not listed": lambda d: d["origin"]["assets"].append("notes.txt"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRUCTURE)
def test_what_does_not_fit_together_is_refused(what: str, whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path / "forged", STRUCTURE[what])


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/tmp/x", "..", "a/../../x", "config.json", "evil.py", "pytorch_model.bin", "model.safetensors", ".bashrc", "a/.git",
             "a//b", "C:\\x", "a\0b", "a\nb", "", ".", 5, "EVIL.PY"]
)  # fmt: skip
def test_small_files_cannot_be_written_elsewhere_or_pass_for_others(name: Any, whole: Path, tmp_path: Path) -> None:
    """A saved program is written out again, also as a Hugging Face folder: names of its files decide where."""
    folder = Path(shutil.copytree(whole, tmp_path / "forged"))
    (folder / "notes.txt").write_text("x")
    with contextlib.suppress(ValueError, OSError, TypeError):
        place = folder / "assets" / str(name).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x")
    list_file(folder, "notes.txt", f"assets/{name}")
    refused(whole, folder, lambda d: d["origin"]["assets"].append(name), match="goes along with a program")


def test_weights_behind_a_link_out_of_the_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = forge(whole, tmp_path / "forged")
    outside = shutil.move(folder / "weights" / "00001.safetensors", tmp_path / "outside.safetensors")
    (folder / "weights" / "00001.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        graphopt.load(folder)


@pytest.mark.parametrize("listed", ["../../outside", "/etc/hostname", "weights/../../outside", "a\0b", "gone.safetensors"])
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
    with pytest.raises(CheckpointError, match="00001.safetensors.*changed or damaged"):
        graphopt.load(folder, check_hashes=True)


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"5", b"{", b"[" * 100_000, b'{"format": "graphopt-program", "version": 1}', b"\xff\xfe",
                 b'{"format": "graphopt-program", "version": 99, "files": {}}', b'{"format": "x", "version": 1, "files": {}}',
                 b'{"format": "graphopt-program", "version": 1, "files": {"program.json": 5}}']
)  # fmt: skip
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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(data: st.DataObject, scratch: Path, whole: Path) -> None:
    raw = bytearray((whole / "program.json").read_bytes())
    places = st.integers(0, len(raw) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.sampled_from(b'0123456789abz"{}[],:-. _\x00\xff')), min_size=1, max_size=3)):
        raw[place] = byte
    read_or_refuse(write_program(scratch, bytes(raw)))


_POOL = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=6), st.just([]), st.just({}), st.just([[]]),
    st.sampled_from(["batch", "float32", "linear", "p_lm_head_weight", "batch*2", "aten.mul.Tensor", "__class__", 2**64]),
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_entries_are_refused_or_harmless(data: st.DataObject, scratch: Path, whole: Path) -> None:
    document = json.loads((whole / "program.json").read_text())
    parent, key = None, None
    current: Any = document
    while isinstance(current, (dict, list)) and current and (parent is None or data.draw(st.integers(0, 7)) > 0):
        parent = current
        key = data.draw(st.sampled_from(sorted(current) if isinstance(current, dict) else range(len(current))))
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
        import pickle

        pickle.loads(pickle.dumps(print))
    assert read_or_refuse(write_program(scratch, (whole / "program.json").read_bytes()))
