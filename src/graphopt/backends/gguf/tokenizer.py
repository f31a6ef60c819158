"""A tokenizer.json as the entries of a GGUF file: byte pairs, and pieces with bytes to fall back on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...ir.errors import LoweringError

PreTokenizers = Mapping[str, tuple[Sequence[str], bool]]
"""Expressions by which text is split, and whether whole words precede merges, by name."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_SPECIAL = {
    "bos_token": "add_bos_token_id", "eos_token": "add_eos_token_id", "unk_token": "add_unk_token_id",
    "pad_token": "add_pad_token_id", "sep_token": "add_sep_token_id", "mask_token": "add_mask_token_id",
}  # fmt: skip
# of names with one meaning, those that llama.cpp's converter writes
_PREFERRED = ("llama-bpe", "smollm", "gpt-2", "qwen2", "tekken", "gpt-4o", "deepseek-v3")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAMPLES = (
    "Hello world! It's 123,456 o'clock; they'll see.", "  two  spaces\nand\n\n lines\t", "Café déjà vu – 你好, мир 🙂",
    "def f(x):\n    return x**2  # 0x7f",
)  # fmt: skip


def _refuse(why: str) -> LoweringError:
    return LoweringError(
        f"a GGUF file has no place for the model's tokenizer: {why}",
        hint="write a Hugging Face folder, and convert it with llama.cpp's convert_hf_to_gguf.py",
    )


def write_tokenizer(
    writer: Any, assets: Mapping[str, bytes], config: Any, rows: int, known: PreTokenizers
) -> None:
    """Add the tokenizer to a file; "none" if the model has none.

    Args:
        writer: ``gguf.GGUFWriter``.
        assets: the small files of the checkpoint.
        config: of transformers, for special tokens that the tokenizer does not name.
        rows: of the embedding.
        known: ways of splitting text before merges.

    Raises:
        LoweringError: it is of another kind.
    """
    if "tokenizer.json" not in assets:
        writer.add_tokenizer_model("none")
        return
    tokenizer = json.loads(assets["tokenizer.json"])
    settings = json.loads(assets.get("tokenizer_config.json", b"{}"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise _refuse(f"it is of the kind {model.get('type')}, and byte pairs are taken")
    vocabulary = dict(model["vocab"])
    added = {a["content"]: a for a in tokenizer.get("added_tokens") or ()}
    vocabulary |= {content: a["id"] for content, a in added.items()}
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [_UNUSED] * rows
    if not vocabulary or max(vocabulary.values()) >= rows:
        raise _refuse(f"it has {len(vocabulary)} tokens, and the model {rows} embeddings")
    special = _special(vocabulary, settings, config)
    for token, number in vocabulary.items():
        tokens[number] = token
        kinds[number] = _NORMAL
        if token in added:
            kinds[number] = _CONTROL if added[token].get("special") else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback") or _pieces(tokenizer):
        _write_pieces(writer, tokenizer, tokens, kinds, [tuple(m.split(" ")) for m in merges])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(tokenizer, known))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    for name, number in special.items():
        getattr(writer, _SPECIAL[name])(number)
    _write_ends(writer, special.get("eos_token"), getattr(config, "eos_token_id", None))
    before, after = _around(tokenizer.get("post_processor"))
    for given, name, add in (
        (before, "bos_token", writer.add_add_bos_token), (after, "eos_token", writer.add_add_eos_token)
    ):  # fmt: skip
        if given and given != [tokens[special[name]]] if name in special else given:
            raise _refuse(f"it puts {given} around texts")
        add(bool(given))
    _write_templates(writer, assets, settings)


def _special(vocabulary: Mapping[str, int], settings: Mapping[str, Any], config: Any) -> dict[str, int]:
    found = {}
    for name in _SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        number = vocabulary.get(token) if isinstance(token, str) else None
        if number is None:
            number = getattr(config, f"{name}_id", None)
            number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            found[name] = number
    return found


def _write_ends(writer: Any, end: int | None, ends: Any) -> None:
    """Add the tokens other than the usual one that end a text."""
    others = [n for n in (ends if isinstance(ends, list) else [ends]) if isinstance(n, int) and n != end]
    if len(others) > 2:
        raise _refuse(f"{len(others) + 1} tokens end a text")
    for number, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)


def _splitting(tokenizer: Mapping[str, Any], known: PreTokenizers) -> str:
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refuse(f"it changes texts first ({normalizer.get('type')})")
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    expressions: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            expressions.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits" and step.get("individual_digits"):
            expressions.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                expressions.append(_GPT2)
        else:
            raise _refuse(f"it splits texts by {kind}")
    whole = bool(tokenizer["model"].get("ignore_merges"))
    names = [n for n, (given, first) in known.items() if list(given) == expressions and first == whole]
    if not names:
        raise _refuse("the expressions by which it splits texts are none of those that files have names for")
    return next((n for n in _PREFERRED if n in names), names[0])


def _pieces(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether spaces are pieces, as sentencepiece has them."""
    return _SPACE in json.dumps(
        [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")], ensure_ascii=False
    )


def _write_pieces(
    writer: Any,
    tokenizer: Mapping[str, Any],
    tokens: list[str],
    kinds: list[int],
    merges: Sequence[Sequence[str]],
) -> None:
    unknown = tokenizer["model"].get("unk_token")
    place = {token: number for number, token in enumerate(tokens)}
    for number, token in enumerate(tokens):
        if token == unknown:
            kinds[number] = _UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = _BYTE
    # pieces are joined in the order of their scores; the merges tell that order
    scores = [-1e6] * len(tokens)
    for first, second in merges:
        number = place[first + second]
        if scores[number] == -1e6:
            scores[number] = -float(len(scores) - scores.count(-1e6))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_space_first(tokenizer))


def _space_first(tokenizer: Mapping[str, Any]) -> bool:
    normalizer, before = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    if before.get("type") == "Metaspace":
        return str(before.get("prepend_scheme", "always")) != "never"
    for step in steps:
        if step.get("type") not in (None, "Prepend", "Replace"):
            raise _refuse(f"it changes texts first ({step.get('type')})")
    return any(step.get("type") == "Prepend" for step in steps)


def _around(processor: Any) -> tuple[list[str], list[str]]:
    """Return the tokens that are put before and after a text."""
    if processor is None or processor.get("type") == "ByteLevel":
        return [], []
    if processor.get("type") == "Sequence":
        found = [_around(p) for p in processor["processors"]]
        return [t for b, _ in found for t in b], [t for _, a in found for t in a]
    if processor.get("type") != "TemplateProcessing":
        raise _refuse(f"it puts tokens around texts by {processor.get('type')}")
    before: list[str] = []
    after: list[str] = []
    place = before
    for part in processor["single"]:
        if "Sequence" in part:
            place = after
        else:
            place.append(part["SpecialToken"]["id"])
    return before, after


def _write_templates(writer: Any, assets: Mapping[str, bytes], settings: Mapping[str, Any]) -> None:
    templates = []
    plain = settings.get("chat_template")
    if "chat_template.jinja" in assets:
        plain = assets["chat_template.jinja"].decode()
    if isinstance(plain, str):
        templates.append({"name": "default", "template": plain})
    for name, data in assets.items():
        folder, _, file = name.rpartition("/")
        if folder == "additional_chat_templates" and file.endswith(".jinja"):
            templates.append({"name": file.removesuffix(".jinja"), "template": data.decode()})
    if templates:
        writer.add_chat_template(templates)


def require_same_tokens(before: bytes, after: bytes) -> None:
    """Require that two tokenizers make the same tokens of texts of several kinds.

    Raises:
        LoweringError: they do not.
    """
    from tokenizers import Tokenizer

    first, second = (Tokenizer.from_str(data.decode()) for data in (before, after))
    added = [a["content"] for a in json.loads(before).get("added_tokens") or ()][:64]
    for text in (*SAMPLES, " ".join(added), *(f"a{t}b" for t in added[:8])):
        one, other = first.encode(text).ids, second.encode(text).ids
        if one != other:
            raise _refuse(
                f"read back, it makes {other[:12]} of {text[:40]!r}, and the model's own {one[:12]}"
            )
