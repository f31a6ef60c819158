"""Small models with random weights that are no decoders of text: several inputs, two stacks, images, audio, time series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
_STACKS = {
    "vocab_size": 101,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_WHISPER = {
    **_STACKS,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_SPEECH = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_QWEN_TEXT = {
    **_GROUPED,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
_QWEN_TOKENS = {
    "image_token_id": 99,
    "video_token_id": 98,
    "vision_start_token_id": 97,
    "vision_end_token_id": 96,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_T5GEMMA = {**_GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8}


@dataclass(frozen=True)
class Kind:
    """A model and what its program must be: its inputs in any order, and its blocks."""

    make: Callable[[Any], Any]
    inputs: set[str]
    blocks: dict[str, int]


def _t5(t: Any) -> Any:
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def _whisper_encoder(t: Any) -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(t.WhisperConfig(**_WHISPER))


def _sam(t: Any) -> Any:
    return t.SamModel(
        t.SamConfig(
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 4,
                "mlp_dim": 48,
                "output_channels": 16,
                "global_attn_indexes": [1],
                "window_size": 4,
                "num_pos_feats": 8,
            },
            prompt_encoder_config={
                "hidden_size": 16,
                "image_size": 32,
                "patch_size": 4,
                "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": 16,
                "mlp_dim": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        )
    )


_READ = {"input_ids", "attention_mask"}
_SEEN = {*_READ, "pixel_values"}
_BOTH = {*_READ, "decoder_input_ids"}
_FOUR = {"attention": 4, "ffn": 4}
_TWO = {"attention": 2, "ffn": 2}
_SIX = {"attention": 6, "ffn": 4}

KINDS: dict[str, Kind] = {
    "llava": Kind(
        lambda t: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**_VISION),
                text_config=t.LlamaConfig(**_GROUPED),
                image_token_index=99,
                vision_feature_layer=-1,
            )
        ),
        _SEEN,
        _FOUR,
    ),
    "paligemma": Kind(
        lambda t: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                vision_config={**t.SiglipVisionConfig(**_VISION, vision_use_head=False).to_dict()},
                text_config=t.GemmaConfig(**_GROUPED).to_dict(),
                image_token_index=99,
                projection_dim=32,
            )
        ),
        {*_SEEN, "token_type_ids"},
        _FOUR,
    ),
    "gemma3": Kind(
        lambda t: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                vision_config=t.SiglipVisionConfig(
                    **{**_VISION, "image_size": 32}, vision_use_head=False
                ).to_dict(),
                text_config=t.Gemma3TextConfig(**_GROUPED, sliding_window=5).to_dict(),
                image_token_index=99,
                boi_token_index=97,
                eoi_token_index=98,
                mm_tokens_per_image=4,
            )
        ),
        {*_SEEN, "token_type_ids"},
        _FOUR,
    ),
    "qwen2_vl": Kind(
        lambda t: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={k: v for k, v in _QWEN_TEXT.items() if k != "head_dim"},
                vision_config={**_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
                **_QWEN_TOKENS,
            )
        ),
        {*_SEEN, "position_ids"},
        _FOUR,
    ),
    "qwen3_vl": Kind(
        lambda t: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                text_config=_QWEN_TEXT,
                vision_config={
                    **_QWEN_VISION,
                    "out_hidden_size": 32,
                    "intermediate_size": 48,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1],
                },
                **_QWEN_TOKENS,
            )
        ),
        {*_SEEN, "position_ids"},
        _FOUR,
    ),
    "sam": Kind(_sam, {"pixel_values", "input_points"}, {"attention": 14, "ffn": 4}),
    "clip": Kind(
        lambda t: t.CLIPModel(
            t.CLIPConfig(
                text_config={**_TEXT, "projection_dim": 16},
                vision_config={**_VISION, "projection_dim": 16},
                projection_dim=16,
            )
        ),
        _SEEN,
        _FOUR,
    ),
    "siglip2": Kind(
        lambda t: t.Siglip2Model(
            t.Siglip2Config(text_config=_TEXT, vision_config={**_VISION, "num_patches": 16})
        ),
        {*_SEEN, "pixel_attention_mask"},
        {"attention": 4, "ffn": 5},
    ),
    "t5": Kind(_t5, _BOTH, _SIX),
    "bart": Kind(
        lambda t: t.BartForConditionalGeneration(
            t.BartConfig(
                **_STACKS,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=2,
                forced_eos_token_id=2,
            )
        ),
        _BOTH,
        _SIX,
    ),
    "marian": Kind(
        lambda t: t.MarianMTModel(
            t.MarianConfig(
                **_STACKS,
                max_position_embeddings=64,
                pad_token_id=100,
                eos_token_id=2,
                decoder_start_token_id=100,
                forced_eos_token_id=2,
            )
        ),
        _BOTH,
        _SIX,
    ),
    "whisper": Kind(
        lambda t: t.WhisperForConditionalGeneration(t.WhisperConfig(**_WHISPER)),
        {"input_features", "decoder_input_ids"},
        _SIX,
    ),
    "t5gemma": Kind(
        lambda t: t.T5GemmaForConditionalGeneration(
            t.T5GemmaConfig(encoder={**_T5GEMMA}, decoder={**_T5GEMMA}, vocab_size=101)
        ),
        _BOTH,
        _SIX,
    ),
    "trocr": Kind(
        lambda t: t.VisionEncoderDecoderModel(
            t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                t.ViTConfig(**_VISION),
                t.TrOCRConfig(
                    vocab_size=101,
                    d_model=32,
                    decoder_layers=2,
                    decoder_attention_heads=4,
                    decoder_ffn_dim=48,
                    max_position_embeddings=32,
                    is_decoder=True,
                    add_cross_attention=True,
                ),
            )
        ),
        {"pixel_values", "decoder_input_ids"},
        _SIX,
    ),
    "wav2vec2": Kind(
        lambda t: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**_SPEECH)), {"input_values"}, {**_TWO, "mixer": 1}
    ),
    "hubert": Kind(
        lambda t: t.HubertModel(t.HubertConfig(**_SPEECH)), {"input_values"}, {**_TWO, "mixer": 1}
    ),
    "parakeet": Kind(
        lambda t: t.ParakeetForCTC(
            t.ParakeetCTCConfig(
                vocab_size=40,
                pad_token_id=0,
                encoder_config={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 48,
                    "num_mel_bins": 16,
                    "subsampling_conv_channels": 8,
                },
            )
        ),
        {"input_features"},
        {"attention": 2, "ffn": 4, "mixer": 2},
    ),
    "audio_spectrogram": Kind(
        lambda t: t.ASTModel(
            t.ASTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_length=64,
                num_mel_bins=32,
            )
        ),
        {"input_values"},
        _TWO,
    ),
    "whisper_encoder": Kind(_whisper_encoder, {"input_features"}, _TWO),
    "patchtst": Kind(
        lambda t: t.PatchTSTForPrediction(
            t.PatchTSTConfig(
                num_input_channels=2,
                context_length=32,
                patch_length=8,
                patch_stride=8,
                d_model=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=48,
                prediction_length=8,
            )
        ),
        {"past_values", "past_observed_mask"},
        _TWO,
    ),
    "timesfm": Kind(
        lambda t: t.TimesFmModelForPrediction(
            t.TimesFmConfig(
                patch_length=8,
                context_length=32,
                horizon_length=16,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                head_dim=8,
                quantiles=[0.1, 0.5, 0.9],
            )
        ),
        {"past_values", "freq"},
        _TWO,
    ),
    "deberta": Kind(
        lambda t: t.DebertaModel(
            t.DebertaConfig(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        _READ,
        _TWO,
    ),
    "deberta_v2": Kind(
        lambda t: t.DebertaV2Model(
            t.DebertaV2Config(
                **{k: v for k, v in _TEXT.items() if k not in ("bos_token_id", "eos_token_id")},
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=8,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
            )
        ),
        _READ,
        _TWO,
    ),
    "layoutlm": Kind(
        lambda t: t.LayoutLMModel(t.LayoutLMConfig(**_TEXT)), {*_READ, "token_type_ids", "bbox"}, _TWO
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """Return a model with random weights; norms and biases are random too."""
    import transformers

    torch.manual_seed(seed)
    model = KINDS[name].make(transformers).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # fresh norms are ones and fresh biases zeros, which would hide a lost one
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
