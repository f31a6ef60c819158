"""Every causal language model of transformers and many other kinds: captured, blocks named, passes taken or refused.

    python benchmarks/model_zoo.py [NAMES...] [--workers 2] [--work build/zoo] [--again] [--page docs/models.md] [--quick]

A class of transformers is made small with random weights, saved, and captured from its folder; a plain network is
captured as a module with example inputs. Blocks are compared with what the model is made of: the classes of the
modules in its lists of layers, which graphopt never looks at. One process a class; what is done is kept, so that a
run can go on. What ends in anything but an error of graphopt's own is a fault, and the command's status then is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_models import (
    broken,
    counts,
    fault,
    first_line,
    in_a_process,
    names_of_decoders,
    refusal,
    small_model,
    try_passes,
)

ROOT = Path(__file__).parents[1]
SECONDS, QUICK_SECONDS = 900, 300
# KimiLinearAttention is the full attention of Kimi Linear
MIXER = (
    r"GatedDelta|DeltaNet|DeltaAttention|(?<!Kimi)LinearAttention|Mamba|SSM|Mixer|ShortConv$|RecurrentBlock|TimeMix|Retention|Lightning"
    r"|LongConv|xLSTMLayer|^LSTM|RwkvSelfAttention|MinimalGRU"
)
FFN = r"MLP|Mlp|FeedForward|FFN|Ffn|ChannelMix|RwkvFeed|Intermediate|DenseReluDense|DenseAct|DenseGatedAct"


@dataclass(frozen=True)
class Kind:
    """What a class is for, and what of its configuration is not as small as the names of sizes make it."""

    group: str
    options: dict[str, Any] = field(default_factory=dict)


def _group(group: str, names: str, **options: Any) -> dict[str, Kind]:
    return {name: Kind(group, options) for name in names.split()}


# what the names of sizes alone do not make small, or not consistent
DECODERS: dict[str, dict[str, Any]] = {
    "Gemma3nForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "BltForCausalLM": {
        "global_config": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
        "decoder_config": {"hidden_size_global": 64},
    },
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
        },
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "Dots3NoteForCausalLM": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    },
    "Gemma4AssistantForCausalLM": {
        "text_config": {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4},
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "NemotronHForCausalLM": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8},
    "RoCBertForCausalLM": {
        "pronunciation_embed_dim": 16, "pronunciation_vocab_size": 32, "shape_embed_dim": 16, "shape_vocab_size": 32,
    },
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 100,
    },
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "ZambaForCausalLM": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2,
    },
    "XLMWithLMHeadModel": {"emb_dim": 32, "n_words": 128, "causal": True},
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    "LongcatFlashForCausalLM": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2},
    "ReformerModelWithLMHead": {
        "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (4, 8), "attn_layers": ["local"] * 4, "feed_forward_size": 48,
        "attention_head_size": 8,
    },
}  # fmt: skip
_STAGES = {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 16, 32, 32]}
_BACKBONE = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "embedding_size": 16, "out_features": ["stage4"],
}  # fmt: skip
OTHERS: dict[str, Kind] = {
    **_group(
        "encoder-decoder",
        "T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration "
        "LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration BartForConditionalGeneration "
        "MBartForConditionalGeneration MarianMTModel PegasusForConditionalGeneration "
        "PegasusXForConditionalGeneration BlenderbotForConditionalGeneration "
        "BlenderbotSmallForConditionalGeneration M2M100ForConditionalGeneration NllbMoeForConditionalGeneration "
        "LEDForConditionalGeneration PLBartForConditionalGeneration MvpForConditionalGeneration "
        "ProphetNetForConditionalGeneration FSMTForConditionalGeneration T5GemmaForConditionalGeneration",
    ),
    **_group(
        "encoder",
        "BertForMaskedLM RobertaForMaskedLM DistilBertForMaskedLM AlbertForMaskedLM ElectraForMaskedLM "
        "MPNetForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM XLMRobertaForMaskedLM "
        "FNetForMaskedLM NomicBertForMaskedLM EuroBertForMaskedLM ConvBertForMaskedLM SqueezeBertForMaskedLM "
        "MobileBertForMaskedLM RoFormerForMaskedLM FunnelForMaskedLM EsmForMaskedLM NystromformerForMaskedLM "
        "MegatronBertForMaskedLM LayoutLMForMaskedLM",
    ),
    **_group(
        "vision",
        "ViTForImageClassification DeiTForImageClassification Dinov2ForImageClassification "
        "Dinov2WithRegistersForImageClassification SiglipForImageClassification BeitForImageClassification "
        "IJepaForImageClassification ViTMSNForImageClassification",
        image_size=32, patch_size=8,
    ),
    **_group("vision", "YolosForObjectDetection", image_size=[32, 48], patch_size=8),
    **_group("vision", "SwinForImageClassification Swinv2ForImageClassification DonutSwinForImageClassification",
             image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    **_group("vision", "ConvNextForImageClassification ConvNextV2ForImageClassification "
                       "ResNetForImageClassification RegNetForImageClassification",
             **_STAGES),
    **_group("vision", "PoolFormerForImageClassification FocalNetForImageClassification HieraForImageClassification "
                       "PvtForImageClassification PvtV2ForImageClassification SegformerForImageClassification "
                       "MobileNetV1ForImageClassification MobileNetV2ForImageClassification "
                       "MobileViTForImageClassification "
                       "CvtForImageClassification LevitForImageClassification "
                       "GLPNForDepthEstimation "
                       "TextNetForImageClassification SwiftFormerForImageClassification"),
    **_group("vision", "DPTForDepthEstimation", image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
             neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16),
    **_group("vision", "EfficientNetForImageClassification", width_coefficient=0.25, depth_coefficient=0.3,
             hidden_dim=320, image_size=64),
    **_group("vision", "DetrForObjectDetection", backbone_config={"model_type": "resnet", **_BACKBONE}),
    **_group("vision", "RTDetrForObjectDetection", encoder_in_channels=[16, 32, 32],
             decoder_in_channels=[32, 32, 32],
             backbone_config={"model_type": "rt_detr_resnet", **_BACKBONE, "out_features": ["stage2", "stage3", "stage4"]}),
    **_group("vision-language", "CLIPModel SiglipModel Siglip2Model BlipForConditionalGeneration "
                                "LlavaForConditionalGeneration PaliGemmaForConditionalGeneration "
                                "Qwen3VLForConditionalGeneration "
                                "InternVLForConditionalGeneration Mistral3ForConditionalGeneration "
                                "AltCLIPModel GroupViTModel "
                                "GitForCausalLM"),
    **_group("vision-language", "SamModel", vision_config={"output_channels": 32, "num_pos_feats": 16,
                            "image_size": 64, "patch_size": 16},
             prompt_encoder_config={"image_size": 64, "patch_size": 16}),
    **_group("vision-language", "MllamaForConditionalGeneration",
             vision_config={"image_size": 32, "patch_size": 8, "num_global_layers": 1, "max_num_tiles": 2,
                            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "vision_output_dim": 64,
                            "intermediate_layers_indices": [1]},
             text_config={"cross_attention_layers": [1, 3]}),
    **_group("vision-language", "Owlv2ForObjectDetection", projection_dim=32),
    **_group("audio", "MoonshineForConditionalGeneration",
             encoder_num_key_value_heads=4, decoder_num_key_value_heads=4),
    **_group("vision-language", "Idefics3ForConditionalGeneration SmolVLMForConditionalGeneration",
             vision_config={"image_size": 64, "patch_size": 16}),
    **_group("vision-language", "Blip2ForConditionalGeneration", image_token_index=100),
    **_group("vision-language", "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
             text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}),
    **_group("vision-language", "Gemma3ForConditionalGeneration",
             vision_config={"image_size": 32, "patch_size": 8}, mm_tokens_per_image=4),
    **_group("vision-language", "Florence2ForConditionalGeneration",
             vision_config={"embed_dim": [16, 16, 32, 32], "num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4],
                            "depths": [1, 1, 2, 1], "projection_dim": 32}),
    **_group("audio", "ClapModel",
             audio_config={"depths": [1, 1, 1, 1], "num_attention_heads": [2, 2, 4, 4], "hidden_size": 128,
                           "patch_embeds_hidden_size": 16}),
    **_group("audio", "Wav2Vec2ForCTC HubertForCTC WavLMForCTC SEWForCTC UniSpeechForCTC Data2VecAudioForCTC "
                      "Wav2Vec2ConformerForCTC Wav2Vec2BertForCTC ParakeetForCTC "
                      "WhisperForConditionalGeneration Speech2TextForConditionalGeneration "
                      "ASTForAudioClassification EncodecModel "
                      "SpeechT5ForSpeechToText VitsModel"),
    **_group("time series", "TimesFm2_5ModelForPrediction",
             context_length=64, horizon_length=8, output_quantile_len=16),
    **_group("time series", "PatchTSTForPrediction PatchTSMixerForPrediction TimesFmModelForPrediction "
                            "TimeSeriesTransformerForPrediction "
                            "AutoformerForPrediction InformerForPrediction"),
}  # fmt: skip


def plain_networks() -> dict[str, Any]:
    """Return plain torch networks by name: functions that give a module and its example inputs."""
    sys.path.insert(0, str(ROOT / "tests"))
    import nested_networks

    return {
        f"torch.{name}": functools.partial(nested_networks.network, name) for name in nested_networks.NETWORKS
    }


def made_of(model: Any, inputs: dict[str, Any]) -> list[dict[str, int]]:
    """Return the kinds of blocks that run in each layer, by the classes of the modules in the model's lists of layers."""
    import torch
    from torch import nn

    from graphopt.frontends.architecture import ask_no_caches

    lists = []
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(module)
            and not re.search("expert|adapter", name, re.I)
        ):
            ends = {type(child).__name__[-5:] for child in module}
            if len(ends) == 1 and any(_blocks(child) for child in module):
                lists.append((name, module))
    # a layer with two attentions has them in a list (LongCat Flash)
    lists = [
        (n, m) for n, m in lists
        if not any(n.startswith(f"{other}.") for other, _ in lists)
        or any(block is not child for child in m for _, block in _blocks(child))
    ]  # fmt: skip
    innermost = [
        m for n, m in lists if not any(other.startswith(f"{n}.") for other, _ in lists if other != n)
    ]
    layers = [child for module in innermost for child in module]
    runs: Counter[Any] = Counter()
    watched = {m for layer in layers for m in (layer, *(block for _, block in _blocks(layer)))}
    hooks = [m.register_forward_hook(lambda m, *_: runs.update([m])) for m in watched]
    ask_no_caches(model)
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    found = []
    for layer in layers:
        blocks = _blocks(layer)
        kinds = Counter({kind: sum(runs[m] for k, m in blocks if k == kind) for kind in dict(blocks)})
        direct = sum(isinstance(child, nn.Linear) for child in layer.children())
        itself = any(block is layer for _, block in blocks)
        if direct >= 2 and kinds and not itself and not kinds["ffn"] and not kinds["experts"]:
            kinds["ffn"] = runs[layer]
        times = max(runs[layer], 1)  # layers that share weights
        if +kinds:
            found += [{kind: count // times for kind, count in kinds.items() if count}] * times
    return found


def _blocks(module: Any) -> list[tuple[str, Any]]:
    """Return the outermost modules that are blocks by their class, with their kinds."""
    name = type(module).__name__
    # heads of an attention may be experts (JetMoE)
    experts = any("Experts" in type(child).__name__ for child in module.children())
    routed = (experts or hasattr(module, "experts")) and not name.endswith("Attention")
    if re.search(r"moe|sparse|expert|switch", name, re.I) and routed:
        return [("experts", module)]
    # layers are called by the kind of their mixing too (Jamba)
    layer = name.endswith(("DecoderLayer", "EncoderLayer"))
    if re.search(MIXER, name) and not layer:
        return [("mixer", module)]
    if re.search("Attention|Attn|MLA$", name) and not layer and not isinstance(module, _lists()):
        return [("attention", module)]
    if re.search(FFN, name) and "Gate" not in name:
        return [("experts" if hasattr(module, "experts") else "ffn", module)]
    # a shared expert is a part of its MoE layer
    children = [child for key, child in module.named_children() if "shared_mlp" not in key]
    found = [found for child in children for found in _blocks(child)]
    if name == "Sequential" and not found and sum(isinstance(child, _linear()) for child in module) > 1:
        return [("ffn", module)]
    return found


def _linear() -> Any:
    from torch import nn

    return nn.Linear


def _lists() -> tuple[Any, ...]:
    from torch import nn

    return nn.ModuleList, nn.Sequential


def named(program: Any) -> dict[str, Any]:
    """Return what the anatomy says: blocks of each kind, those of each layer, and nodes in more than one block."""
    anatomy = program.anatomy
    within = {id(inner) for block in anatomy.blocks if block.kind != "composite" for inner in block.inner}
    kinds = Counter(b.kind for b in (*anatomy.blocks, *anatomy.beside) if id(b) not in within)
    owners: Counter[Any] = Counter()
    for block in anatomy.blocks:
        if not block.parallel:  # those of one sum may share a norm
            owners.update(set(block.nodes))
    return {
        "blocks": dict(kinds),
        "inner": len(within),
        "layers": [[block.kind for block in layer.blocks] for layer in anatomy.layers],
        "components": list(anatomy.components),
        "shared": sum(count > 1 for count in owners.values()),
    }


_AROUND = ("composite", "adapter", "connection")


def judge(found: dict[str, Any]) -> str:
    """Return how the blocks found differ from those that the model is made of; empty if they do not."""
    if "expected" not in found or "blocks" not in found:
        return ""
    expected: Counter[str] = Counter()
    for layer in found["expected"]:
        expected.update(layer)
    # what is around or within the blocks that modules are
    got = Counter({kind: count for kind, count in found["blocks"].items() if kind not in _AROUND})
    if not expected:
        return ""
    differences = [
        f"{kind} {got[kind]} of {expected[kind]}" for kind in sorted({*expected, *got}) if got[kind] != expected[kind]
    ]  # fmt: skip
    layers = len(found["layers"])
    # of modules of one block each (Nemotron-H), which form a layer is open
    single = all(sum(layer.values()) == 1 for layer in found["expected"])
    if layers != len(found["expected"]) and not (single and len(expected) > 1):
        differences.append(f"{layers} layers of {len(found['expected'])}")
    if found.get("shared"):
        differences.append(f"{found['shared']} values in more than one block")
    return ", ".join(differences)


def try_class(name: str, quick: bool) -> dict[str, Any]:
    """Capture a class, name its blocks and, unless quick, run every pass."""
    warnings.simplefilter("ignore")
    plain = plain_networks() if name.startswith("torch.") else {}
    kind = OTHERS.get(name, Kind("plain torch" if plain else "decoder", DECODERS.get(name, {})))
    found: dict[str, Any] = {"name": name, "group": kind.group}
    inputs = None
    from graphopt.frontends.example_inputs import example_inputs as model_inputs

    try:
        if plain:
            model, inputs = plain[name]()
        else:
            model = small_model(name, kind.options, decoder=kind.group == "decoder")
            if kind.group == "decoder":
                found["layers in the configuration"] = _configured_layers(model.config)
            with contextlib.suppress(Exception):  # needs inputs, and a forward without faults
                example = model_inputs(model)
                found["expected"] = made_of(model, {**example.inputs, **example.fixed})
    except Exception as error:
        return {**found, "not made": first_line(error)}
    import graphopt
    from graphopt.ir.running.examples import example_inputs as program_inputs

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        try:
            if plain:
                program = graphopt.capture(model, inputs, compare=not quick)
            else:
                model.save_pretrained(folder)
                program = graphopt.capture(folder, compare=not quick, cache=False)
        except graphopt.GraphoptError as error:
            return {**found, "refused": refusal(error)}
        except Exception as error:
            return {**found, "fault": fault(error)}
        found["seconds"] = round(time.process_time() - began, 1)
        found |= named(program)
        if not quick:
            try:
                data = [program_inputs(program, seed=seed, padding="none") for seed in range(4)]
            except graphopt.GraphoptError as error:
                return {**found, "refused": refusal(error)}
            found["passes"] = try_passes(program, data)
    return found


def _configured_layers(config: Any) -> int | None:
    text = config.get_text_config()
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if isinstance(getattr(text, key, None), int):
            return int(getattr(text, key))
    return None


def rows(results: list[dict[str, Any]]) -> list[str]:
    """Return a table of the results, a class a line."""
    lines = [
        "| class | captured | blocks | as the model is made | passes taken | passes refused |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in results:
        if "not made" in found:
            lines.append(f"| {found['name']} | not made small: {_cell(found['not made'])} | | | | |")
            continue
        if "blocks" not in found:
            lines.append(
                f"| {found['name']} | {_cell(found.get('refused', found.get('fault', '')))} | | | | |"
            )
            continue
        blocks = ", ".join(f"{count} {kind}" for kind, count in found["blocks"].items())
        passes = found.get("passes", {})
        taken = sum("taken" in p for p in passes.values()) if passes else ""
        refused = sum("refused" in p for p in passes.values()) if passes else ""
        same = "" if not found.get("expected") else judge(found) or "yes"
        lines.append(f"| {found['name']} | yes | {blocks} | {same} | {taken} | {refused} |")
    return lines


def _cell(told: str) -> str:
    return told[:200].replace("|", "/")


def faults(results: list[dict[str, Any]]) -> list[str]:
    """Return what is neither taken nor refused."""
    found = [f"{r['name']}: {r['fault']}" for r in results if "fault" in r]
    return found + [f"{r['name']}: {told}" for r in results for told in broken(r.get("passes", {}))]


def shares(results: list[dict[str, Any]]) -> list[str]:
    """Return for each group how many classes were captured, and how many have the blocks they are made of."""
    lines = [
        "| kind | made small | captured | blocks to compare | named right |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group in dict.fromkeys(r.get("group", "decoder") for r in results):
        members = [r for r in results if r.get("group", "decoder") == group and "not made" not in r]
        captured = [r for r in members if "blocks" in r]
        judged = [r for r in captured if r.get("expected")]
        right = [r for r in judged if not judge(r)]
        lines.append(f"| {group} | {len(members)} | {len(captured)} | {len(judged)} | {len(right)} |")
    return lines


QUICK = (
    "This page is of a run with `--quick`: captures were not compared with the models, and no passes were tried. "
    "`graphopt` itself always compares.\n"
)


def page(results: list[dict[str, Any]]) -> str:
    """Return the page of all results."""
    parts = [
        "# Models\n",
        "Classes of transformers, small and with random weights, captured from a folder that they were saved to, and plain "
        "torch networks, captured with example inputs. `benchmarks/model_zoo.py` writes this page.\n",
        "*As the model is made*: whether attention, feed-forwards, MoE layers and mixers (convolutions, recurrences, "
        "linear attention) are as many, in as many layers, as the modules in the model's lists of layers. Passes are "
        "those of `benchmarks/small_models.py`; a refusal says why on the command line.\n",
        *([] if any("passes" in r for r in results) else [QUICK]),
        *shares(results),
    ]
    for group in dict.fromkeys(r.get("group", "decoder") for r in results):
        parts += [
            f"\n## {group.capitalize()}\n",
            *rows([r for r in results if r.get("group", "decoder") == group]),
        ]
        reasons: Counter[str] = Counter()
        for result in results:
            if result.get("group", "decoder") == group:
                reasons.update(
                    f"`{text}`: {_cell(p['refused'])}"
                    for text, p in result.get("passes", {}).items()
                    if "refused" in p
                )
        if reasons:
            parts.append("\nRefusals, with the number of classes:\n")
            parts += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(parts) + "\n"


def told(found: dict[str, Any]) -> str:
    """Return a result in a line."""
    if "blocks" not in found:
        return str(found.get("not made") or found.get("refused") or found.get("fault"))
    blocks = ", ".join(f"{count} {kind}" for kind, count in found["blocks"].items())
    different = judge(found)
    passes = f"; passes {counts(found['passes'])}" if "passes" in found else ""
    return f"{blocks}{f' [differs: {different}]' if different else ''}{passes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes, or kinds such as decoder or audio")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "zoo")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", type=Path, default=None, help="write the page to this file")
    parser.add_argument(
        "--quick", action="store_true", help="capture and name blocks, without comparison and passes"
    )
    given = parser.parse_args()
    work = given.work / "quick" if given.quick else given.work
    work.mkdir(parents=True, exist_ok=True)
    every = list(dict.fromkeys([*names_of_decoders(), *OTHERS, *plain_networks()]))
    groups = {"decoder": names_of_decoders(), "plain": list(plain_networks())}
    for name, kind in OTHERS.items():
        groups.setdefault(kind.group, []).append(name)
    names = [n for given_name in given.names for n in groups.get(given_name, [given_name])] or every
    seconds = QUICK_SECONDS if given.quick else SECONDS
    results = []
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        for found in pool.map(
            lambda n: in_a_process(try_class, n, work, seconds, given.quick, again=given.again), names
        ):
            results.append(found)
            print(found["name"], told(found), flush=True)
    if given.page:
        given.page.write_text(page(results))
    wrong = faults(results)
    print("\n".join([*shares(results), *wrong]))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
