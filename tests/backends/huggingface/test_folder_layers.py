"""Folders that lost layers: what the configuration class derives from a layer's number stays with its layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from amounts import cases, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

import graphopt
from graphopt import LoweringError
from graphopt.backends.huggingface import layers as layers
from graphopt.frontends.architecture import tensor_names
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.facts import RemovedLayers

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def folder(path: Path, config: Any, model: str, **changes: Any) -> Path:
    """Write a model with large weights, so that windows show, and change its config.json; None takes a key away."""
    torch.manual_seed(0)
    made = getattr(transformers, model)(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    made.eval().save_pretrained(path)
    file = path / "config.json"
    told = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    return path


def shorter(path: Path, out: Path, model: str, gone: str = "[1]", tokens: int = 40) -> float:
    """Remove layers, write the folder, and return how far transformers is from the program beyond its windows."""
    program = graphopt.optimize(capture_huggingface(path, compare=False), f"skip-layers{{layers={gone}}}")
    program.save_pretrained(out)
    again = getattr(transformers, model).from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, 60, (2, tokens))
    with torch.no_grad():
        expected = again(ids).logits
    found = program(input_ids=ids)["logits"].float()
    return float((found - expected).abs().max() / expected.abs().max())


GEMMA2 = {**SMALL, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 16}
NEO = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 48,
    "window_size": 8,
}


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> graphopt.Program:
    """Gemma 2 in bfloat16 whose configuration leaves the pattern of windows to the library, without its second layer."""
    config = transformers.Gemma2Config(**GEMMA2)
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("gemma2")
    transformers.Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    file = place / "config.json"
    told = json.loads(file.read_text())
    assert told.pop("layer_types")
    file.write_text(json.dumps(told))
    return graphopt.optimize(capture_huggingface(place, compare=False), "skip-layers{layers=[1]}")


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are written with the windows that layers would have by their new numbers."""
    from graphopt.backends.huggingface import save as huggingface

    right = huggingface.without_layers

    def renamed(*args: Any) -> dict[str, Any]:
        return right(*args) | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

    monkeypatch.setattr(huggingface, "without_layers", renamed)


def test_a_pattern_of_windows_that_is_nowhere_written_stays_with_its_layers(
    gemma2: graphopt.Program, tmp_path: Path
) -> None:
    report = gemma2.save_pretrained(tmp_path / "out")
    # 1.8e-5, all of it from one number: the embedding's factor, sqrt(32), is rounded to bfloat16 in the captured model
    # and not in the one that is loaded in float32; with that number rounded in both, the outputs are the same bits
    assert max(report.errors.values()) < 1e-4
    kinds = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"]


def test_a_pattern_that_is_stored_as_a_pattern_is_written_anew(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 2]])
    made = folder(tmp_path / "in", config, "GPTNeoForCausalLM")
    assert shorter(made, tmp_path / "out", "GPTNeoForCausalLM") < 1e-5
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert again.attention_layers == ["global", "global", "local"]


def test_a_list_of_tokens_as_long_as_there_are_layers_is_no_list_of_layers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2)
    made = folder(tmp_path / "in", config, "LlamaForCausalLM", begin_suppress_tokens=[22, 57])
    shorter(made, tmp_path / "out", "LlamaForCausalLM")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["begin_suppress_tokens"] == [22, 57]


@pytest.mark.usefixtures("wrong")
def test_a_wrong_window_is_seen_in_few_bits(gemma2: graphopt.Program, tmp_path: Path) -> None:
    """Wrong if the check stays short of the window, or allows what bfloat16 rounds away."""
    with pytest.raises(LoweringError, match="differs from the program .* on inputs of 21 tokens"):
        gemma2.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("wrong")
def test_a_window_too_long_to_run_is_compared_as_it_was_captured(
    gemma2: graphopt.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.huggingface import compare as huggingface_compare

    monkeypatch.setattr(huggingface_compare, "_FLOPS", 1)
    with pytest.raises(LoweringError, match="attention 1 of the folder's model sees"):
        gemma2.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_of_two_equal_depths_the_one_that_is_meant_changes(side: str) -> None:
    """Wrong if the first number that fits is taken."""
    part = transformers.T5GemmaConfig().encoder.to_dict() | {**GEMMA2, "layer_types": None}
    raw = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=64).to_dict()
    stack = RemovedLayers(f"model.{side}.layers.", 4, (1,))
    edited = layers.without_layers(raw, [stack], tensor_names)
    depths = {s: edited[s]["num_hidden_layers"] for s in ("encoder", "decoder")}
    assert depths == {"encoder": 4, "decoder": 4} | {side: 3}
    assert edited[side]["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    with pytest.raises(LoweringError, match="none of them is known to count"):
        layers.without_layers(raw, [replace(stack, prefix="elsewhere.")], tensor_names)


# configuration class, its options, and what tells one layer from another
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, "layer_types"),
    "gemma3_text": ({"sliding_window_pattern": 3}, "layer_types"),
    "cohere2": ({"sliding_window_pattern": 3}, "layer_types"),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 3}, "layer_types"),
    "gpt_neo": ({"attention_types": [[["global", "local", "local"], 2]]}, "attention_layers"),
    "llama4_text": ({"interleave_moe_layer_step": 2}, "no_rope_layers"),
    "smollm3": ({}, "no_rope_layers"),
    "lfm2": ({"full_attn_idxs": [0, 3]}, "layer_types"),
    "modernbert": ({}, "layer_types"),
    "glm_moe_dsa": ({}, "indexer_types"),
    "gemma3n_text": ({"num_kv_shared_layers": 2}, "layer_types"),
    "dots1": ({"first_k_dense_replace": 2}, "layer_types"),
    "minimax": ({}, "layer_types"),
    "granite_swa": ({}, "layer_types"),
}


@settings(max_examples=examples(30), deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(2, 7), st.data())
def test_layers_keep_what_the_class_derives_from_their_number(kind: str, count: int, data: Any) -> None:
    options, key = KINDS[kind]
    cls = CONFIG_MAPPING[kind]
    depth = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if kind == "gpt_neo":
        count, options = 6, options
    options = options | {"full_attn_idxs": [0, count - 1]} if kind == "lfm2" else options
    raw = {"model_type": kind, depth: count, **options}
    before = getattr(layers.load(raw), key)
    gone = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    try:
        edited = layers.without_layers(raw, [RemovedLayers("model.layers.", count, tuple(sorted(gone)))])
    except LoweringError as error:
        assert "cannot hold" in str(error) or "does not accept" in str(error) or "takes keys" in str(error)
        return
    loaded = layers.load(edited)
    assert list(getattr(loaded, key)) == [v for i, v in enumerate(before) if i not in gone]
    assert getattr(loaded, depth) == count - len(gone)


MIXTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "qwen2_moe": (
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        lambda c, i: i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0,
    ),
    "deepseek_v3": ({"first_k_dense_replace": 2}, lambda c, i: i >= c.first_k_dense_replace),
    "ernie4_5_moe": (
        {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1},
        lambda c, i: (i + 1) % c.moe_layer_interval == 0 and c.moe_layer_start_index <= i <= c.moe_layer_end_index,
    ),
    "llama4_text": ({"moe_layers": [1, 4]}, lambda c, i: i in c.moe_layers),
    "jamba": (
        {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 3, "attn_layer_offset": 1},
        lambda c, i: (c.layers_num_experts[i], c.layers_block_type[i]),
    ),
    "mllama_text_model": ({"cross_attention_layers": [1, 4]}, lambda c, i: i in c.cross_attention_layers),
}  # fmt: skip


@settings(max_examples=examples(30), deadline=None)
@given(st.sampled_from(sorted(MIXTURES)), st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_mixtures_stay_mixtures(kind: str, gone: set[int]) -> None:
    """Rules by a layer's number are solved anew, or refused."""
    options, of = MIXTURES[kind]
    raw = {"model_type": kind, "num_hidden_layers": 6, **options}
    old = layers.load(raw)
    stack = RemovedLayers("model.layers.", 6, tuple(sorted(gone)))
    try:
        new = layers.load(layers.without_layers(raw, [stack]))
    except LoweringError:
        assert kind == "jamba", "every choice of layers can be said in this configuration"
        return
    kept = [i for i in range(6) if i not in gone]
    assert [of(new, n) for n in range(len(kept))] == [of(old, i) for i in kept]


def test_settings_of_single_layers_move_with_them() -> None:
    raw = transformers.LlamaConfig(
        **SMALL, num_hidden_layers=5, per_layer_config={1: {"intermediate_size": 24}, 4: {"intermediate_size": 64}}
    ).to_dict()  # fmt: skip
    edited = layers.without_layers(raw, [RemovedLayers("model.layers.", 5, (0, 1))])
    assert edited["per_layer_config"] == {"2": {"intermediate_size": 64}}
    assert layers.load(edited).per_layer_config[2].intermediate_size == 64
    assert layers.load(edited).per_layer_config[0].intermediate_size == 48


@pytest.mark.parametrize("kinds", cases(["representative"], ["all"]))
def test_every_list_that_a_configuration_class_makes_for_its_layers_is_known(kinds: str) -> None:
    """Wrong if the library has settings of layers that would keep their old meaning."""
    known = {*layers.ENTRIES, *layers.SOURCES, *layers.NUMBERS}
    unknown = {}
    for kind in CONFIG_MAPPING if kinds == "all" else {**KINDS, **MIXTURES}:
        cls = CONFIG_MAPPING[kind]
        depth = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        made = []
        for count in (7, 12):
            try:
                made.append((count, vars(cls(**{depth: count}))))
            except Exception:
                break
        if len(made) == 2:
            lists = [
                {k for k, v in found.items() if isinstance(v, (list, tuple)) and len(v) == n}
                for n, found in made
            ]
            unknown |= {(kind, key): made[0][1][key] for key in lists[0] & lists[1] - known}
    assert not unknown


def test_stages_of_a_backbone_are_counted_anew(tmp_path: Path) -> None:
    """Wrong if a stage were named that is no longer there, which no reader accepts, or another value were given."""
    from transformers import Dinov2Config, Dinov2Model

    from graphopt.backends.huggingface.layers import settings as settings_of

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14,
        out_features=["stem", "stage2", "stage4"],
    )  # fmt: skip
    said = settings_of(config, 4, [0, 2, 3])
    assert said["out_indices"] == [0, 1, 3] and said["out_features"] == ["stem", "stage1", "stage3"]
    Dinov2Model(config).eval().save_pretrained(tmp_path / "in")
    program = graphopt.capture(tmp_path / "in")
    report = graphopt.optimize(program, "skip-layers{layers=[1]}").save_pretrained(tmp_path / "out")
    assert max(report.errors.values()) < 1e-4
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["out_features"] == ["stem", "stage1", "stage3"]
