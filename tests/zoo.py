"""Small, randomly initialised models of many architectures, and what their anatomy must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """An architecture at toy size: its configuration class, options, model class and expected blocks."""

    config: str
    model: str
    options: dict[str, Any]
    blocks: dict[str, int]
    norms: str = "pre"
    heads: tuple[int, int] | None = None
    features: tuple[str, ...] = field(default_factory=tuple)


_BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FFN = {**_BASE, "intermediate_size": 48}
_GQA = {**_FFN, "num_key_value_heads": 2}
_MOE = {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MULTI = {"attention": 2, "ffn": 2}
_EXPERTS = {"attention": 2, "experts": 2}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}


CASES: dict[str, Case] = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", _GQA, _MULTI, heads=(4, 2)),
    "llama_tied": Case("LlamaConfig", "LlamaForCausalLM", {**_GQA, "tie_word_embeddings": True}, _MULTI),
    "mistral": Case(
        "MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": 5}, _MULTI, features=("window",)
    ),
    "qwen2": Case("Qwen2Config", "Qwen2ForCausalLM", _GQA, _MULTI),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", {**_GQA, "head_dim": 8}, _MULTI),
    "gemma": Case("GemmaConfig", "GemmaForCausalLM", {**_GQA, "head_dim": 8}, _MULTI),
    "gemma2": Case(
        "Gemma2Config", "Gemma2ForCausalLM", {**_GQA, "head_dim": 8, "sliding_window": 5}, _MULTI, "sandwich"
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GQA, "head_dim": 8, "sliding_window": 5},
        _MULTI,
        "sandwich",
    ),
    "olmo": Case("OlmoConfig", "OlmoForCausalLM", _GQA, _MULTI),
    "olmo2": Case("Olmo2Config", "Olmo2ForCausalLM", _GQA, _MULTI, "branch"),
    "phi": Case("PhiConfig", "PhiForCausalLM", _FFN, _MULTI, features=("parallel",)),
    "phi3": Case("Phi3Config", "Phi3ForCausalLM", _GQA, _MULTI, features=("fused_qkv", "fused_gate_up")),
    "gpt2": Case(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 101,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _MULTI,
        features=("fused_qkv",),
    ),
    "gpt_neox": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", _FFN, _MULTI, features=("parallel",)),
    "gptj": Case(
        "GPTJConfig",
        "GPTJForCausalLM",
        {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        _MULTI,
        features=("parallel",),
    ),
    "codegen": Case(
        "CodeGenConfig",
        "CodeGenForCausalLM",
        {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        _MULTI,
        features=("parallel",),
    ),
    "gpt_bigcode": Case(
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        _MULTI,
        heads=(4, 1),
    ),
    "falcon": Case(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "alibi": False,
            "parallel_attn": True,
        },
        _MULTI,
        heads=(4, 1),
    ),
    "falcon_alibi": Case(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": False,
            "alibi": True,
            "parallel_attn": False,
            "bias": True,
        },
        _MULTI,
    ),
    "bloom": Case(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        _MULTI,
    ),
    "mpt": Case(
        "MptConfig",
        "MptForCausalLM",
        {
            "vocab_size": 101,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "expansion_ratio": 2,
        },
        _MULTI,
    ),
    "opt": Case(
        "OPTConfig",
        "OPTForCausalLM",
        {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
        _MULTI,
    ),
    "stablelm": Case("StableLmConfig", "StableLmForCausalLM", _GQA, _MULTI),
    "starcoder2": Case("Starcoder2Config", "Starcoder2ForCausalLM", _GQA, _MULTI),
    "cohere": Case("CohereConfig", "CohereForCausalLM", _GQA, _MULTI, features=("parallel",)),
    "glm": Case("GlmConfig", "GlmForCausalLM", {**_GQA, "head_dim": 8}, _MULTI),
    "nemotron": Case("NemotronConfig", "NemotronForCausalLM", _GQA, _MULTI),
    "smollm3": Case("SmolLM3Config", "SmolLM3ForCausalLM", _GQA, _MULTI),
    "persimmon": Case("PersimmonConfig", "PersimmonForCausalLM", _FFN, _MULTI),
    "helium": Case("HeliumConfig", "HeliumForCausalLM", {**_GQA, "head_dim": 8}, _MULTI),
    "granite": Case(
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_GQA, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        _MULTI,
    ),
    "exaone4": Case("Exaone4Config", "Exaone4ForCausalLM", {**_GQA, "sliding_window": 5}, _MULTI, "branch"),
    "mixtral": Case(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        _EXPERTS,
    ),
    "olmoe": Case(
        "OlmoeConfig", "OlmoeForCausalLM", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}, _EXPERTS
    ),
    "qwen2_moe": Case(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_MOE, "shared_expert_intermediate_size": 24}, _EXPERTS
    ),
    "qwen3_moe": Case("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MOE, "head_dim": 8}, _EXPERTS),
    "phimoe": Case(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        _EXPERTS,
    ),
    "granitemoe": Case(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        _EXPERTS,
    ),
    "gpt_oss": Case(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        _EXPERTS,
        features=("sinks",),
    ),
    "deepseek_v3": Case(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_FFN,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 6,
        },
        {"attention": 2, "ffn": 1, "experts": 1},
    ),
    "bert": Case("BertConfig", "BertModel", _FFN, _MULTI, "post"),
    "roberta": Case("RobertaConfig", "RobertaModel", {**_FFN, "pad_token_id": 1}, _MULTI, "post"),
    "distilbert": Case(
        "DistilBertConfig",
        "DistilBertModel",
        {
            "vocab_size": 101,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        _MULTI,
        "post",
    ),
    "albert": Case("AlbertConfig", "AlbertModel", {**_FFN, "embedding_size": 16}, _MULTI, "post"),
    "electra": Case("ElectraConfig", "ElectraModel", {**_FFN, "embedding_size": 16}, _MULTI, "post"),
    "mpnet": Case("MPNetConfig", "MPNetModel", _FFN, _MULTI, "post", features=("relative_bias",)),
    "deberta_v2": Case(
        "DebertaV2Config",
        "DebertaV2Model",
        {
            **_FFN,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 16,
        },
        _MULTI,
        "post",
    ),
    "modernbert": Case(
        "ModernBertConfig",
        "ModernBertModel",
        {**_FFN, "local_attention": 8, "global_attn_every_n_layers": 2},
        _MULTI,
    ),
    "t5": Case(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 101,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        {"attention": 6, "ffn": 4},
    ),
    "bart": Case(
        "BartConfig",
        "BartModel",
        {
            "vocab_size": 101,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        {"attention": 6, "ffn": 4},
        "post",
    ),
    "vit": Case("ViTConfig", "ViTModel", _VISION, _MULTI),
    "deit": Case("DeiTConfig", "DeiTModel", _VISION, _MULTI),
    "dinov2": Case("Dinov2Config", "Dinov2Model", {**_VISION, "mlp_ratio": 2}, _MULTI),
    "siglip": Case("SiglipVisionConfig", "SiglipVisionModel", {**_VISION, "vision_use_head": False}, _MULTI),
    "swin": Case(
        "SwinConfig",
        "SwinModel",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
        },
        _MULTI,
    ),
    "convnext": Case(
        "ConvNextConfig",
        "ConvNextModel",
        {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "image_size": 64},
        {"mixer": 4},
        "none",
    ),
}


_SCANS = {"n_groups": 2, "conv_kernel": 4, "expand": 2, "chunk_size": 16, "use_cache": False}
_DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip

# mixers that keep states; apart from CASES, since few tests are about them
HYBRIDS: dict[str, Case] = {
    "mamba": Case(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
        {"mixer": 2},
    ),
    "mamba2": Case(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 4,
         **_SCANS},
        {"mixer": 2},
    ),
    "falcon_h1": Case(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {**_GQA, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4,
         "mamba_d_conv": 4, "mamba_chunk_size": 16},
        {"mixer": 2, "attention": 2, "ffn": 2},
    ),
    "nemotron_h": Case(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {**_GQA, "layers_block_type": ["mamba", "attention", "mlp"], "head_dim": 8, "ssm_state_size": 4,
         "mamba_num_heads": 8, "mamba_head_dim": 8, **_SCANS} | {"num_hidden_layers": 3},
        {"mixer": 1, "attention": 1, "ffn": 1},
    ),
    "lfm2": Case(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {**_GQA, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
        {"mixer": 2, "attention": 1, "ffn": 3},
    ),
    "qwen3_next": Case(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_GQA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1],
         **_DELTA},
        {"mixer": 1, "attention": 1, "ffn": 2},
    ),
    "kimi_linear": Case(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {**_GQA, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
         "mlp_layer_types": ["dense", "dense"], "linear_conv_kernel_dim": 4, "linear_head_dim": 8,
         "linear_num_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
        {"mixer": 1, "attention": 1, "ffn": 2},
    ),
}  # fmt: skip


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of the zoo with random weights; norms and biases are random too."""
    import transformers

    case = CASES[name] if name in CASES else HYBRIDS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**case.options)
    model = getattr(transformers, case.model)(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # fresh norms are ones and fresh biases zeros, which would hide a lost one
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "sinks" in parameter_name:
                parameter.normal_(generator=generator)
    model.config.use_cache = False
    return model.to(dtype)
