"""Commands that fail: the status of the design, one JSON document that says why, and nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from forging import Canary, everything_in, list_file, safetensors_parts, write_safetensors

import graphopt
from graphopt.cli.running import run

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["inspect", "{whole}", "--device", "h20"], 2, "did you mean h200"),
        (["inspect", "{none}"], 3, "is not a folder"),
        (["inspect", "{whole}", "--sequence", "0"], 2, "--sequence"),
        (["plan", "{whole}"], 2, "--passes"),
        (["plan", "{whole}", "-p", "fuse-projektions", "-o", "{out}"], 2, "did you mean 'fuse-projections'"),
        (["plan", "{none}", "-p", "fuse-projections", "-o", "{out}"], 3, "is not a folder"),
        (["optimize", "{whole}", "-p", "fuse-projections"], 2, "--output"),
        (["optimize", "{whole}", "-o", "{out}"], 2, "-p, or a plan"),
        (["optimize", "{whole}", "-p", "fuse-projections", "--plan", "{none}", "-o", "{out}"], 2, "-p, or a plan"),
        (["optimize", "{whole}", "--plan", "{none}", "-o", "{out}"], 2, "cannot read the plan"),
        (["optimize", "{whole}", "-p", "fuse-projections", "--verify", "no", "-o", "{out}"], 2, "sites, full or off"),
        (["optimize", "{whole}", "-p", "skip-layers{{layers=[9]}}", "-o", "{out}"], 2, "numbered 0 to 1"),
        (["optimize", "{whole}", "-p", "split-projections", "-o", "{out}"], 4, "matched nothing"),
        (["optimize", "{whole}", "-p", "fuse-projections", "-o", "{rows}"], 2, "exists already"),
        (["optimize", "{whole}", "-p", "fuse-projections", "--data", "{none}", "-o", "{out}"], 2, "does not exist"),
        (["optimize", "{whole}", "-p", "fuse-projections", "--data", "{pickle}", "-o", "{out}"], 2, "cannot be read"),
        (["verify", "{whole}", "{none}"], 3, "is not a folder"),
        (["diff", "{whole}", "{rows}"], 3, "is not a folder"),
        (["lower", "{whole}", "--to", "onyx", "-o", "{out}"], 2, "not lowered to 'onyx'"),
        (["lower", "{whole}", "--to", "onnx", "--sizes", "batch=x", "-o", "{out}"], 2, "name=number"),
        (["lower", "{whole}", "--to", "onnx", "--sizes", "batch=²", "-o", "{out}"], 2, "name=number"),
        (["lower", "{whole}", "--to", "onnx", "--sizes", "batch=0", "-o", "{out}"], 2, "numbers from 1"),
        (["lower", "{whole}", "--to", "onnx", "--sizes", "batch=1,batch=2", "-o", "{out}"], 2, "twice"),
        (["export", "{whole}", "--to", "tflite", "-o", "{out}"], 2, "not exported to 'tflite'"),
        (["export", "{whole}", "--to", "gguf", "-o", "{out}"], 2, "should end in .gguf"),
        (["export", "{whole}", "--to", "huggingface", "--type", "F16", "-o", "{out}"], 2, "--type is for GGUF files"),
        (["export", "{whole}", "--to", "pt2", "-o", "{out}"], 2, "should end in .pt2"),
        (["run", "{whole}", "--input", "{none}"], 2, "does not exist"),
        (["run", "{whole}", "--input", "{pickle}"], 2, "cannot be read"),
        (["run", "{whole}", "--input", "{rows}", "-o", "{out}"], 2, "should end in .npz"),
        (["run", "{whole}", "--input", "{other}"], 2, "holds other; the program takes input_ids"),
        (["passes", "fuse-projektions"], 2, "did you mean fuse-projections"),
        (["nonsense"], 2, "nonsense"),
    ],
)  # fmt: skip
def test_each_failure_has_its_status_says_why_and_leaves_nothing(
    arguments: list[str],
    status: int,
    says: str,
    whole: Path,
    rows: Path,
    told: Callable[..., Any],
    tmp_path: Path,
) -> None:
    numpy.savez(tmp_path / "other.npz", other=numpy.ones((2, 2)))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    places = {"whole": whole, "rows": rows, "none": tmp_path / "none", "out": tmp_path / "out",
              "other": tmp_path / "other.npz", "pickle": tmp_path / "pickle.npz"}  # fmt: skip
    before = everything_in(tmp_path)
    found = told(*(a.format(**places) for a in arguments), status=status)
    assert says in found["message"]
    assert everything_in(tmp_path) == before, "a failed command leaves output, or ran a pickle"


def test_an_internal_error_is_status_1_and_says_where(
    whole: Path, told: Callable[..., Any], monkeypatch: Any
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("seventeen")

    monkeypatch.setattr("graphopt.cli.catalogue.show_devices", broken)
    assert told("devices", status=1)["error"] == "ZeroDivisionError"


# -- contracts ---------------------------------------------------------------------------------------------


def test_a_tampered_program_does_not_hold(whole: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    forged = Path(shutil.copytree(whole, tmp_path / "forged"))
    weights = forged / "weights" / "00001.safetensors"
    header, data = safetensors_parts(weights)
    start, end = header["p_lm_head_weight"]["data_offsets"]
    lifted = (torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32) * 1.01).numpy().tobytes()
    write_safetensors(weights, header, data[:start] + lifted + data[end:])
    assert "changed or damaged" in told("verify", whole, forged, status=3)["message"]
    list_file(forged, "weights/00001.safetensors")
    found = told("verify", whole, forged, status=5)
    assert found["verdict"] == "does not hold"
    assert found["errors"]["logits"] > found["limit"]


def test_an_output_that_is_gone_breaks_the_contract(
    saved: Callable[[str], Path], told: Callable[..., Any], tmp_path: Path
) -> None:
    program = graphopt.load(saved("bert"))
    less = program.copy()
    less.signature.outputs["dict"].pop("pooler_output")
    less.edit.set_outputs([less.output_node.args[0][0]])  # type: ignore[index]
    less.save(tmp_path / "less")
    found = told("verify", saved("bert"), tmp_path / "less", status=5)
    assert any("pooler_output is no longer an output" in line for line in found["budgets"])


def test_a_budget_that_is_not_held_is_status_5_and_leaves_nothing(
    whole: Path, rows: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ("optimize", whole, "--data", rows, "-o", tmp_path / "out")
    found = told(*arguments, "-p", "skip-layers{layers=[0] budget=0.000001 metric=kl}", status=5)
    assert found["error"] == "ContractError"
    assert "its budget is 1e-06" in found["message"]
    assert everything_in(tmp_path) == {}
    told(*arguments, "-p", "skip-layers{layers=[0] budget=1000 metric=kl}")
    assert told("verify", whole, tmp_path / "out", "--data", rows)["verdict"] == "holds"
    record = json.loads((tmp_path / "out" / "program.json").read_text())
    record["history"][0]["pass"] = "skip-layers{layers=[0] budget=0.000001 metric=kl}"
    (tmp_path / "out" / "program.json").write_text(json.dumps(record))
    list_file(tmp_path / "out", "program.json")
    assert told("verify", whole, tmp_path / "out", "--data", rows, status=5)["budgets"]


# -- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda step: step["sites"].clear(), 4),
        (lambda step: step["sites"][0].pop("layout"), 2),
        (lambda step: step["sites"][0].pop("block"), 2),
        (lambda step: step.update({"pass": "fuse-projektions"}), 2),
        (lambda step: step.update({"pass": "fuse-projections, fold-norms"}), 2),
        (lambda step: step.update(sights=[]), 2),
    ],
)
def test_a_plan_edited_wrongly_is_refused(
    change: Callable[[Any], Any], status: int, whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    told("plan", whole, "-p", "fuse-projections", "-o", tmp_path / "p.yaml")
    document = yaml.safe_load((tmp_path / "p.yaml").read_text())
    change(document["passes"][0])
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    told("optimize", whole, "--plan", tmp_path / "p.yaml", "-o", tmp_path / "out", status=status)
    assert set(everything_in(tmp_path)) == {"p.yaml"}


@pytest.mark.parametrize("passes", ["fuse-projections", "skip-layers{layers=[0]}", "fold-norms"])
def test_a_block_that_is_not_there_is_a_wrong_plan_and_no_internal_error(
    passes: str, whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    told("plan", whole, "-p", passes, "-o", tmp_path / "p.yaml")
    document = yaml.safe_load((tmp_path / "p.yaml").read_text())
    document["passes"][0]["sites"][0]["block"] = "nobody.7"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    assert (
        "nobody.7"
        in told("optimize", whole, "--plan", tmp_path / "p.yaml", "-o", tmp_path / "out", status=2)["message"]
    )


# -- text --------------------------------------------------------------------------------------------------


def test_text_is_read_by_the_checkpoint_s_own_tokenizer(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "hello": 5, "world": 6, "user": 7, ":": 8}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "unk_token": "[UNK]"})
    )
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hello world"}]}) + "\n"
    )
    assert (
        run(["run", str(folder), "--input", str(tmp_path / "chat.jsonl"), "-o", str(tmp_path / "out.npz")])
        == 0
    )
    assert "input: 'user : hello world'" in capsys.readouterr().err, (
        "the sample is not shown, or the template was not used"
    )
    program = graphopt.capture(folder, compare=False)
    expected = program(torch.tensor([[7, 8, 5, 6]])).last_hidden_state.numpy()
    assert numpy.allclose(numpy.load(tmp_path / "out.npz")["last_hidden_state"], expected, atol=1e-6)
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": hostile}))
    assert run(["run", str(folder), "--input", str(tmp_path / "chat.jsonl")]) != 0, (
        "a chat template reached Python"
    )


# -- inputs that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["inspect", ""], 2, "the name of a checkpoint is empty"),
        (["lower", "{whole}", "--to", "onnx", "-o", ""], 2, "the name of the output is empty"),
        (["optimize", "{whole}", "--plan", "{rows}", "-o", "{out}"], 2, "cannot read the plan"),
        (["optimize", "{whole}", "-p", "skip-layers{{remove=1}}", "--data", "{rows}", "--work-dir", "{rows}", "-o", "{out}"], 2, "is a file"),
        (["train", "{whole}", "--recipe", "language", "--data", "{rows}", "--steps", "1", "--work-dir", "{rows}/x", "-o", "{out}"], 2, "is a file"),
        (["train", "{whole}", "--recipe", "language", "--data", "{rows}", "--steps", "1", "--weight-decay", "nan", "-o", "{out}"], 2, "must be at least 0"),
        (["evaluate", "{whole}", "--data", "{rows}", "--metric", "{code}:broken"], 2, "the metric broken ended with ValueError: mine"),
        (["evaluate", "{whole}", "--data", "{rows}", "--metric", "bits_per_byte"], 2, "has no tokenizer that writes any"),
        (["run", "{whole}", "--input", "{complex}"], 2, "input_ids is complex"),
        (["run", "{whole}", "--input", "{huge}"], 2, "2^63"),
        (["generate", "{whole}", "--prompt", "a"], 2, "reads and writes no text"),
        (["links", "-o", "{out}"], 2, "add --fit"),
    ],
)  # fmt: skip
def test_inputs_that_are_none_are_named(
    arguments: list[str],
    status: int,
    says: str,
    whole: Path,
    rows: Path,
    told: Callable[..., Any],
    tmp_path: Path,
) -> None:
    numpy.savez(tmp_path / "complex.npz", input_ids=numpy.ones((2, 3), dtype=complex))
    numpy.savez(tmp_path / "huge.npz", input_ids=numpy.full((2, 3), 2**63 + 5, dtype="uint64"))
    (tmp_path / "code.py").write_text("def broken(program):\n    raise ValueError('mine')\n")
    places = {"whole": whole, "rows": rows, "out": tmp_path / "out", "complex": tmp_path / "complex.npz",
              "huge": tmp_path / "huge.npz", "code": tmp_path / "code.py"}  # fmt: skip
    before = {k: v for k, v in everything_in(tmp_path).items() if "__pycache__" not in k}
    assert says in told(*(a.format(**places) for a in arguments), status=status)["message"]
    assert {k: v for k, v in everything_in(tmp_path).items() if "__pycache__" not in k} == before


def test_too_little_memory_is_no_internal_error(
    whole: Path, told: Callable[..., Any], monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        )

    monkeypatch.setattr("graphopt.cli.inspecting.cost", full)
    found = told("inspect", whole, status=1)
    assert found["error"] == "MemoryError" and found["message"].startswith("out of memory")
