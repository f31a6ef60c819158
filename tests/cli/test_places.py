"""Where commands write: nothing that stands there is lost, what a command reads least of all; and runs of all rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from forging import everything_in

import graphopt
from graphopt.cli.places import place, written_here
from graphopt.ir.errors import UsageError
from graphopt.ir.storage.atomic import atomic_file, atomic_folder, keeping, set_aside

pytestmark = pytest.mark.usefixtures("captured_once")

# each command with something to write, up to its -o
COMMANDS = {
    "plan": (["plan", "{whole}", "-p", "fuse-projections", "-o"], "file"),
    "optimize": (["optimize", "{whole}", "-p", "fuse-projections", "--verify", "off", "-o"], "folder"),
    "run": (["run", "{whole}", "--input", "{rows}", "-o"], "file.npz"),
    "onnx": (["lower", "{whole}", "--to", "onnx", "-o"], "file.onnx"),
    "parts": (["lower", "{whole}", "--to", "onnx", "--sizes", "batch=1,sequence=4", "--sizes", "batch=1,sequence=1", "-o"], "folder"),
    "genai": (["lower", "{whole}", "--to", "genai", "-o"], "folder"),
    "triton": (["lower", "{whole}", "--to", "triton", "-o"], "folder"),
    "huggingface": (["export", "{whole}", "--to", "huggingface", "-o"], "folder"),
    "pt2": (["export", "{whole}", "--to", "pt2", "-o"], "file.pt2"),
    "medusa": (["export", "{whole}", "--to", "medusa", "-o"], "file.safetensors"),
    "train": (["train", "{whole}", "--recipe", "language", "--data", "{rows}", "--steps", "1", "-o"], "folder"),
    "answer": (["answer", "{whole}", "--data", "{text}", "-o"], "file.jsonl"),
    "csv": (["sweep", "{whole}", "--data", "{rows}", "--csv"], "file.csv"),
    "picture": (["sweep", "{whole}", "--data", "{rows}", "--picture"], "file.png"),
    "dump": (["optimize", "{whole}", "-p", "fuse-projections", "-o", "{new}", "--dump-dir"], "folder"),
    "links": (["links", "--fit", "-o"], "file.json"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_stands_at_the_output_stays(
    command: str, whole: Path, rows: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    """Refused before anything is read or computed; a folder of somebody else's also with --force."""
    arguments, kind = COMMANDS[command]
    places = {"whole": whole, "rows": rows, "text": tmp_path / "text.txt", "new": tmp_path / "new"}
    (tmp_path / "text.txt").write_text("some words\n")
    target = tmp_path / ("mine" + kind.removeprefix("file").removeprefix("folder"))
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("years of work")
    before = everything_in(tmp_path)
    given = [*(a.format(**places) for a in arguments), str(target)]
    found = told(*given, status=2)
    assert "exists already" in found["message"] or "is not empty" in found["message"]
    assert "--force" in found["message"]
    assert everything_in(tmp_path) == before
    if kind == "folder" and command != "dump":
        assert "not a folder that graphopt wrote" in told(*given, "--force", status=2)["message"]
    elif kind != "folder":
        target.unlink()
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
        before = everything_in(tmp_path)
        assert "is a folder" in told(*given, "--force", status=2)["message"]
    assert everything_in(tmp_path) == before


def test_force_replaces_plain_files_and_folders_of_ours(
    whole: Path, rows: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    for name, arguments in {
        "o.npz": ["run", whole, "--input", rows],
        "o.yaml": ["plan", whole, "-p", "fuse-projections"],
        "p": ["optimize", whole, "-p", "fuse-projections", "--verify", "off"],
        "hf": ["export", whole, "--to", "huggingface"],
    }.items():
        target = tmp_path / name
        told(*arguments, "-o", target)
        first = everything_in(tmp_path)
        assert "exists already" in told(*arguments, "-o", target, status=2)["message"]
        told(*arguments, "-o", target, "--force")
        assert everything_in(tmp_path).keys() == first.keys(), "something is left beside it"
    graphopt.load(tmp_path / "p", check_hashes=True)


def test_what_a_command_reads_is_never_replaced(
    whole: Path, rows: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    program, data = tmp_path / "program", tmp_path / "rows.npz"
    shutil.copytree(whole, program)
    shutil.copy(rows, data)
    (tmp_path / "link").symlink_to("program")
    (tmp_path / "hard.npz").hardlink_to(data)
    told("plan", program, "-p", "fuse-projections", "-o", tmp_path / "plan.yaml")
    before = everything_in(tmp_path)
    fuse = ["-p", "fuse-projections", "--force", "-o"]
    for arguments, says in [
        (["optimize", program, *fuse, program], "is what the command reads"),
        (["optimize", program, *fuse, tmp_path / "link"], "is what the command reads"),
        (["optimize", tmp_path / "link", *fuse, program], "is what the command reads"),
        (["optimize", program, *fuse, tmp_path], "which the command reads"),
        (
            ["optimize", program, "--plan", tmp_path / "plan.yaml", "--force", "-o", tmp_path / "plan.yaml"],
            "reads",
        ),
        (["run", program, "--input", data, "--force", "-o", data], "is what the command reads"),
        (
            ["run", program, "--input", data, "--force", "-o", tmp_path / "hard.npz"],
            "is what the command reads",
        ),
        (["plan", program, *fuse, program / "program.json"], "is a part of"),
        (["export", program, "--to", "huggingface", "--force", "-o", program], "is what the command reads"),
    ]:
        assert says in told(*arguments, status=2)["message"]
        assert everything_in(tmp_path) == before


def test_what_arrives_while_a_command_works_stays_too(tmp_path: Path) -> None:
    def late_file() -> None:
        with place(str(tmp_path / "o"), False), atomic_file(tmp_path / "o") as made:
            made.write_text("new")
            (tmp_path / "o").write_text("mine")

    def late_folder() -> None:
        with (
            place(str(tmp_path / "o"), False, folder=True),
            atomic_folder(tmp_path / "o", may_replace=lambda _: True) as made,
        ):
            (made / "a").write_text("new")
            (tmp_path / "o").mkdir()
            (tmp_path / "o" / "b").write_text("mine")

    for late, left in ((late_file, {"o": b"mine"}), (late_folder, {"o/b": b"mine"})):
        with pytest.raises(UsageError, match="exists already"):
            late()
        assert everything_in(tmp_path) == left
        (tmp_path / "o").unlink() if (tmp_path / "o").is_file() else shutil.rmtree(tmp_path / "o")
    with keeping(tmp_path / "o"):
        pass
    with atomic_file(tmp_path / "o") as made:
        made.write_text("x")
    with atomic_file(tmp_path / "o") as made:
        made.write_text("y")
    assert (tmp_path / "o").read_text() == "y", "a place is kept for longer than its command"


@pytest.mark.parametrize("error", [None, OSError("gone"), KeyboardInterrupt()])
def test_what_is_put_aside_comes_back_unless_a_new_one_is_there(
    error: BaseException | None, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    target.mkdir()
    (target / "old").write_text("old")
    try:
        with set_aside(target):
            assert not target.exists()
            if error is not None:
                raise error
            target.mkdir()
            (target / "new").write_text("new")
    except BaseException as raised:
        assert raised is error
    assert everything_in(tmp_path) == ({"o/new": b"new"} if error is None else {"o/old": b"old"})


def test_devices_are_no_places(tmp_path: Path) -> None:
    """A rename would put a file where the system has a device."""
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="a device or a pipe"), atomic_file(tmp_path / "pipe"):
        pass
    with pytest.raises(UsageError, match="a device or a pipe"), place(str(tmp_path / "pipe"), True):
        pass


def test_folders_of_ours_are_told_from_others(
    whole: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    graphopt.load(whole).save_pretrained(tmp_path / "ours")
    assert written_here(whole) and written_here(tmp_path / "ours")
    assert not written_here(checkpoint("llama")), "the user's own checkpoint would be replaced"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 20)
    assert not written_here(tmp_path / "damaged")
    (tmp_path / "damaged" / "report.json").write_text("[1]")
    (tmp_path / "damaged" / "config.json").unlink()
    assert not written_here(tmp_path / "damaged")


# -- every row, in its order --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 37])
def test_run_gives_every_row_in_its_order(
    count: int, whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    ids = numpy.random.default_rng(1).integers(3, 100, (count, 6))
    numpy.savez(tmp_path / "in.npz", input_ids=ids)
    found = told("run", whole, "--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert found["rows"] == count
    expected = graphopt.load(whole)(input_ids=torch.tensor(ids)).logits
    assert numpy.allclose(numpy.load(tmp_path / "out.npz")["logits"], expected, atol=1e-6)


def test_run_takes_a_fixed_number_of_rows_at_a_time_or_refuses(
    told: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    graphopt.capture(module, torch.randn(2, 3), dynamic=None).save(tmp_path / "p")
    name = next(iter(graphopt.load(tmp_path / "p").signature.inputs))
    values = torch.randn(6, 3)
    numpy.savez(tmp_path / "in.npz", **{name: values.numpy()})
    told("run", tmp_path / "p", "--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    (found,) = numpy.load(tmp_path / "out.npz").values()
    assert numpy.allclose(found, module(values).detach(), atol=1e-6)
    numpy.savez(tmp_path / "in.npz", **{name: values[:5].numpy()})
    refused = told("run", tmp_path / "p", "--input", tmp_path / "in.npz", status=2)["message"]
    assert "there are 5 rows, and the program takes 2 at a time" in refused
    numpy.savez(tmp_path / "in.npz", **{name: values[:1].numpy()})
    assert (
        "captured for 2 only"
        in told("run", tmp_path / "p", "--input", tmp_path / "in.npz", status=2)["message"]
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_run_takes_a_text_a_row(
    name: str, checkpoint: Callable[[str], Path], told: Callable[..., Any], tmp_path: Path
) -> None:
    """Wrong if texts were joined, shuffled, cut, or the padding of one row changed another."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(shutil.copytree(checkpoint(name), tmp_path / "model"))
    words = {w: n + 5 for n, w in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **words}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = numpy.random.default_rng(2)
    texts = [" ".join(rng.choice(list(words), rng.integers(1, 7))) for _ in range(11)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    found = told("run", folder, "--input", tmp_path / "in.jsonl", "-o", tmp_path / "out.npz")
    assert found["lengths"] == [len(t.split()) for t in texts]
    program = graphopt.capture(folder, compare=False)
    output = "logits" if name == "llama" else "last_hidden_state"
    held = numpy.load(tmp_path / "out.npz")
    assert held["lengths"].tolist() == found["lengths"]
    for number, text in enumerate(texts):
        ids = torch.tensor([[words[w] for w in text.split()]])
        expected = program(input_ids=ids)[output][0]
        assert numpy.allclose(held[output][number, : len(expected)], expected, atol=1e-5), number
    (tmp_path / "long.txt").write_text("a b\n" + "a " * 65 + "\n")
    assert (
        "text 2 has 65 tokens, the program takes 64"
        in told("run", folder, "--input", tmp_path / "long.txt", status=2)["message"]
    )


# -- numbers that are no tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ids: ids.astype(float) + (ids == ids) * 0.5, "row 0: input_ids is"),
        (lambda ids: numpy.where(numpy.arange(12)[:, None] == 5, 101, ids), "row 5: input_ids is 101, the program knows 0 to 100"),
        (lambda ids: numpy.where(numpy.arange(12)[:, None] == 7, -1, ids), "row 7: input_ids is -1"),
        (lambda ids: numpy.where(numpy.arange(12)[:, None] == 3, numpy.nan, ids), "row 3: input_ids is nan"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_numbers_that_are_no_tokens_are_named(
    command: str,
    change: Callable[[Any], Any],
    says: str,
    whole: Path,
    told: Callable[..., Any],
    tmp_path: Path,
) -> None:
    numpy.savez(tmp_path / "in.npz", input_ids=change(numpy.random.default_rng(3).integers(3, 100, (12, 5))))
    flag = "--input" if command == "run" else "--data"
    assert says in told(command, whole, flag, tmp_path / "in.npz", status=2)["message"]


def test_whole_numbers_in_floats_are_numbers_and_arrays_of_one_length(
    whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    ids = numpy.random.default_rng(3).integers(3, 100, (4, 5))
    numpy.savez(tmp_path / "in.npz", input_ids=ids.astype(float))
    assert told("run", whole, "--input", tmp_path / "in.npz")["rows"] == 4
    numpy.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=numpy.ones((3, 5)))
    assert (
        "different numbers of rows: 4 of input_ids, 3 of attention_mask"
        in told("run", whole, "--input", tmp_path / "in.npz", status=2)["message"]
    )
    for content in (b"", b"PK\x03\x04 and no more", numpy.arange(3).tobytes()):
        (tmp_path / "in.npz").write_bytes(content)
        assert "cannot be read" in told("run", whole, "--input", tmp_path / "in.npz", status=2)["message"]


def test_generation_stops_at_what_the_model_was_made_for(whole: Path) -> None:
    program = graphopt.load(whole)
    with pytest.raises(UsageError, match="may have 65 tokens, the model has positions for 64") as refused:
        graphopt.generate(program, [[5] * 60], max_new_tokens=5)
    assert "at most 4" in refused.value.hint
    assert graphopt.generate(program, [[5] * 60], max_new_tokens=4, eos_token_id=None).shape == (1, 64)
    for wrong, says in (
        ([[5, 101]], "token 101"),
        ([[5, -1]], "token -1"),
        ([[5, 1.5]], "1.5, which is not a token"),
    ):
        with pytest.raises(UsageError, match=says):
            graphopt.generate(program, wrong, max_new_tokens=2)
    with pytest.raises(UsageError, match=r"5\.0, which is not a token"):
        graphopt.generate(program, torch.tensor([[5.0]]), max_new_tokens=2)


def test_a_strategy_that_cannot_run_is_refused(whole: Path) -> None:
    program = graphopt.load(whole)
    for strategy in ("early-exit", "mask-tokens", "attached-draft", "multi-token-heads{nodes=4}"):
        with pytest.raises(UsageError, match="this program has no"):
            graphopt.generate(program, [[5, 6]], max_new_tokens=2, strategy=strategy)
