"""GGUF files that are damaged, absurd or contradict themselves: the designed error, in little memory, and no folder."""

from __future__ import annotations

import functools
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt import CheckpointError, GraphoptError
from graphopt.cli.running import run
from graphopt.frontends.gguf.checkpoint import read_gguf
from graphopt.frontends.gguf.header import read_header


@functools.cache
def _whole() -> bytes:
    """Return the bytes of a small file of every part: strings, arrays, tables and quantised tensors."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = gguf_files.write(
            Path(place) / "m.gguf", "llama3", gguf_files.make("llama3", vocab_size=288),
            kind=gguf.GGMLQuantizationType.Q4_1, vocabulary="bytes",
        )  # fmt: skip
        return path.read_bytes()


def _refused(path: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_gguf(path)
    assert path.name in str(caught.value)


def _number(raw: bytes, name: str, where: str) -> int:
    """Return the place of a part of a tensor's entry."""
    at = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dims = struct.unpack_from("<I", raw, at)[0]
    return {"dimensions": at, "shape": at + 4, "type": at + 4 + 8 * dims, "offset": at + 8 + 8 * dims}[where]


def _put(form: str, value: int, place: int | Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        at = place if isinstance(place, int) else place(raw)
        return raw[:at] + struct.pack("<" + form, value) + raw[at + struct.calcsize("<" + form) :]

    return change


def _of(name: str, where: str) -> Callable[[bytes], int]:
    return lambda raw: _number(raw, name, where)


def _value(key: str) -> Callable[[bytes], int]:
    """Return the place of an entry's value, or of an array's element type."""
    return lambda raw: raw.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4


def _after(place: Callable[[bytes], int], count: int) -> Callable[[bytes], int]:
    return lambda raw: place(raw) + count


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "ends within its first word"),
    "another file": (lambda raw: b"PK\3\4" + raw[4:], "does not begin with GGUF"),
    "version 1": (_put("I", 1, 4), "version 1; versions 2 and 3 are supported"),
    "version 9": (_put("I", 9, 4), "version 9"),
    "big-endian": (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian.*\n.*gguf-convert-endian"),
    "2^60 tensors": (_put("Q", 1 << 60, 8), "claims 1152921504606846976 tensors"),
    "more tensors than bytes": (_put("Q", 50_000, 8), "claims 50000 tensors"),
    "2^60 entries": (_put("Q", 1 << 60, 16), "claims 1152921504606846976 metadata entries"),
    "a name of 2^62 bytes": (_put("Q", 1 << 62, 24), "name of a metadata entry claims 4611686018427387904"),
    "a string of 2^62 bytes": (_put("Q", 1 << 62, _value("general.architecture")), "architecture.*claims 46116860"),
    "an array of 2^61 numbers": (
        _put("Q", 1 << 61, _after(_value("tokenizer.ggml.token_type"), 4)), "token_type.*claims"),
    "an array of 2^61 strings": (
        _put("Q", 1 << 61, _after(_value("tokenizer.ggml.tokens"), 4)), "claims 2305843009213693952 strings"),
    "an array of arrays": (_put("I", 9, _value("tokenizer.ggml.tokens")), "array of the unsupported type 9"),
    "an unknown value type": (
        lambda raw: _put("I", 77, _after(_value("general.architecture"), -4))(raw), "unknown type 77"),
    "no UTF-8": (lambda raw: raw.replace(b"blk.0.attn_norm", b"blk.0.att\xff_norm"), "is not UTF-8"),
    "two tensors of one name": (
        lambda raw: raw.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"), "two tensors 'blk.0.attn_norm.weight'"),
    "two entries of one name": (
        lambda raw: raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
        "two metadata entries 'tokenizer.ggml.eos_token_id'"),
    "2^31 dimensions": (_put("I", 1 << 31, _of("output_norm.weight", "dimensions")), "claims 2147483648 dimensions"),
    "a dimension of 2^63": (_put("Q", 1 << 63, _of("output_norm.weight", "shape")), "has the shape"),
    "a dimension of 2^40": (_put("Q", 1 << 40, _of("output_norm.weight", "shape")), "the file at|overlaps"),
    "no values": (_put("Q", 0, _of("output_norm.weight", "shape")), "has the shape"),
    "an unknown tensor type": (_put("I", 999, _of("output_norm.weight", "type")), "type 999, which the library gguf"),
    "a removed tensor type": (_put("I", 4, _of("output_norm.weight", "type")), "type 4, which the library gguf"),
    "no whole blocks": (_put("Q", 65, _of("output.weight", "shape")), "rows of 65 values, and Q4_1 comes in blocks"),
    "a type without values": (
        _put("I", 26, _of("output_norm.weight", "type")), "stored as I32, which the library gguf does not.*\n.*Q4_1"),
    "outside the file": (_put("Q", 1 << 62, _of("output_norm.weight", "offset")), "the file at"),
    "overlapping": (_put("Q", 0, _of("output_norm.weight", "offset")), "overlaps another tensor"),
    "not aligned": (_put("Q", 1, _of("output_norm.weight", "offset")), "no multiple of 32"),
    "shapes unlike the metadata": (
        _put("I", 128, _value("llama.feed_forward_length")), r"has shape \[96, 64\], and \[128, 64\] by the metadata"),
    "more layers than tensors": (_put("I", 60_000, _value("llama.block_count")), "claims 60000 layers"),
    "another number of layers": (_put("I", 1, _value("llama.block_count")), "blk.1.* is none of those of llama"),
    "no heads": (_put("I", 0, _value("llama.attention.head_count")), "at least 1, not 0"),
    "heads that do not divide": (_put("I", 3, _value("llama.attention.head_count_kv")), "cannot share 3"),
    "no number": (_put("I", 0x7FC00000, _value("llama.rope.freq_base")), "a number above 0, not nan"),
    "a missing entry": (
        lambda raw: raw.replace(b"llama.embedding_length", b"other.embedding_length"), "no entry llama.embedding_length"),
    "a missing tensor": (
        lambda raw: raw.replace(b"blk.1.attn_norm", b"foo.1.attn_norm"), "no tensor blk.1.attn_norm.weight"),
    "an entry that nobody knows": (
        lambda raw: raw.replace(b"llama.context_length", b"llama.logits_length_"), "llama.logits_length_ is unknown"),
    "an entry of another type": (
        _put("I", 6, _after(_value("llama.block_count"), -4)), "block_count must be a whole number"),
    "a token outside": (_put("I", 288, _value("tokenizer.ggml.eos_token_id")), "eos_token_id must be a whole number"),
    "another vocabulary": (_put("I", 287, _value("llama.vocab_size")), "vocab_size is 287, and .* has 288 rows"),
    "a tokenizer nobody knows": (
        lambda raw: raw.replace(b"smollm", b"smallm"), "pre-tokenizer 'smallm' is not supported.*\n.*smollm"),
    "a merge of nothing": (lambda raw: raw.replace(b"hell o", b"hull o"), "its merge 'hull o'"),
    "factors of no rule": (
        lambda raw: raw.replace(numpy.float32(8).tobytes() * 2, numpy.float32([8, 3]).tobytes()), "follow no rule"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    change, pattern = DAMAGES[damage]
    raw = change(_whole())
    assert raw != _whole()
    (tmp_path / "m.gguf").write_bytes(raw)
    _refused(tmp_path / "m.gguf", pattern)


def test_the_file_itself_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(_whole())
    config, tensors, files, _ = read_gguf(tmp_path / "m.gguf")
    assert config["rope_parameters"] == gguf_files.LLAMA3
    assert len(tensors) == 21 and "tokenizer.json" in files


def _outcome(path: Path) -> str:
    """Read everything that can be read of a file: a program could be made, or the designed error."""
    try:
        _, tensors, _, _ = read_gguf(path)
        for source in tensors.values():
            assert source.load().shape == source.shape
    except CheckpointError as error:
        assert str(path) in str(error)
        return "refused"
    return "read"


_SOMEWHERE = st.integers(0, 1 << 30)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    end=st.one_of(st.none(), _SOMEWHERE),
    flips=st.lists(st.tuples(_SOMEWHERE, st.integers(1, 255)), max_size=4),
    words=st.lists(st.tuples(_SOMEWHERE, st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])), max_size=2),
)  # fmt: skip
def test_any_damage_is_refused_or_harmless(
    end: int | None, flips: list[tuple[int, int]], words: list[tuple[int, int]], tmp_path: Path
) -> None:
    raw = bytearray(_whole())
    # the header is a tenth of the file and holds everything that can mislead: most of the damage is there
    header = raw.index(b"rope_freqs.weight")
    for place, mask in flips:
        raw[place % (header if place % 8 else len(raw))] ^= mask
    for place, word in words:
        at = place % header
        raw[at : at + 8] = struct.pack("<Q", word)
    if end is not None:
        del raw[end % len(raw) :]
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(raw))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = _outcome(path)
    if end is not None:
        assert found == "refused"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 500 << 20, f"reading {len(raw)} bytes took {grown >> 20} MB"


def test_damage_ends_commands_as_designed_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_whole()[:-100])
    assert run(["export", str(path), "--to", "huggingface", "-o", str(tmp_path / "folder")]) == 3
    shown = capsys.readouterr()
    assert "m.gguf" in shown.err and "the file at" in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_files_that_are_not_there_or_no_models(tmp_path: Path) -> None:
    import graphopt

    with pytest.raises(CheckpointError, match=r"none.gguf does not exist"):
        graphopt.capture(tmp_path / "none.gguf")
    # the name does not matter where the file says what it is
    blob = tmp_path / "0f3a"
    blob.write_bytes(_whole()[:2000])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        graphopt.capture(blob)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_whole())
    source = read_gguf(path)[1]["model.norm.weight"]
    path.write_bytes(_whole() + b"x")
    with pytest.raises(GraphoptError, match="has changed since"):
        source.load()
    path.write_bytes(_whole()[:5000])
    with pytest.raises(GraphoptError, match="has changed since"):
        source.load()


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda w, t: w.add_expert_count(8), "mixture of experts"),
        (lambda w, t: w.add_value_length(64), "values are not as wide as its keys"),
        (lambda w, t: w.add_rope_dimension_count(8) if False else w.add_causal_attention(False), "not causal"),
        (lambda w, t: w.add_string("general.alignment", "x"), "alignment"),
        (lambda w, t: t.update({"blk.0.ffn_gate_inp.weight": numpy.zeros((2, 64), numpy.float32)}), "ffn_gate_inp"),
        (lambda w, t: t.pop("blk.1.ffn_up.bias"), "no tensor blk.1.ffn_up.bias"),
        (lambda w, t: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rotary positions, 'longrope', is not"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_refused(edit: Any, pattern: str, tmp_path: Path) -> None:
    model = gguf_files.make("llama_biases")
    _refused(gguf_files.write(tmp_path / "m.gguf", "llama_biases", model, edit=edit), pattern)


def _parts(tmp_path: Path, name: str = "m") -> list[Path]:
    """Write a model in three files: metadata, the embedding and first layer, and the rest."""
    raw = gguf_files.make("llama")
    tensors = gguf_files.tensors_of("llama", raw)
    groups = [
        {},
        {k: v for k, v in tensors.items() if "blk.1" not in k},
        {k: v for k, v in tensors.items() if "blk.1" in k},
    ]
    found = []
    for number, group in enumerate(groups):
        path = tmp_path / f"{name}-{number + 1:05d}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            gguf_files.parameters(writer, "llama", raw.config)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(tensors))
        for key, value in group.items():
            writer.add_tensor(key, numpy.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append(path)
    return found


def test_parts_are_one_model(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    state = gguf_files.make("llama").state_dict()
    for part in (parts[0], parts[2]):
        _, tensors, _, _ = read_gguf(part)
        assert set(tensors) == set(state)
        for key, source in tensors.items():
            assert torch.equal(source.load(), state[key])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    whole = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    _refused(parts[1], "part 3 of 3 of a model, and its name does not say so")
    with pytest.raises(CheckpointError, match="00002-of-00003.gguf: it is no part 2 of 3"):
        read_gguf(parts[0])
    parts[1].write_bytes(whole)
    parts[2].rename(tmp_path / "elsewhere.gguf")
    _refused(parts[0], "part 1 of 3 of a model, and .*m-00003-of-00003.gguf does not exist")
    _refused(tmp_path / "elsewhere.gguf", "its name does not say so.*\n.*--merge")


def test_headers_are_read_without_their_tensors(tmp_path: Path) -> None:
    """A file may be larger than memory: this one is, with a hole for its tensors."""
    raw = _whole()
    path = tmp_path / "m.gguf"
    at = _number(raw, "blk.1.ffn_up.weight", "offset")
    with path.open("wb") as file:
        file.write(raw[:at] + struct.pack("<Q", 1 << 40) + raw[at + 8 :])
        try:
            file.truncate((1 << 40) + len(raw))
        except OSError:
            pytest.skip("the file system has no files with holes of this size")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = read_header(path)
    assert header.tensors["blk.1.ffn_up.weight"].start > 1 << 40
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 100 << 10
