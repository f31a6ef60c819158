"""The supported architectures of GGUF files: names, layout and shapes of their tensors.

After llama.cpp's convert_hf_to_gguf.py, whose changes to tensors are undone: rows of queries and keys in pairs
(llama), norms with one added (Gemma). A file with unknown entries is rejected, since they may change the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .header import Header
from .rope import FREQUENCIES, LONG, SHORT, rope_parameters

# hyperparameters that every architecture may have, and those that do not affect the computation
_COMMON = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "vocab_size", "expert_count", "expert_used_count", "attention.causal",
}  # fmt: skip
_IDLE = {"rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "mm.tokens_per_image"}


@dataclass(frozen=True)
class Slot:
    """A tensor: its name in the file and in the library, its sizes by name, and how the file transformed it."""

    stored: str
    name: str
    shape: tuple[str, ...]
    rotated: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """One architecture; ``layer`` are the tensors of a block, ``biases`` groups that are each present or absent."""

    model_type: str
    model_class: str
    layer: tuple[Slot, ...]
    norm_offset: float = 0.0
    biases: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    more: Callable[[Header, str, dict[str, Any]], dict[str, Any]] = lambda header, prefix, config: {}
    keys: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()


def _norms(offset: float, *pairs: tuple[str, str]) -> tuple[Slot, ...]:
    return tuple(Slot(f"{a}.weight", f"{b}.weight", ("hidden",), offset=offset) for a, b in pairs)


def _head_norms(offset: float) -> tuple[Slot, ...]:
    return (
        Slot("attn_q_norm.weight", "self_attn.q_norm.weight", ("head",), offset=offset),
        Slot("attn_k_norm.weight", "self_attn.k_norm.weight", ("head",), offset=offset),
    )


def _attention(*, rotated: bool = False) -> tuple[Slot, ...]:
    return (
        Slot("attn_q.weight", "self_attn.q_proj.weight", ("queries", "hidden"), "heads" if rotated else ""),
        Slot("attn_k.weight", "self_attn.k_proj.weight", ("keys", "hidden"), "kv_heads" if rotated else ""),
        Slot("attn_v.weight", "self_attn.v_proj.weight", ("keys", "hidden")),
        Slot("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "queries")),
    )


def _biases(*, rotated: bool = False, output: bool = False) -> tuple[Slot, ...]:
    biased = (
        Slot("attn_q.bias", "self_attn.q_proj.bias", ("queries",), "heads" if rotated else ""),
        Slot("attn_k.bias", "self_attn.k_proj.bias", ("keys",), "kv_heads" if rotated else ""),
        Slot("attn_v.bias", "self_attn.v_proj.bias", ("keys",)),
    )
    return (*biased, Slot("attn_output.bias", "self_attn.o_proj.bias", ("hidden",))) if output else biased


_FEED_FORWARD = (
    Slot("ffn_gate.weight", "mlp.gate_proj.weight", ("ffn", "hidden")),
    Slot("ffn_up.weight", "mlp.up_proj.weight", ("ffn", "hidden")),
    Slot("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "ffn")),
)
_FEED_FORWARD_BIASES = (
    Slot("ffn_gate.bias", "mlp.gate_proj.bias", ("ffn",)),
    Slot("ffn_up.bias", "mlp.up_proj.bias", ("ffn",)),
    Slot("ffn_down.bias", "mlp.down_proj.bias", ("hidden",)),
)
_TWO_NORMS = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
_FOUR_NORMS = (
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)


def _gemma_scale(header: Header, prefix: str, config: dict[str, Any], largest: int) -> int:
    """Return the number by whose root queries are divided; the file lacks it, llama.cpp has one exception by depth."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(header: Header, prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    count = config["num_hidden_layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(header, prefix, config, 46),
        "attn_logit_softcapping": header.number(f"{prefix}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.number(f"{prefix}.final_logit_softcapping", 30.0),
        "sliding_window": header.count(f"{prefix}.attention.sliding_window", 4096),
        "layer_types": [("full" if i % 2 else "sliding") + "_attention" for i in range(count)],
        "attention_bias": False,
    }


def _gemma3(header: Header, prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    full = config["rope_parameters"]
    if full["rope_type"] not in ("default", "linear"):
        raise header.wrong(f"its rotary positions are scaled by {full['rope_type']}, unlike any Gemma 3")
    entries: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(header, prefix, config, 62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }
    if header.has(f"{prefix}.final_logit_softcapping"):
        entries["final_logit_softcapping"] = header.number(f"{prefix}.final_logit_softcapping")
    # a file without a window has full attention everywhere
    window = header.count(f"{prefix}.attention.sliding_window", 0, low=0)
    pattern = header.count(f"{prefix}.attention.sliding_window_pattern", 6) if window else 1
    entries["layer_types"] = [
        ("full" if (i + 1) % pattern == 0 else "sliding") + "_attention"
        for i in range(config["num_hidden_layers"])
    ]
    entries["sliding_window"] = window or config["max_position_embeddings"]
    local = header.number(f"{prefix}.rope.freq_base_swa", 10000.0)
    entries["rope_parameters"] = {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return entries


def _phi3(header: Header, prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    rotated = header.count(f"{prefix}.rope.dimension_count", config["head_dim"])
    entries: dict[str, Any] = {"hidden_act": "silu"}
    entries["sliding_window"] = header.count(f"{prefix}.attention.sliding_window", 0, low=0) or None
    entries["original_max_position_embeddings"] = header.count(
        f"{prefix}.rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    entries["rope_parameters"] = {
        **config["rope_parameters"],
        "partial_rotary_factor": rotated / config["head_dim"],
    }
    return entries


def _plain(header: Header, prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        (*_norms(0, *_TWO_NORMS), *_attention(rotated=True), *_FEED_FORWARD),
        biases={
            "attention_bias": _biases(rotated=True, output=True),
            "mlp_bias": _FEED_FORWARD_BIASES,
        },
        more=_plain,
        tables=frozenset({FREQUENCIES}),
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        (*_norms(0, *_TWO_NORMS), *_attention(), *_biases(), *_FEED_FORWARD),
        more=_plain,
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        (*_norms(0, *_TWO_NORMS), *_attention(), *_head_norms(0), *_FEED_FORWARD),
        biases={"attention_bias": _biases(output=True)},
        more=_plain,
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        (*_norms(1, *_FOUR_NORMS), *_attention(), *_FEED_FORWARD),
        norm_offset=1.0,
        more=_gemma2,
        keys=frozenset({"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"}),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*_norms(1, *_FOUR_NORMS), *_attention(), *_head_norms(1), *_FEED_FORWARD),
        norm_offset=1.0,
        more=_gemma3,
        keys=frozenset(
            {
                "final_logit_softcapping",
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "rope.freq_base_swa",
            }
        ),
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        (
            *_norms(0, *_TWO_NORMS),
            Slot("attn_qkv.weight", "self_attn.qkv_proj.weight", ("fused", "hidden")),
            Slot("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "queries")),
            Slot("ffn_up.weight", "mlp.gate_up_proj.weight", ("two_ffn", "hidden")),
            Slot("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "ffn")),
        ),
        more=_phi3,
        keys=frozenset({"attention.sliding_window", "rope.scaling.attn_factor"}),
        tables=frozenset({LONG, SHORT}),
    ),
}


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """Return the architecture of a file, which is also the prefix of its hyperparameters.

    Raises:
        CheckpointError: it is not supported, or the file is not a model.
    """
    name = header.text("general.architecture")
    kind = header.text("general.type", "model")
    if kind != "model":
        raise header.wrong(f"it holds a {kind[:40]!r}, not a model", hint="give the file of the model itself")
    if name not in ARCHITECTURES:
        raise header.wrong(
            f"the architecture {name[:60]!r} is not supported in GGUF files",
            hint=f"supported are {', '.join(ARCHITECTURES)}; or give the model's Hugging Face folder",
        )
    return name, ARCHITECTURES[name]


def configuration(header: Header, prefix: str, kind: Architecture) -> dict[str, Any]:
    """Return the equivalent of config.json as plain data.

    Raises:
        CheckpointError: an entry is missing, invalid, contradicts another one, or is unknown.
    """
    _require_known(header, prefix, kind)
    layers = header.count(f"{prefix}.block_count", high=1 << 16)
    if layers * len(kind.layer) > len(header.tensors):
        raise header.wrong(f"it claims {layers} layers, and has {len(header.tensors)} tensors")
    hidden = header.count(f"{prefix}.embedding_length", high=1 << 24)
    heads = header.count(f"{prefix}.attention.head_count", high=1 << 20)
    kv_heads = header.count(f"{prefix}.attention.head_count_kv", heads, high=1 << 20)
    head = header.count(f"{prefix}.attention.key_length", max(1, hidden // heads), high=1 << 20)
    if heads % kv_heads or head % 2:
        raise header.wrong(f"{heads} heads of {head} dimensions cannot share {kv_heads} keys and values")
    if header.count(f"{prefix}.attention.value_length", head) != head:
        raise header.wrong("its values are not as wide as its keys, unlike those of any model of this kind")
    if header.count(f"{prefix}.expert_count", 0, low=0):
        raise header.wrong(
            f"it is a mixture of experts, which is not supported in GGUF files for {prefix}",
            hint="give the model's Hugging Face folder",
        )
    if not header.flag(f"{prefix}.attention.causal", True):
        raise header.wrong("its attention is not causal, unlike that of any model of this kind")
    rotated = header.count(f"{prefix}.rope.dimension_count", head)
    if rotated > head or rotated % 2 or (rotated != head and prefix != "phi3"):
        raise header.wrong(f"{rotated} of the {head} dimensions of a head are rotated")
    config: dict[str, Any] = {
        "architectures": [kind.model_class],
        "model_type": kind.model_type,
        "dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": header.count(f"{prefix}.feed_forward_length", high=1 << 26),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": header.count(f"{prefix}.context_length"),
        "rms_norm_eps": header.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(header, prefix, rotated),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    for name, slots in kind.biases.items():
        config[name] = any(f"blk.0.{slot.stored}" in header.tensors for slot in slots)
    return config | kind.more(header, prefix, config)


def _require_known(header: Header, prefix: str, kind: Architecture) -> None:
    recognised = _COMMON | _IDLE | kind.keys
    for key in header.metadata:
        if key.startswith(prefix + ".") and key.removeprefix(prefix + ".") not in recognised:
            raise header.wrong(
                f"its entry {key[:80]} is unknown, and may change the model",
                hint="give the model's Hugging Face folder, or report it",
            )


def expected(
    config: dict[str, Any], kind: Architecture, vocabulary: int
) -> dict[str, tuple[Slot, tuple[int, ...]]]:
    """Return the tensors that a file must have, by name, with their slots and sizes."""
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    sizes = {
        "hidden": config["hidden_size"], "ffn": config["intermediate_size"], "head": head,
        "queries": heads * head, "keys": kv_heads * head, "fused": (heads + 2 * kv_heads) * head,
        "two_ffn": 2 * config["intermediate_size"], "vocabulary": vocabulary,
    }  # fmt: skip
    outside = [
        Slot("token_embd.weight", "model.embed_tokens.weight", ("vocabulary", "hidden")),
        Slot("output_norm.weight", "model.norm.weight", ("hidden",), offset=kind.norm_offset),
    ]
    if not config["tie_word_embeddings"]:
        outside.append(Slot("output.weight", "lm_head.weight", ("vocabulary", "hidden")))
    expected_slots = {slot.stored: (slot, tuple(sizes[s] for s in slot.shape)) for slot in outside}
    inside = [*kind.layer, *(s for name, slots in kind.biases.items() if config[name] for s in slots)]
    for layer in range(config["num_hidden_layers"]):
        for slot in inside:
            layer_slot = Slot(
                f"blk.{layer}.{slot.stored}", f"model.layers.{layer}.{slot.name}", slot.shape, slot.rotated,
                slot.offset,
            )  # fmt: skip
            expected_slots[layer_slot.stored] = (layer_slot, tuple(sizes[s] for s in slot.shape))
    return expected_slots
