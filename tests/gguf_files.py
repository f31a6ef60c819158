"""Small GGUF files, written from transformers models as llama.cpp's convert_hf_to_gguf.py writes them.

Names of tensors come from the library's own table, not from ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama_tied": ("llama", "Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama_biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 32768, "head_dim": 32}),
    "llama_linear": (
        "llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "qwen2": ("qwen2", "Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_yarn": (
        "qwen2", "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                             "original_max_position_embeddings": 16}},
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5}),
    "gemma3": (
        "gemma3", "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5, "num_hidden_layers": 7,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 6}),
    "phi3_long": (
        "phi3", "Phi3",
        {"sliding_window": None, "original_max_position_embeddings": 16,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                             "original_max_position_embeddings": 16,
                             "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.9],
                             "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0]}},
    ),
}  # fmt: skip


def make(name: str, **more: Any) -> Any:
    """Return a small model of transformers, every parameter random, in float32."""
    _, kind, options = MODELS[name]
    config_class = (
        transformers.Gemma3TextConfig if kind == "Gemma3" else getattr(transformers, kind + "Config")
    )
    torch.manual_seed(7)
    model = getattr(transformers, kind + "ForCausalLM")(config_class(**SIZES | options | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def write(
    path: Path,
    name: str,
    model: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    vocabulary: str = "none",
    edit: Any = None,
) -> Path:
    """Write a model as a GGUF file; ``edit`` is given the writer and the tensors before they are added."""
    architecture = MODELS[name][0]
    writer = gguf.GGUFWriter(path, architecture)
    parameters(writer, architecture, model.config)
    {"none": lambda w, n: w.add_tokenizer_model("none"), "bytes": byte_level, "pieces": pieces}[vocabulary](
        writer, model.config.vocab_size
    )
    tensors = tensors_of(architecture, model)
    if edit is not None:
        edit(writer, tensors)
    for key, value in tensors.items():
        raw = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quantize(numpy.ascontiguousarray(value), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parameters(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    """Write the hyperparameters."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if architecture != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if architecture != "phi3" and getattr(config, "head_dim", None):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)


def tensors_of(architecture: str, model: Any) -> dict[str, numpy.ndarray]:
    """Return the tensors as a file has them: renamed, queries and keys of llama reordered, Gemma's norms plus one."""
    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    made: dict[str, numpy.ndarray] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.clone()
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        made[stored] = value.numpy()
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        made["rope_freqs.weight"] = _factors(rope, config.head_dim)
    if rope.get("rope_type") == "longrope":
        made["rope_factors_long.weight"] = numpy.array(rope["long_factor"], numpy.float32)
        made["rope_factors_short.weight"] = numpy.array(rope["short_factor"], numpy.float32)
    return made


def _factors(rope: dict[str, Any], dimensions: int) -> numpy.ndarray:
    """Return what llama.cpp divides each frequency by, for the scaling of Llama 3."""
    found = []
    low, high, length = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    for i in range(0, dimensions, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / dimensions)
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(rope["factor"])
        else:
            smooth = (length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return numpy.array(found, numpy.float32)


def byte_level(writer: gguf.GGUFWriter, size: int) -> None:
    """Write a byte-level vocabulary: three special tokens, all bytes, and some merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2"]
    tokens = ["<pad>", "<s>", "<|end|>", *letters, *(m.replace(" ", "") for m in merges)]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    kinds += [5] * (size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _special(writer)


PIECES = [
    ("\u2581", -3.0), ("h", -30.0), ("e", -31.0), ("l", -32.0), ("o", -33.0), ("he", -5.0), ("ll", -4.0), ("hell", -8.0),
    ("hello", -9.0), ("\u2581hello", -10.0), ("lo", -4.5), ("\u2581w", -6.0), ("w", -34.0), ("r", -35.0), ("d", -36.0),
]  # fmt: skip


def pieces(writer: gguf.GGUFWriter, size: int) -> None:
    """Write a sentencepiece vocabulary with bytes to fall back on."""
    tokens = ["<unk>", "<s>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256)), *(p for p, _ in PIECES)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    scores = [0.0] * 259 + [s for _, s in PIECES]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores + [-1000.0] * (size - len(scores)))
    writer.add_token_types(kinds + [5] * (size - len(kinds)))
    _special(writer)


def _special(writer: gguf.GGUFWriter) -> None:
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
