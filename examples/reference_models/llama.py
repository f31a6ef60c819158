"""The reference language model: Llama's shape, 8 layers, 8 heads on 4 key-value heads, 3.9 million parameters.

python examples/reference_models/llama.py
"""

from language import LONG, LanguageModel, main
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import END_ID, PADDING_ID, SIZE

from graphopt.training import Settings

CONFIG = LlamaConfig(
    vocab_size=SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=LONG,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=END_ID,
    eos_token_id=END_ID,
    pad_token_id=PADDING_ID,
)

MODEL = LanguageModel(
    name="llama",
    title="a small Llama",
    build=lambda: LlamaForCausalLM(CONFIG),
    settings=Settings(
        steps=1600, learning_rate=1.5e-3, warmup=50, schedule="cosine", final=0.02, weight_decay=0.1, seed=1
    ),
)

if __name__ == "__main__":
    main(MODEL)
