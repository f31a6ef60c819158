"""Tokenizers of GGUF files: as sentencepiece and byte pairs are defined, and as transformers reads the same files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import pytest
import transformers
from tokenizers import Tokenizer

from graphopt import CheckpointError
from graphopt.data.tokenizer import Tokenizer as Ours
from graphopt.frontends.gguf.checkpoint import read_gguf
from graphopt.frontends.gguf.splitting import SPLITTINGS


def _file(tmp_path: Path, vocabulary: str, name: str = "llama", edit: Any = None) -> Path:
    model = gguf_files.make(name)
    return gguf_files.write(tmp_path / "m.gguf", name, model, vocabulary=vocabulary, edit=edit)


def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_str(read_gguf(path)[2]["tokenizer.json"].decode())


def test_pieces_are_joined_by_score(tmp_path: Path) -> None:
    found = _tokenizer(_file(tmp_path, "pieces"))

    def pieces(text: str) -> list[str]:
        return list(found.encode(text, add_special_tokens=False).tokens)

    space = "\u2581"
    assert pieces("hello") == [f"{space}hello"]
    assert pieces("lo hello") == [space, "lo", f"{space}hello"]
    # "ll" has the best score, so it is joined before "lo" could be
    assert pieces("llo") == [space, "ll", "o"]
    assert pieces("wé") == [f"{space}w", "<0xC3>", "<0xA9>"]
    assert pieces("<|end|>w") == ["<|end|>", f"{space}w"]
    assert found.decode(found.encode("hello wé lo").ids) == "hello wé lo"
    # sentencepiece puts a token before every text where the file does not say otherwise
    assert found.encode("hello").tokens == ["<s>", f"{space}hello"]


def test_pieces_without_a_space_before(tmp_path: Path) -> None:
    path = _file(
        tmp_path, "pieces", "gemma2", lambda w, t: (w.add_add_space_prefix(False), w.add_add_bos_token(False))
    )
    assert _tokenizer(path).encode("hello hello").tokens == ["hello", "\u2581hello"]


@pytest.mark.parametrize("vocabulary", ["bytes", "pieces"])
def test_transformers_reads_the_same_tokens(vocabulary: str, tmp_path: Path) -> None:
    path = _file(tmp_path, vocabulary)
    ours = _tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello world", "hello worlds<|end|>hello", "lo\nhé  o", "", "Hello, w"):
        ids = ours.encode(text, add_special_tokens=False).ids
        if vocabulary == "bytes" or "<|end|>" not in text:  # a space after a special token: llama.cpp has one
            assert ids == theirs(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("vocabulary", ["bytes", "pieces"])
def test_a_folder_keeps_the_tokens(vocabulary: str, tmp_path: Path) -> None:
    path = _file(tmp_path, vocabulary)
    config, _, files, _ = read_gguf(path)
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("hello world", "hello 12<|end|> hello", "hé  o"):
        assert again(text).input_ids == ours.encode(text).ids
        assert again.decode(again(text).input_ids, skip_special_tokens=True) == ours.decode(
            ours.encode(text).ids
        )
    assert (again.bos_token, again.eos_token, again.pad_token_id) == ("<s>", "<|end|>", 0)
    told = again.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    program: Any = SimpleNamespace(origin=SimpleNamespace(assets=files))
    assert told == Ours(program).chat([{"role": "user", "content": "hello"}]) == "<user>hello<|end|>"


def test_every_way_of_cutting_text_is_an_expression(tmp_path: Path) -> None:
    """Digits by themselves, in threes, or in runs, as each name says in llama.cpp."""
    digits = {"smollm": 1, "qwen2": 1, "tekken": 1, "llama-bpe": 3, "gpt-4o": 3, "deepseek-v3": 3, "gpt-2": 5}
    text = "It's  naïve: 12345\n\n\ttabs!? 日本語 x=1;"
    from tokenizers import Regex, pre_tokenizers

    for name, splitting in SPLITTINGS.items():
        cuts = [pre_tokenizers.Split(Regex(e), "isolated") for e in splitting.expressions]
        parts = [part for part, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)]
        assert "".join(parts) == text
        assert len(parts) > 8
        if name in digits:
            assert max(sum(c.isdigit() for c in part) for part in parts) == digits[name]


def test_ends_of_turns_are_kept(tmp_path: Path) -> None:
    path = _file(tmp_path, "bytes", edit=lambda w, t: w.add_eot_token_id(1))
    config, _, files, _ = read_gguf(path)
    assert config["eos_token_id"] == [2, 1]
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 1]


def test_chat_templates_by_name(tmp_path: Path) -> None:
    def named(writer: Any, tensors: Any) -> None:
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}")

    files = read_gguf(_file(tmp_path, "bytes", edit=named))[2]
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"

    def outside(writer: Any, tensors: Any) -> None:
        writer.add_array("tokenizer.chat_templates", ["../../x"])
        writer.add_string("tokenizer.chat_template.../../x", "{{ tools }}")

    with pytest.raises(CheckpointError, match="no name for a file"):
        read_gguf(_file(tmp_path, "bytes", edit=outside))


def test_a_model_without_a_tokenizer_is_a_model(tmp_path: Path) -> None:
    _, _, files, _ = read_gguf(_file(tmp_path, "none"))
    assert list(files) == ["generation_config.json"]
