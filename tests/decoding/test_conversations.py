"""Conversations: which tokens the assistant says, losses on them alone, and data that a model writes itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import graphopt
from graphopt.data.reading import read_data
from graphopt.data.tokenizer import Tokenizer
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program
from graphopt.training import Settings
from graphopt.training.recipes import Language, masked_mean

TEMPLATE = (
    "<s>{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ ' ' + m['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "a small model"},
    {"role": "user", "content": "how small"},
    {"role": "assistant", "content": "very"},
]


@pytest.fixture(scope="module")
def speaker(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A Llama with a tokenizer and a chat template."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("speaker") / "llama"
    shutil.copytree(checkpoint("llama"), folder)
    letters = {chr(c): 10 + i for i, c in enumerate(range(97, 123))}
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "▁": 3,
        "[user]": 4,
        "[assistant]": 5,
        "[system]": 6,
        **letters,
    }
    fast = Fast(models.BPE(vocabulary, [], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Metaspace(prepend_scheme="never")
    fast.add_special_tokens(["<s>", "</s>", "[user]", "[assistant]", "[system]"])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return graphopt.capture(folder, compare=False)


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_what_the_assistant_says_is_what_transformers_says_it_does(speaker: Program, tmp_path: Path) -> None:
    """Wrong if a turn began or ended a token off, or the beginning of text came twice."""
    hub = tmp_path / "hub"
    speaker.save(tmp_path / "program")
    hub.mkdir()
    for name, data in speaker.origin.assets.items():
        (hub / name).write_bytes(data)
    theirs = PreTrainedTokenizerFast.from_pretrained(hub).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    batches, _ = read_data(
        speaker, written(tmp_path / "talk.jsonl", {"messages": TALK}), length=200, loss_on="assistant"
    )
    assert batches[0]["input_ids"].tolist() == [theirs["input_ids"]]
    assert batches[0]["loss_mask"].tolist() == [theirs["assistant_masks"]]
    whole, _ = read_data(speaker, tmp_path / "talk.jsonl", length=200)
    assert "loss_mask" not in whole[0]
    assert torch.equal(whole[0]["input_ids"], batches[0]["input_ids"])


def test_loss_counts_what_the_assistant_says_and_nothing_else(speaker: Program, tmp_path: Path) -> None:
    data = written(tmp_path / "talk.jsonl", {"messages": TALK}, {"messages": TALK[:3]})
    batch = read_data(speaker, data, length=48, loss_on="assistant", batch=4, shuffle=False)[0][0]
    recipe = Language().recipe(speaker)
    module = recipe.module()
    found = float(recipe.loss(module, batch))
    logits = module(input_ids=batch["input_ids"])["logits"]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    said = batch["loss_mask"][:, 1:].bool()
    assert found == pytest.approx(float(each[said].mean()), rel=1e-5)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    # the last token of a row is a target and nothing else
    row = int((batch["loss_mask"][:, -1] == 0).nonzero()[0])
    other["input_ids"][row, -1] = 7
    assert float(recipe.loss(module, other)) == pytest.approx(found, rel=1e-6), "an uncounted target counts"
    done, record = graphopt.train(
        speaker, "language", data, Settings(steps=3, learning_rate=1e-3), length=48, loss_on="assistant"
    )
    assert record.losses[-1] < record.losses[0]
    assert done.history[-1]["recipe"] == "language"


def test_means_over_what_counts() -> None:
    each = torch.tensor([[1.0, 2.0, 4.0]])
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "loss_mask": torch.tensor([[1, 0, 1, 1]])}
    assert float(masked_mean(each, {}, ahead=1)) == pytest.approx(7 / 3)
    assert float(masked_mean(each, {"attention_mask": batch["attention_mask"]}, ahead=1)) == pytest.approx(
        1.5
    )
    assert float(masked_mean(each, {"loss_mask": batch["loss_mask"]}, ahead=1)) == pytest.approx(3.0)
    assert float(masked_mean(each, batch, ahead=1)) == pytest.approx(2.0)
    assert float(masked_mean(each.expand(2, 1, 3), batch, ahead=1)) == pytest.approx(2.0)


def test_conversations_that_cannot_be_told_apart_are_refused(speaker: Program, tmp_path: Path) -> None:
    def read(*entries: Any, **options: Any) -> Any:
        return read_data(speaker, written(tmp_path / "x.jsonl", *entries), loss_on="assistant", **options)

    with pytest.raises(UsageError, match=r"x.jsonl, line 1 is a text; it has no turns"):
        read({"text": "hello"})
    with pytest.raises(UsageError, match=r"line 2: the assistant says nothing"):
        read({"messages": TALK}, {"messages": TALK[:2]})
    with pytest.raises(UsageError, match="within 8 tokens the assistant says nothing"):
        read({"messages": TALK[:3]}, length=8, sequences=1)
    with pytest.raises(UsageError, match="not 'user'"):
        read_data(speaker, tmp_path / "x.jsonl", loss_on="user")
    tokenizer = Tokenizer(speaker)
    tokenizer.template = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UsageError, match="does not write turns in sequence"):
        tokenizer.turns(TALK)
    tokenizer = Tokenizer(speaker)
    tokenizer.template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate"):
        tokenizer.chat(TALK)


def test_a_model_speaks_for_the_assistant(speaker: Program, tmp_path: Path) -> None:
    """Every turn is what the model says after its own earlier ones; wrong if it followed somebody else's words."""
    data = written(
        tmp_path / "in.jsonl",
        {"messages": TALK},
        {"messages": TALK[:2]},
        {"text": "once there was"},
        "and so on it went",
    )
    found = graphopt.answer(speaker, data, tmp_path / "out.jsonl", max_new_tokens=6, prompt_tokens=5, batch=2)
    assert (found.rows, found.left_out) == (4, 0)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(speaker)

    def says(before: list[dict[str, str]]) -> str:
        ids, _ = tokenizer.encode_chat(tokenizer.chat(before, answering=True))
        new = graphopt.generate(speaker, [ids], max_new_tokens=6)[0, len(ids) :].tolist()
        return tokenizer.decode([t for t in new if t != 2]).strip()

    talk = lines[0]["messages"]
    assert [m["role"] for m in talk] == [m["role"] for m in TALK]
    assert [m for m in talk if m["role"] != "assistant"] == [m for m in TALK if m["role"] != "assistant"]
    assert talk[2]["content"] == says(talk[:2])
    assert talk[4]["content"] == says(talk[:4])
    assert lines[1]["messages"] == talk[:3], "a conversation that ends with the user is answered"
    ids = tokenizer.encode("once there was")[:5]
    whole = graphopt.generate(speaker, [ids], max_new_tokens=6)[0].tolist()
    assert lines[2]["text"] == tokenizer.decode([t for t in whole if t != 2])
    assert not (tmp_path / "out.jsonl.part").exists()


def test_answers_go_on_after_an_interruption(
    speaker: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the same as without it, even if the last line was cut; nothing stands under its name before the end."""
    data = written(tmp_path / "in.jsonl", *({"text": f"{a} and {b}"} for a in "abc" for b in "de"))
    options: dict[str, Any] = {"max_new_tokens": 4, "batch": 2, "temperature": 1.0}
    graphopt.answer(speaker, data, tmp_path / "whole.jsonl", **options)

    class Interrupted:
        def start(self, what: str, total: int) -> None:
            self.count = 0

        def step(self, note: str = "") -> None:
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt

        def done(self) -> None: ...

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        graphopt.answer(speaker, data, out, progress=Interrupted(), **options)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    part.write_text(part.read_text()[:-3])
    with pytest.raises(UsageError, match="left by another call"):
        graphopt.answer(speaker, data, out, **{**options, "max_new_tokens": 5})
    graphopt.answer(speaker, data, out, **options)
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(UsageError, match="exists already"):
        graphopt.answer(speaker, data, out, **options)


def test_rows_that_do_not_fit_are_left_out_and_counted(speaker: Program, tmp_path: Path) -> None:
    limit = speaker.origin.config["max_position_embeddings"]
    long = {"messages": [{"role": "user", "content": "a" * limit}]}
    data = written(
        tmp_path / "in.jsonl", long, {"messages": [*TALK[:3], *long["messages"]]}, {"text": "short"}
    )
    found = graphopt.answer(speaker, data, tmp_path / "out.jsonl", max_new_tokens=4)
    assert (found.rows, found.left_out) == (2, 1)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant"], (
        "the turn that fits is kept"
    )
    only = written(tmp_path / "only.jsonl", long)
    with pytest.raises(UsageError, match="no row fits"):
        graphopt.answer(speaker, only, tmp_path / "none.jsonl", max_new_tokens=4)
    assert not (tmp_path / "none.jsonl").exists()
