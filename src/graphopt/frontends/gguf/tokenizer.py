"""Conversion of the tokenizer in a GGUF file's metadata to the files of a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ...ir.storage.names import is_asset
from .header import Header
from .splitting import SPLITTINGS, Splitting

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
# llama.cpp's defaults for sentencepiece
_SENTENCEPIECE_SPECIAL = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
# turns and messages end at these too
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_KEY = "tokenizer.ggml."
_SPACE = "\u2581"


@dataclass
class Vocabulary:
    """Files of a tokenizer by name, ids of special tokens, and of those that end a text."""

    files: dict[str, bytes] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


def read_tokenizer(header: Header, architecture: str, rows: int) -> Vocabulary:
    """Return the tokenizer of a file as files of a folder; empty if the file has none.

    Args:
        header: of the file.
        architecture: decides how a space is put before a text.
        rows: of the embedding, an upper limit on the number of tokens.

    Raises:
        CheckpointError: it is of an unsupported kind, or contradicts itself.
    """
    kind = header.text("tokenizer.ggml.model", "none")
    contents = Vocabulary()
    if kind in ("none", "no_vocab"):
        return contents
    tokens = header.strings(_KEY + "tokens")
    if not 0 < len(tokens) <= rows:
        raise header.wrong(f"it has {len(tokens)} tokens, and {rows} embeddings for them")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(t for n, t in enumerate(tokens) if vocabulary[t] != n)
        raise header.wrong(f"its tokens list {twice[:60]!r} twice")
    kinds = [_NORMAL] * len(tokens)
    if header.has(_KEY + "token_type"):
        kinds = header.numbers(_KEY + "token_type").tolist()
        if len(kinds) != len(tokens):
            raise header.wrong(f"it has {len(tokens)} tokens, and kinds for {len(kinds)}")
    for name, key in _SPECIAL.items():
        default = _SENTENCEPIECE_SPECIAL.get(name) if kind == "llama" else None
        if header.has(_KEY + key) or (default is not None and default < len(tokens)):
            contents.special[name] = _number(header, key, len(tokens), default)
    ids = (_number(header, key, len(tokens)) for key in _ENDS if header.has(_KEY + key))
    contents.ends = list(dict.fromkeys(ids))
    if not contents.ends and "eos_token" in contents.special:
        contents.ends = [contents.special["eos_token"]]
    if kind == "gpt2":
        tokenizer, splitting = _byte_level(header, vocabulary)
    elif kind == "llama":
        tokenizer, splitting = (
            _sentencepiece(header, tokens, kinds, contents.special),
            Splitting((), add_bos=True),
        )
    else:
        raise header.wrong(
            f"its tokenizer is of the unsupported kind {kind[:40]!r}",
            hint="supported are gpt2 (byte pairs) and llama (sentencepiece); or give the model's Hugging Face folder",
        )
    texts = {name: tokens[number] for name, number in contents.special.items()}
    stripping = architecture == "phi3" and kind == "llama"
    tokenizer["added_tokens"] = [
        _added(number, token, number in contents.special.values() or kinds[number] == _CONTROL, stripping)
        for number, token in enumerate(tokens)
        if token and (kinds[number] in (_CONTROL, _USER_DEFINED) or number in contents.special.values())
    ]
    around = _surrounding_tokens(header, splitting, contents.special)
    tokenizer["post_processor"] = _template(
        [tokens[n] for n in around[0]], [tokens[n] for n in around[1]], vocabulary
    )
    contents.files["tokenizer.json"] = _checked(header, tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **texts,
        "add_bos_token": bool(around[0]),
        "add_eos_token": bool(around[1]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.count(f"{architecture}.context_length"),
    }
    _chat_templates(header, contents.files)
    contents.files["tokenizer_config.json"] = _json(config)
    return contents


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _number(header: Header, key: str, tokens: int, default: int | None = None) -> int:
    return header.count(_KEY + key, default, low=0, high=tokens)


def _added(number: int, token: str, special: bool, stripping: bool) -> dict[str, Any]:
    """Return the entry of a token that is matched whole in a text; those of Phi-3 include the spaces after them."""
    strip = stripping and token not in ("<unk>", "<s>", "<|endoftext|>")
    return {
        "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": strip, "normalized": False,
        "special": special,
    }  # fmt: skip


def _byte_level(header: Header, vocabulary: dict[str, int]) -> tuple[dict[str, Any], Splitting]:
    pre = header.text(_KEY + "pre", "default")
    splitting = SPLITTINGS.get(pre)
    if splitting is None:
        raise header.wrong(
            f"its pre-tokenizer {pre[:40]!r} is not supported",
            hint=f"supported are {', '.join(SPLITTINGS)}; or give the model's Hugging Face folder",
        )
    merges = []
    for line in header.strings(_KEY + "merges"):
        # no piece of a byte-level vocabulary contains a space, so the first one after the start separates the two
        first, _, second = line.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise header.wrong(f"its merge {line[:60]!r} is not of tokens that it has")
        merges.append([first, second])
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in splitting.expressions
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _pairs(vocabulary, merges, ignore_merges=splitting.ignore_merges),
    }
    return tokenizer, splitting


def _pairs(vocabulary: dict[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        **more, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip


def _sentencepiece(
    header: Header, tokens: list[str], kinds: list[int], special: dict[str, int]
) -> dict[str, Any]:
    scores = header.numbers(_KEY + "scores")
    if scores.size != len(tokens):
        raise header.wrong(f"it has {len(tokens)} tokens, and scores for {scores.size}")
    unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == _UNKNOWN), None)
    if unknown is None and "unk_token" in special:
        unknown = tokens[special["unk_token"]]
    prefix = header.flag(_KEY + "add_space_prefix", True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *after,
            ],
        },
        "model": _pairs(
            vocabulary, _merges(tokens, kinds, scores.tolist()), unk_token=unknown, fuse_unk=True,
            byte_fallback=any(kind == _BYTE for kind in kinds),
        ),
    }  # fmt: skip


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """Return the merges in order of the scores of the pieces that they make, with every way of making each piece.

    Sentencepiece joins the neighbours whose piece has the highest score, leftmost first; expressed as byte pairs,
    that is one merge for each way of splitting a piece into two pieces, in the order of scores.
    """
    # user-defined tokens are matched whole before any merge, and are not merged
    pieces = {t: n for n, t in enumerate(tokens) if t and kinds[n] == _NORMAL}
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, number in pieces.items():
        for split in range(1, len(token)):
            first, second = pieces.get(token[:split]), pieces.get(token[split:])
            if first is not None and second is not None:
                ranked.append((-scores[number], number, first, second, token[:split], token[split:]))
    ranked.sort(key=lambda entry: entry[:4])
    return [[first, second] for *_, first, second in ranked]


def _surrounding_tokens(
    header: Header, splitting: Splitting, special: dict[str, int]
) -> tuple[list[int], list[int]]:
    """Return the tokens that are added before and after every text."""
    before, after = [], []
    if header.flag(_KEY + "add_bos_token", splitting.add_bos):
        if "bos_token" not in special:
            raise header.wrong("it puts a token before every text, and does not say which")
        before.append(special["bos_token"])
    if header.flag(_KEY + "add_eos_token", False):
        if "eos_token" not in special:
            raise header.wrong("it puts a token after every text, and does not say which")
        after.append(special["eos_token"])
    return before, after


def _template(before: list[str], after: list[str], vocabulary: dict[str, int]) -> dict[str, Any]:
    def special(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": sequence, "type_id": kind}}
        return [*(special(t, kind) for t in before), middle, *(special(t, kind) for t in after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            t: {"id": t, "ids": [vocabulary[t]], "tokens": [t]} for t in dict.fromkeys([*before, *after])
        },
    }


def _checked(header: Header, tokenizer: dict[str, Any]) -> bytes:
    """Return tokenizer.json as the tokenizers library writes it."""
    from tokenizers import Tokenizer

    document = {"version": "1.0", "truncation": None, "padding": None, **tokenizer}
    try:
        return str(Tokenizer.from_str(json.dumps(document)).to_str(pretty=True)).encode()
    except Exception as error:
        raise header.wrong(f"its tokenizer contradicts itself: {error}") from error


def _chat_templates(header: Header, files: dict[str, bytes]) -> None:
    if header.has("tokenizer.chat_template"):
        files["chat_template.jinja"] = header.text("tokenizer.chat_template").encode()
    for name in header.strings("tokenizer.chat_templates", []):
        file = f"additional_chat_templates/{name}.jinja"
        if "/" in name or not is_asset(file):
            raise header.wrong(f"its chat template is called {name[:60]!r}, which is no name for a file")
        files[file] = header.text(f"tokenizer.chat_template.{name}").encode()
