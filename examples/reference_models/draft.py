"""The reference draft model: a Llama of 2 layers with the big one's tokenizer, 0.4 million parameters.

python examples/reference_models/draft.py
"""

from language import LONG, LanguageModel, main
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import END_ID, PADDING_ID, SIZE

from graphopt.training import Settings

CONFIG = LlamaConfig(
    vocab_size=SIZE,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=LONG,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=END_ID,
    eos_token_id=END_ID,
    pad_token_id=PADDING_ID,
)

MODEL = LanguageModel(
    name="draft",
    title="a draft for the small Llama",
    build=lambda: LlamaForCausalLM(CONFIG),
    settings=Settings(
        steps=2400, learning_rate=6e-3, warmup=100, schedule="cosine", final=0.02, weight_decay=0.1, seed=3
    ),
)

if __name__ == "__main__":
    main(MODEL)
