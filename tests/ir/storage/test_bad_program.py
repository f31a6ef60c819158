"""Saved programs that are forged or damaged: reading refuses them, and nothing in them is ever executed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import (
    canary_code,
    first_call,
    forge,
    refused,
)

import graphopt
from graphopt import CheckpointError

Document = dict[str, Any]
Edit = Callable[[Document], Any]
IDS = torch.full((2, 5), 7)


def test_a_program_that_nobody_touched_is_read(whole: Path, tmp_path: Path) -> None:
    """Everything below would pass if forging alone made programs unreadable."""
    program = graphopt.load(forge(whole, tmp_path / "same"), check_hashes=True)
    assert torch.equal(program(IDS).logits, graphopt.load(whole)(IDS).logits)

    def other_size(document: Document) -> None:
        document["values"][-1] = {"dtype": "float32", "shape": ["max(2*batch, sequence % 7) // 2"]}

    assert graphopt.load(forge(whole, tmp_path / "sizes", other_size)), "a size in the grammar is one"


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
    from graphopt.ir.storage.allowed import allowed, operator_of

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
def test_names_that_become_source_code_hold_none(
    road: Callable[[Path], Edit], whole: Path, tmp_path: Path
) -> None:
    refused(whole, tmp_path / "forged", road(tmp_path / "canary"))


@pytest.mark.parametrize(("road", "guard"), [(keyword, "check_call"), (input_named, "input_name")])
def test_it_is_these_checks_that_keep_code_out(
    road: Callable[[Path], Edit], guard: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check the forgery runs: torch.fx writes such names into the functions it compiles."""
    import graphopt.ir.storage.read as reader

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
    "__import__('os').system('touch {canary}')", "(" * 5000 + "batch" + ")" * 5000, "batch//0", "batch**9",
    "batch.__class__", "batch if batch else 1", "[batch]", "lambda: 1", "nobody", "", " ", "batch batch",
    "7 // (sequence - 13)", "-" * 1900 + "batch", "batch%7" + "%7" * 400,
    "*".join(["(batch+sequence)%5"] * 100), "0-batch", "1/2", "1.5", "max(batch)", "max(batch,",
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


def test_depth_does_not_hang_on_the_interpreter() -> None:
    """Libraries raise the interpreter's limit, under which long chains of signs would be read."""
    import sys

    import sympy

    from graphopt.ir.errors import CheckpointError
    from graphopt.ir.sizes import parse_size

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with pytest.raises(CheckpointError):
            parse_size("-" * 1900 + "batch", {"batch": sympy.Symbol("s0")})
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    "limits",
    [
        [5, 2, 3],
        [1, None, None],
        [None, None, 3],
        [-1, None, 3],
        [1, None, 10**30],
        [1, None],
        "1",
        [1.5, None, 3],
        [],
    ],
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


STRUCTURE: dict[str, tuple[str, Edit]] = {
    "a node that reads what no node defines": (
        "not defined before",
        lambda d: first_call(d, "aten.linear")[2].__setitem__(0, {"node": "nobody"}),
    ),
    "a node that reads itself": (
        "not defined before",
        lambda d: first_call(d, "aten.linear")[2].__setitem__(0, {"node": "linear"}),
    ),
    "a node that reads a later one": ("not defined before", swap_nodes),
    "a node without its arguments": (
        "called with wrong arguments",
        lambda d: first_call(d, "aten.linear")[2].clear(),
    ),
    "a node with too many arguments": (
        "called with wrong arguments",
        lambda d: first_call(d, "aten.linear")[2].extend([None] * 9),
    ),
    "an argument of no kind": (
        "not an argument",
        lambda d: first_call(d, "aten.linear")[2].append({"object": "os.system"}),
    ),
    "a device that is none": (
        "not an argument",
        lambda d: first_call(d, "aten.linear")[2].append({"device": "../x"}),
    ),
    "arguments without end": ("nested too deeply", nest),
    "a value that is not in the table": (
        "no value 1000000",
        lambda d: first_call(d, "aten.linear").__setitem__(4, 10**6),
    ),
    "a value that is no number": ("no value '0'", lambda d: first_call(d, "aten.linear").__setitem__(4, "0")),
    "an element type that is none": ("not an element type", set_in("values", 0, "dtype", value="__class__")),
    "a node of two fields": ("damaged", lambda d: d["nodes"].append(["x", "aten.relu.default"])),
    "a placeholder for nothing": (
        "neither a weight nor an input",
        lambda d: d["nodes"].insert(0, ["x", "placeholder", [], {}, 0, {}]),
    ),
    "no nodes": ("not defined before", set_in("nodes", value=[])),
    "nodes that are no list": ("'nodes' is missing", set_in("nodes", value={})),
    "a result that is no node": ("output is not a node", set_in("results", value=[5])),
    "results for no output": (
        "does not return the number of values",
        lambda d: d["results"].append(d["results"][0]),
    ),
    "an input that nobody reaches": (
        "parameters lead to",
        set_in("parameters", "position_ids", value={"leaf": "input_ids"}),
    ),
    "an input filled from itself": (
        "is circular or does not exist",
        set_in("inputs", 1, "fill", value=["ones", "attention_mask"]),
    ),
    "an input filled from nothing": (
        "is circular or does not exist",
        set_in("inputs", 1, "fill", value=["ones", "nobody"]),
    ),
    "an input filled by an unknown rule": (
        "unknown rule",
        set_in("inputs", 1, "fill", value=["eval", "input_ids"]),
    ),
    "an input of another type than its node": (
        "is described as",
        set_in("inputs", 0, "dtype", value="float32"),
    ),
    "an input of another shape than its node": (
        "is described as",
        set_in("inputs", 0, "shape", value=["batch"]),
    ),
    "an input listed twice": ("listed twice", lambda d: d["inputs"].append(d["inputs"][0])),
    "outputs of no form": ("structure", set_in("outputs", value={"leaf": "a", "dict": {}})),
    "outputs of a class that is no name": ("structure", set_in("outputs", "class", value=5)),
    "outputs that share a name": (
        "the same name",
        set_in("outputs", value={"list": [{"leaf": "a"}, {"leaf": "a"}]}),
    ),
    "a constant that is a list": ("structure", set_in("parameters", "more", value={"constant": [1]})),
    "a history of numbers": ("history", set_in("history", value=[5])),
    "a dial without limits": ("damaged", set_in("dials", value={"d": [1.0]})),
    "a dial that is no input": ("graph takes", set_in("dials", value={"d": [1.0, 0.0, 2.0, ""]})),
    "a checkpoint that leads nowhere": (
        "does not exist",
        set_in("checkpoint", "lm_head.weight", value="nobody"),
    ),
    "no origin": ("'origin' is missing", set_in("origin", value=None)),
    "another format": ("not a program of version", set_in("format", value="other")),
    "another version": ("not a program of version", set_in("version", value=2)),
    "a weight of no kind": ("not described", set_in("weights", "p_lm_head_weight", "kind", value="pickle")),
    "a weight that is not described": ("not described", lambda d: d["weights"].pop("p_lm_head_weight")),
    "a weight described in another shape": ("stored as", set_in("values", 0, "shape", value=[101, 33])),
    "a weight described in another type": ("stored as", set_in("values", 0, "dtype", value="float64")),
    "a weight of a size that varies": (
        "stored as",
        lambda d: (d["sizes"].update(x=[2, None, 101]), d["values"][0].update(shape=["x", 32])),
    ),
    "a weight in a file that is not listed": (
        "not a file of this program",
        set_in("weights", "p_lm_head_weight", "file", value="weights/00002.safetensors"),
    ),
    "a weight in program.json": (
        "not a file of this program",
        set_in("weights", "p_lm_head_weight", "file", value="program.json"),
    ),
    "a weight outside": (
        "not a file of this program",
        set_in("weights", "p_lm_head_weight", "file", value="weights/../../x.safetensors"),
    ),
    "an asset outside": ("may be saved", lambda d: d["origin"]["assets"].append("../canary")),
    "an asset at an absolute place": ("may be saved", lambda d: d["origin"]["assets"].append("/etc/passwd")),
    "an asset that is not listed": ("does not exist", lambda d: d["origin"]["assets"].append("notes.txt")),
}


@pytest.mark.parametrize("what", STRUCTURE)
def test_what_does_not_fit_together_is_refused(what: str, whole: Path, tmp_path: Path) -> None:
    reason, edit = STRUCTURE[what]
    refused(whole, tmp_path / "forged", edit, match=reason)


@pytest.mark.parametrize(("base", "exponent"), [(10, 10**9), (2**50, 3), (3, -(10**6))])
def test_a_power_that_takes_all_memory_is_refused_before_it_is_computed(base: int, exponent: int) -> None:
    import operator

    from graphopt.ir.storage.read import _require_sizes

    _require_sizes(operator.pow, [base % 1000, 2], "small")
    with pytest.raises(CheckpointError, match="unreasonable power"):
        _require_sizes(operator.pow, [base, exponent], "large")
