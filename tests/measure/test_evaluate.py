"""graphopt evaluate: the numbers that tables are made of, against what they are by definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from builders import tiny_llama_folder
from torch import nn

import graphopt
from graphopt import PipelineError, UsageError, evaluate
from graphopt.cli.running import run as main

pytestmark = pytest.mark.usefixtures("captured_once")

TEXTS = [
    "Return the sum of array elements over a given axis.",
    "The shape of the result.",
    "Draw samples from a distribution, given its mean and its standard deviation, and a seed.",
    "Zeros.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("evaluate") / "llama", TEXTS)


@pytest.fixture(scope="module")
def program(folder: Path) -> graphopt.Program:
    return graphopt.capture(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


def tokens(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [i for t in TEXTS for i in made.encode(t).ids]


def by_transformers(folder: Path, length: int) -> tuple[float, float]:
    """Perplexity and accuracy by transformers' own loss, a row at a time, without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = tokens(folder)
    total = right = count = 0.0
    for start in range(0, len(ids), length):
        row = torch.tensor([ids[start : start + length]])
        if row.shape[1] < 2:
            continue
        with torch.no_grad():
            out = model(input_ids=row, labels=row)
        total += float(out.loss) * (row.shape[1] - 1)
        right += int((out.logits[0, :-1].argmax(-1) == row[0, 1:]).sum())
        count += row.shape[1] - 1
    return math.exp(total / count), right / count


@pytest.mark.parametrize(("length", "batch"), [(16, 1), (16, 3), (16, 8), (7, 4), (64, 8)])
def test_perplexity_and_accuracy_are_what_transformers_says(
    folder: Path, program: graphopt.Program, text: Path, length: int, batch: int
) -> None:
    """Wrong if padding, the last short row or the size of a batch counted; transformers rounds to float32."""
    expected = by_transformers(folder, length)
    found = evaluate(program, text, length=length, batch=batch, dtype="float64")
    assert found.values["perplexity"] == pytest.approx(expected[0], rel=1e-5)
    assert found.values["accuracy"] == pytest.approx(expected[1], abs=1e-12)
    assert found.tokens == len(tokens(folder)) - (len(tokens(folder)) % length == 1)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(program: graphopt.Program, tmp_path: Path) -> None:
    """The first token is predicted by nothing, so its bytes do not count."""
    path = tmp_path / "one.txt"
    path.write_text(TEXTS[0])
    found = evaluate(program, path, ["perplexity", "bits_per_byte"])
    from graphopt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(program)
    ids = tokenizer.encode(TEXTS[0])
    size = len(TEXTS[0]) - len(tokenizer.decode(ids[:1]))
    nats = math.log(found.values["perplexity"]) * (len(ids) - 1)
    assert found.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-9)


def test_types(program: graphopt.Program, text: Path) -> None:
    values = [
        evaluate(program, text, "perplexity", dtype=d).values["perplexity"]
        for d in ("stored", "float32", "float64")
    ]
    assert values[0] == values[1], "the model is stored in float32"
    assert values[1] != values[2], "float64 was not computed in float64"
    assert values[1] == pytest.approx(values[2], rel=1e-5)
    with pytest.raises(UsageError, match="dtype is stored, float32, float64, not 'int8'"):
        evaluate(program, text, dtype="int8")


def test_a_half_precision_checkpoint_is_widened(folder: Path, tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(folder).half()
    half.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    half.float().save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    first = evaluate(tmp_path / "half", text, "perplexity", dtype="float32").values["perplexity"]
    second = evaluate(tmp_path / "wide", text, "perplexity").values["perplexity"]
    assert first == pytest.approx(second, rel=1e-6), "some of it was still computed in half precision"


def test_against_itself_and_against_another(program: graphopt.Program, text: Path) -> None:
    same = evaluate(program, text, against=program).values
    assert same["kl"] == 0
    assert same["agreement"] == 1
    shorter = graphopt.optimize(program, "skip-layers{remove=1}", data=text)
    other = evaluate(shorter, text, ["kl", "agreement", "cosine"], against=program).values
    assert other["kl"] > 0
    assert 0 <= other["agreement"] < 1
    assert other["cosine"] > 0
    with pytest.raises(PipelineError, match="kl compares with another program"):
        evaluate(program, text, "kl")


def test_rows_are_those_at_the_beginning(program: graphopt.Program, text: Path) -> None:
    some = evaluate(program, text, length=8, sequences=2)
    assert (some.rows, some.tokens) == (2, 16)
    assert some.sample.startswith("Return")


def test_rows_are_no_longer_than_the_model_was_made_for(program: graphopt.Program, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("Return the sum of array elements. " * 200)
    found = evaluate(program, path)
    assert found.tokens / found.rows <= 64, "rows went past max_position_embeddings"
    assert found.rows > 1


def test_functions_of_the_user(program: graphopt.Program, text: Path) -> None:
    def operators(program: graphopt.Program) -> float:
        return sum(program.operators.values())

    def shapes(program: graphopt.Program, batches: list[Any]) -> dict[str, float]:
        return {"rows": sum(len(b["input_ids"]) for b in batches), "batches": len(batches)}

    found = evaluate(program, text, ["perplexity", operators, shapes], length=8)
    assert list(found.values) == ["perplexity", "operators", "rows", "batches"]
    assert found.values["operators"] > 20
    assert found.values["rows"] == found.rows
    with pytest.raises(UsageError, match="returned 'good'"):
        evaluate(program, text, lambda p: "good")  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match="takes 3 arguments"):
        evaluate(program, text, lambda a, b, c: 1.0)


def test_models_that_predict_no_token(tmp_path: Path) -> None:
    program = graphopt.capture(nn.Linear(3, 2), torch.randn(4, 3))
    numpy.savez(tmp_path / "x.npz", input=numpy.random.default_rng(0).normal(size=(6, 3)).astype("float32"))
    with pytest.raises(UsageError, match="predicts no next token"):
        evaluate(program, tmp_path / "x.npz")
    with pytest.raises(PipelineError, match="perplexity needs a program with input_ids and logits"):
        evaluate(program, tmp_path / "x.npz", "perplexity")
    found = evaluate(program, tmp_path / "x.npz", against=program)
    assert found.values["cosine"] == pytest.approx(0, abs=1e-12)
    assert (found.rows, found.tokens) == (6, 0)


def test_command_prints_a_row_for_each_program_and_file(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.txt").write_text("\n".join(TEXTS))
    (tmp_path / "mine.py").write_text("def seven(program):\n    return 7\n")
    arguments = [
        "evaluate",
        str(folder),
        str(folder),
        "--data",
        str(text),
        "--data",
        str(tmp_path / "plain.txt"),
    ]
    metrics = ["--metric", "perplexity", "--metric", f"{tmp_path / 'mine.py'}:seven"]
    assert main([*arguments, *metrics, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [Path(e["data"]).name for e in entries] == ["text.jsonl", "plain.txt"] * 2
    assert len({e["values"]["perplexity"] for e in entries}) == 1, "the same lines gave other numbers"
    assert all(e["values"]["seven"] == 7 for e in entries)
    assert main([*arguments, *metrics]) == 0
    shown = capsys.readouterr().out
    assert shown.count("7.0000") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "{text}", "--metric", "bleu"], "there is no metric 'bleu'"),
        (["--data", "{text}", "--metric", "gone.py:f"], "there is no file gone.py"),
        (["--data", "{text}", "--metric", "json:nothing"], "json has no function nothing"),
        (["--data", "{text}", "--metric", "no_such_module_at_all:f"], "cannot be imported"),
        (["--data", "{text}", "--metric", "agreement"], "agreement compares with another program"),
        (["--data", "{text}", "--dtype", "half"], "dtype is"),
        (["--data", "{text}", "--length", "1"], "length"),
        ([], "data"),
    ],
)
def test_wrong_use_is_named(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [a.replace("{text}", str(text)) for a in arguments]
    assert main(["evaluate", str(folder), *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize("at_once", [1, 50, 1 << 21])
def test_pieces_come_to_the_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong if a piece lost a position, its mask, or its tokens; widened at once, logits take more than a model."""
    from graphopt.measure import metrics

    monkeypatch.setattr(metrics, "_VALUES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randn(3, 7, 11, generator=generator) for _ in range(2))
    ids = torch.randint(0, 11, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    values = metrics.measure_all(
        ["perplexity", "kl"], lambda _: {"logits": found}, lambda _: {"logits": expected}, [batch, batch]
    )
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    losses = -found.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert values["perplexity"] == pytest.approx(float(losses[counted].mean().exp()), rel=1e-12)
    wide = expected.double().log_softmax(-1)
    each = (wide.exp() * (wide - found.double().log_softmax(-1))).sum(-1)
    assert values["kl"] == pytest.approx(float(each[mask.bool()].mean()), rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 1 << 21])
@pytest.mark.parametrize("shape", [(5, 11), (2, 3, 4, 11)])
def test_divergence_of_logits_of_any_rank(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong if classes of a classifier, which has no positions, were taken for positions."""
    from graphopt.measure import metrics

    monkeypatch.setattr(metrics, "_VALUES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randn(shape, generator=generator) for _ in range(2))
    value = metrics.measure("kl", lambda _: {"logits": found}, lambda _: {"logits": expected}, [{}])
    wide = expected.double().log_softmax(-1)
    each = (wide.exp() * (wide - found.double().log_softmax(-1))).sum(-1)
    assert value == pytest.approx(float(each.mean()), rel=1e-12)
